"""`paper fig7`: neck maps of GELAN and of YOLOv9 (GELAN with PGI) after the same epoch of warm-up from the same seed.

The paper shows them for one image after the first of the three epochs of bias warm-up, and says that
GELAN's diverge while PGI's focus on the objects. Here both networks are trained that far, and the figure comes with
a number: how much of each map's variation is inside the objects' boxes, over the images of the validation split.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from yolov9_fast._lazy import require
from yolov9_fast._untrusted import user_path
from yolov9_fast.atomic import atomic_write
from yolov9_fast.errors import DataError, UserError
from yolov9_fast.paper.files import add_out, figure_path, write_numbers
from yolov9_fast.viz.figure import save_figure

log = logging.getLogger(__name__)
NETWORKS = ("gelan", "yolov9")
TITLES = {"untrained": "GELAN, untrained", "gelan": "GELAN", "yolov9": "YOLOv9 (GELAN + PGI)"}
SIZES = ("t", "s", "m", "c", "e")
RENDERED_VAL = 32
_EPILOG = """examples:
  yolov9-fast paper fig7 --size s --imgsz 256                    scenes drawn by program
  yolov9-fast paper fig7 photo.jpg --data coco.yaml --device 0   the paper's size, c
  yolov9-fast paper fig7 --data my.yaml --size t --seeds 3 --epochs 2

