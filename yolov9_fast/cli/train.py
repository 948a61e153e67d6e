"""`yolov9-fast train`: every option of a run is a flag; a recipe file, resuming, and one process per device."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from yolov9_fast._untrusted import user_path
from yolov9_fast.data import AugmentConfig
from yolov9_fast.engine.config import (
    TrainConfig,
    option_fields,
    plain_type,
    read_config,
    read_options,
    with_absolute_paths,
)
from yolov9_fast.engine.device import device_numbers, parse_device, round_image_size
from yolov9_fast.engine.distributed import clear_endings, leave_process_group
from yolov9_fast.engine.run_files import RunFolder, find_run
from yolov9_fast.errors import UserError

_GROUPS = (
    ("the run", "model"),
    ("optimisation", "optimizer"),
    ("loss", "box"),
    ("data, validation, files", "close_mosaic"),
)
_MAY_CHANGE = frozenset({"device", "workers", "data", "project", "name"})
"""Options that a resumed run may have otherwise than when it began, or that only say where it is."""
_AUGMENT_HELP = {
    "hsv_h": "largest relative change of hue",
    "hsv_s": "largest relative change of saturation",
    "hsv_v": "largest relative change of brightness",
    "degrees": "largest rotation in degrees",
    "translate": "largest shift as a fraction of the side",
    "scale": "largest relative change of size, below 1",
    "shear": "largest shear in degrees",
    "perspective": "strength of the perspective map, at most 0.001",
    "flipud": "probability of a vertical flip",
    "fliplr": "probability of a horizontal flip",
    "mosaic": "probability of a mosaic of four images",
    "mixup": "probability of blending two mosaics",
    "copy_paste": "fraction of the objects with a polygon to paste a second time",
}
WHEN_BUSY = "waits"
"""See `engine.share_cores`."""
_EPILOG = """examples:
  yolov9-fast train --data my.yaml                                    yolov9-t from scratch, published recipe
  yolov9-fast train --data my.yaml --model yolov9-s --weights yolov9-s.pt --epochs 50
  yolov9-fast train --data my.yaml --config recipe.yaml --lr0 0.005   a recipe file; flags take precedence
  yolov9-fast train --data my.yaml --device 0,1 --batch 64            two GPUs
  yolov9-fast train --resume runs/train/exp                           continue after the last finished epoch
  yolov9-fast train --resume                                          the newest run in runs/train
  yolov9-fast train --resume runs/train/exp --data moved/my.yaml      the data is in another place
  torchrun --nproc-per-node 4 -m yolov9_fast train --data my.yaml     your own launcher

A recipe file is YAML with the same names (`config.yaml` of an earlier run is one)."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every field of `TrainConfig` and `AugmentConfig`; only flags that were given become attributes."""
    parser.epilog = _EPILOG
    parser.add_argument("--config", metavar="FILE.yaml", default=argparse.SUPPRESS, help="recipe file with options")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN_FOLDER",
        default=argparse.SUPPRESS,
        help="continue this run, or --project/--name, or the newest run of the project",
    )
    titles = {first: title for title, first in _GROUPS}
    group = parser.add_argument_group(_GROUPS[0][0])
    for field in option_fields():
        if field.name in titles:
            group = parser.add_argument_group(titles[field.name])
        _add_flag(group, TrainConfig, field, field.metadata["help"], field.metadata.get("choices"))
    group = parser.add_argument_group("augmentation")
    for field in dataclasses.fields(AugmentConfig):
        _add_flag(group, AugmentConfig, field, _AUGMENT_HELP.get(field.name, field.name.replace("_", " ")), None)


def _add_flag(group: Any, cls: type, field: dataclasses.Field[Any], text: str, choices: Iterable[str] | None) -> None:
    kind, _ = plain_type(cls, field.name)
    flag = "--" + field.name.replace("_", "-")
    if field.default not in (None, ""):
        text += f" (default {field.default})"
    options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
    if kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
    elif choices:
        group.add_argument(flag, choices=tuple(choices), **options)
    else:
        group.add_argument(flag, type=kind, metavar=kind.__name__.upper() if kind is not str else "TEXT", **options)