Networks that were trained with the same settings into the same --project are used again, an interrupted one resumes."""


def configure(parser: argparse.ArgumentParser, target: str) -> None:
    parser.epilog = _EPILOG
    add = parser.add_argument
    add("image", nargs="?", metavar="IMAGE", help="the picture (default: the first with objects of `val`)")
    add("--data", metavar="FILE.yaml", help="data file (default: scenes drawn by program)")
    add(
        "--rendered", type=int, default=480, metavar="N", help="scenes to train on without --data (default %(default)s)"
    )
    add("--size", choices=SIZES, default="c", help="of the networks (default %(default)s)")
    add("--epochs", type=int, default=1, metavar="N", help="a third of the warm-up (default %(default)s)")
    add("--imgsz", type=int, default=640, metavar="N", help="image size in pixels (default %(default)s)")
    add("--batch", type=int, default=8, metavar="N", help="images per iteration (default %(default)s)")
    add(
        "--nominal-batch", type=int, default=64, metavar="N", help="images per step after warm-up (default %(default)s)"
    )
    add("--seeds", type=int, default=1, metavar="N", help="pairs of networks; the first is drawn (default %(default)s)")
    add("--images", type=int, default=32, metavar="N", help="of `val` behind the numbers (default %(default)s)")
    add("--device", help="cpu or a GPU's number (default: a GPU where there is one)")
    add("--workers", type=int, metavar="N", help="loader processes (default: by the machine's cores)")
    add(
        "--project",
        default="runs/paper/fig7",
        metavar="DIR",
        help="folder of the trained networks (default %(default)s)",
    )
    add_out(parser, "fig7", "the maps as .npz and the numbers as .json")


def run(arguments: argparse.Namespace) -> int:
    from yolov9_fast.data import load_data_config, load_split
    from yolov9_fast.paper import neck_maps

    out = figure_path(arguments.out)
    for name in ("rendered", "epochs", "imgsz", "batch", "nominal_batch", "seeds", "images"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(arguments, name)}")
    size = -(-arguments.imgsz // 32) * 32
    arguments.project = user_path(arguments.project, "--project", UserError)
    data = user_path(arguments.data, "--data", UserError) if arguments.data else _rendered_data(arguments, size)
    records, _ = load_split(load_data_config(data), "val", for_training=False)
    samples = list(neck_maps.samples_with_objects(records, size, arguments.images))
    if not samples:
        raise DataError(f"no image of `val` in {data} has an object")
    shown = _sample_of(arguments.image, records, size) if arguments.image else samples[0]
    shown_maps: dict[str, list[Any]] = {}
    rows = []
    for seed in range(arguments.seeds):
        rows += _measured(
            _untrained(arguments.size, len(load_data_config(data).names), seed), "untrained", seed, samples
        )
        for network in NETWORKS:
            model = trained(f"{network}-{arguments.size}", data, arguments, size, seed)
            if seed == 0:
                shown_maps[network] = [
                    m[0].numpy() for m in neck_maps.neck_maps(model, shown.image[None].float() / 255)
                ]
            rows += _measured(model, network, seed, samples)
    numbers = {
        "what": "neck maps summed over channels; means over images of `val`",
        "image": Path(arguments.image).name if arguments.image else "first of val with objects",
        "data": "scenes drawn by program" if arguments.data is None else data.name,
        **{k: getattr(arguments, k) for k in ("size", "epochs", "batch", "nominal_batch", "seeds")},
        "imgsz": size,
        "train_images": len(load_split(load_data_config(data), "train", for_training=True)[0]),
        "rows": rows,
        "over_seeds": over_seeds(rows),
    }
    write_numbers(out.with_suffix(".json"), numbers)
    arrays = {
        f"{n}_{level}": m for n, maps in shown_maps.items() for level, m in zip(neck_maps.LEVELS, maps, strict=True)
    }
    atomic_write(out.with_suffix(".npz"), lambda file: np.savez_compressed(file, image=shown.image.numpy(), **arrays))
    draw(shown, shown_maps, out)
    print(table(numbers))
    print(f"figure in {out}, maps in {out.with_suffix('.npz')}, numbers in {out.with_suffix('.json')}")
    return 0


def _rendered_data(arguments: argparse.Namespace, size: int) -> Path:
    from yolov9_fast.data.rendered import render_dataset

    folder = arguments.project / f"scenes_{arguments.rendered}_{size}"
    data: Path = folder / "data.yaml"
    if os.path.isfile(data):
        return data
    log.info("drawing %d + %d scenes into %s", arguments.rendered, RENDERED_VAL, folder)
    return render_dataset(folder, train=arguments.rendered, val=RENDERED_VAL, size=size)


def _sample_of(image: str, records: Any, size: int) -> Any:
    """The picture as a sample, with its objects where it is one of `records`."""
    from yolov9_fast.data import DetectionDataset, ImageRecord, read_image

    path = user_path(image, "--image")
    height, width = read_image(path).shape[:2]
    known = [record for record in records if os.path.samefile(record.path, path)]
    record = known[0] if known else ImageRecord(path, width, height, 0, np.zeros((0, 5), np.float32))
    return DetectionDataset([record], image_size=size, augment=None)[0]


def trained(network: str, data: Path, arguments: argparse.Namespace, size: int, seed: int) -> Any:
    """The network after `--epochs` epochs, from `--project` where it has been trained before."""
    from yolov9_fast.engine.config import TrainConfig
    from yolov9_fast.engine.run_files import RunFolder, load_state
    from yolov9_fast.engine.trainer import Trainer
    from yolov9_fast.models import load_checkpoint

    config = TrainConfig(
        model=network,
        data=str(data),
        epochs=arguments.epochs,
        imgsz=size,
        batch=arguments.batch,
        nominal_batch=arguments.nominal_batch,
        # The start of a long run: one third of the warm-up, the learning rate not yet decreasing, mosaic on.
        warmup_epochs=3.0 * arguments.epochs,
        schedule="constant",
        close_mosaic=0,
        patience=0,
        seed=seed,
        device=arguments.device,
        workers=arguments.workers,
        project=str(arguments.project),
        plots=False,
        tensorboard=False,
    )
    config = dataclasses.replace(config, name=f"{network}_seed{seed}_{_digest(config)}")
    for folder in sorted(arguments.project.glob(f"{config.name}*")):
        run = RunFolder(folder)
        if not run.state.is_file():
            continue
        if load_state(run.state)["epoch"] + 1 < config.epochs:
            Trainer.resume(folder.parent, folder.name, device=arguments.device, workers=arguments.workers).run()
        log.info("%s: trained before, in %s", network, folder)
        return load_checkpoint(run.last)
    trainer = Trainer(config)
    trainer.run()
    return load_checkpoint(trainer.run_folder.last)


def _untrained(size: str, num_classes: int, seed: int) -> Any:
    """GELAN as `trained` starts it: what the numbers are before any training."""
    import torch

    from yolov9_fast.models import create_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create_model(f"gelan-{size}", num_classes)


def _digest(config: Any) -> str:
    """Of all that the trained weights depend on."""
    options = dataclasses.asdict(config)
    for name in ("device", "workers", "project", "name"):
        del options[name]
    options["data"] = str(Path(config.data).resolve())
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:8]


def _measured(model: Any, network: str, seed: int, samples: list[Any]) -> list[dict[str, Any]]:
    from yolov9_fast.paper.neck_maps import LEVELS, focus, mean_focus, neck_maps

    found: dict[str, list[Any]] = {level: [] for level in LEVELS}
    for sample in samples:
        for level, values in zip(LEVELS, neck_maps(model, sample.image[None].float() / 255), strict=True):
            one = focus(values[0].numpy(), sample)
            if one is not None:
                found[level].append(one)
    return [
        {"network": network, "seed": seed, "level": level, **mean_focus(each)} for level, each in found.items() if each
    ]


def over_seeds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean, least and largest over the seeds."""
    result = []
    for key in dict.fromkeys((row["network"], row["level"]) for row in rows):
        same = [row for row in rows if (row["network"], row["level"]) == key]
        one: dict[str, Any] = {"network": key[0], "level": key[1], "seeds": len(same)}
        for name in ("concentration", "auc", "separation"):
            values = [row[name] for row in same]
            one[name] = {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}
        result.append(one)
    return result


def table(numbers: dict[str, Any]) -> str:
    head = f"{'network':<22}{'level':>6}{'concentration in boxes':>30}{'AUC inside / outside':>28}"
    lines = [head]
    for row in numbers["over_seeds"]:
        texts = [
            f"{row[name]['mean']:.3f} ({row[name]['min']:.3f} to {row[name]['max']:.3f})"
            for name in ("concentration", "auc")
        ]
        lines.append(f"{TITLES[row['network']]:<22}{row['level']:>6}{texts[0]:>30}{texts[1]:>28}")
    return "\n".join(lines)


def draw(sample: Any, maps: dict[str, list[Any]], out: Path) -> None:
    """The picture with its boxes, and a row of P3, P4, P5 per network, each map in its own range."""
    from yolov9_fast.paper.neck_maps import LEVELS, content, focus

    left, top, right, bottom = content(sample)
    canvas = sample.image.shape[1:]
    picture = sample.image.permute(1, 2, 0).numpy()

    def boxes(axes: Any, scale: tuple[float, float], offset: float, colour: str) -> None:
        rectangle = require("matplotlib.patches").Rectangle
        for cx, cy, w, h in sample.targets[:, 1:].tolist():
            corner = ((cx - w / 2) * scale[0] + offset, (cy - h / 2) * scale[1] + offset)
            axes.add_patch(rectangle(corner, w * scale[0], h * scale[1], fill=False, edgecolor=colour, linewidth=1.0))

    def paint(figure: Any) -> None:
        grid = figure.subplots(len(maps), 1 + len(LEVELS), squeeze=False)
        for axes in grid.flat:
            axes.set(xticks=[], yticks=[])
            axes.grid(False)
            axes.set_frame_on(False)
        grid[0][0].imshow(picture[top:bottom, left:right], extent=(left, right, bottom, top))
        boxes(grid[0][0], (canvas[1], canvas[0]), 0.0, "white")
        grid[0][0].set_title("picture")
        for axes in grid[1:, 0]:
            axes.set_visible(False)
        for axes_row, (network, values) in zip(grid, maps.items(), strict=True):
            axes_row[1].set_ylabel(TITLES[network], fontweight="bold")
            for axes, level, each in zip(axes_row[1:], LEVELS, values, strict=True):
                height, width = each.shape
                axes.imshow(each, cmap="viridis", interpolation="nearest")
                across, down = width / canvas[1], height / canvas[0]
                axes.set_xlim(left * across - 0.5, right * across - 0.5)
                axes.set_ylim(bottom * down - 0.5, top * down - 0.5)
                boxes(axes, (width, height), -0.5, "white")
                found = focus(each, sample)
                if found is not None:
                    axes.set_xlabel(f"concentration {found.concentration:.2f}   AUC {found.auc:.2f}", fontsize=8)
                if network == next(iter(maps)):
                    axes.set_title(f"{level}, {height} × {width}")

    ratio = (bottom - top) / (right - left)
    save_figure(out, (2.6 * (1 + len(LEVELS)), len(maps) * (2.6 * ratio + 0.2) + 0.3), paint)