def run(arguments: argparse.Namespace) -> int:
    given = {key: value for key, value in vars(arguments).items() if key not in ("command", "debug", "imports")}
    resumed = _run_to_resume(given) if "resume" in given else None
    config = _unchanged_config(resumed, given) if resumed else config_from_flags(given)
    device = given.get("device", config.device)
    start_processes(device)
    from yolov9_fast.engine.trainer import Trainer

    with clear_endings():
        try:
            if resumed:
                trainer = Trainer.resume(
                    resumed.path.parent,
                    resumed.path.name,
                    device=given.get("device"),
                    workers=given.get("workers"),
                    data=given.get("data"),
                )
            else:
                trainer = Trainer(config)
            trainer.run()
        finally:
            leave_process_group()
    return 0


def config_from_flags(given: dict[str, Any]) -> TrainConfig:
    """The options of a new run: defaults, then the recipe file, then the flags in `given`.

    Raises:
        UserError: a recipe that cannot be read, or a value that no run can use.
    """
    config = read_config(_recipe(given)) if "config" in given else TrainConfig()
    config = _replaced(config, {key: value for key, value in given.items() if key not in ("config", "resume")})
    config.require_data()
    return config


def _recipe(given: dict[str, Any]) -> Path:
    return user_path(given["config"], "--config", UserError)


def _run_to_resume(given: dict[str, Any]) -> RunFolder:
    """The run that `--resume` selects."""
    folder = given["resume"]
    if folder:
        path = user_path(folder, "--resume", UserError)
        if not os.path.isdir(path):
            raise UserError(f"--resume: expected a run folder, got {folder}")
        path = path.resolve()
        return find_run(path.parent, path.name)
    return find_run(given.get("project", TrainConfig.project), given.get("name"))


def _unchanged_config(run: RunFolder, given: dict[str, Any]) -> TrainConfig:
    """The run's own options; other ones in the command line or its recipe file, but those that may change, are refused.

    The command that started the run is accepted: its options are compared as the run has stored them.
    """
    config = read_config(run.config)
    own = _flat(config)
    recipe = read_options(_recipe(given)) if "config" in given else {}
    wanted = {k: v for k, v in {**recipe, **given}.items() if k in own and k not in _MAY_CHANGE and v is not None}
    changed = _replaced(config, wanted)
    stored = _flat(with_absolute_paths(dataclasses.replace(changed, imgsz=round_image_size(changed.imgsz))))
    differing = [
        f"--{key.replace('_', '-')} {wanted[key]} (the run has {own[key]})"
        for key in sorted(wanted)
        if stored[key] != own[key]
    ]
    if differing:
        raise UserError(
            "--resume: expected the run's own options (only --device, --workers and --data may change), got "
            + ", ".join(differing)
        )
    return config


def _flat(config: TrainConfig) -> dict[str, Any]:
    return {**dataclasses.asdict(config), **dataclasses.asdict(config.augment)}


def _replaced(config: TrainConfig, options: dict[str, Any]) -> TrainConfig:
    """`config` with other options, also of the augmentation; raises `UserError` for a value that no run can use."""
    augmentation = {field.name for field in dataclasses.fields(AugmentConfig)}
    try:
        augment = dataclasses.replace(config.augment, **{k: v for k, v in options.items() if k in augmentation})
        return dataclasses.replace(
            config, augment=augment, **{k: v for k, v in options.items() if k not in augmentation}
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def start_processes(device: str | None) -> None:
    """If `device` names several GPUs and no launcher has started processes, replace this process by `torchrun`.

    Raises:
        UserError: a device that this machine does not have.
    """
    numbers = device_numbers(device)
    if len(numbers) < 2 or "WORLD_SIZE" in os.environ:
        return
    for number in numbers:
        parse_device(number)
    command = launch_command(sys.argv[1:], len(numbers))
    sys.stdout.flush()
    os.execv(command[0], command)


def launch_command(words: Sequence[str], processes: int) -> list[str]:
    """The command that runs `yolov9-fast WORDS` in `processes` processes on this machine."""
    launcher = [sys.executable, "-m", "yolov9_fast.engine.launch", "--standalone", f"--nproc-per-node={processes}"]
    return [*launcher, "-m", "yolov9_fast", *words]
