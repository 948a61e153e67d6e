"""`yolov9-fast demo`: renders a data set, trains a yolov9-t with PGI on it from scratch, evaluates and predicts."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import shutil
import time
from pathlib import Path

from yolov9_fast._untrusted import user_path
from yolov9_fast.atomic import atomic_write
from yolov9_fast.cli.output import say
from yolov9_fast.cli.predict import predict_all
from yolov9_fast.data import AugmentConfig, open_source
from yolov9_fast.data.rendered import MOST_OBJECTS, SHAPES, render_dataset
from yolov9_fast.engine.config import TrainConfig
from yolov9_fast.engine.evaluation import EvaluationOptions, evaluate
from yolov9_fast.engine.prediction_files import PredictionFiles
from yolov9_fast.engine.predictor import Predictor
from yolov9_fast.engine.trainer import Trainer
from yolov9_fast.engine.validator import ValidationResult
from yolov9_fast.errors import UserError

log = logging.getLogger("yolov9_fast.demo")

TRAIN_IMAGES = 384
VAL_IMAGES = 64
EPOCHS = 15
PASSING_AP50 = 0.5
_MARKER = ".yolov9_fast_demo"
_SHOWN_IMAGES = 8
WHEN_BUSY = "threads"
"""See `engine.share_cores`: nobody compares the bits of two demos."""
_EPILOG = """examples:
  yolov9-fast demo
  yolov9-fast demo --device 0 --project runs/demo_gpu

Files in the folder: report.md, the data set, the training run, the evaluation and the annotated images. An
earlier demo in the same folder is replaced. The exit code is 1 if AP50 is below 0.5."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    add = parser.add_argument
    add("--epochs", type=int, default=EPOCHS, metavar="N", help="epochs (default %(default)s)")
    add("--imgsz", type=int, default=128, metavar="N", help="image size in pixels (default %(default)s)")
    add("--device", help="cpu or a GPU's number (default: a GPU if there is one)")
    add("--project", default="runs/demo", metavar="DIR", help="folder of the demo (default %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="seed of data, weights and order (default %(default)s)")


def demo_config(data: Path, folder: Path, *, epochs: int, imgsz: int, seed: int, device: str | None) -> TrainConfig:
    """A recipe for a few minutes: a step per batch, AdamW, little augmentation, no mosaic in the last third."""
    return TrainConfig(
        model="yolov9-t",
        data=str(data),
        epochs=epochs,
        imgsz=imgsz,
        batch=8,
        nominal_batch=8,
        optimizer="adamw",
        lr0=0.002,
        lrf=0.02,
        schedule="cosine",
        weight_decay=0.01,
        cls=1.5,  # boxes are learned long before classes
        warmup_epochs=2.0,
        warmup_bias_lr=0.002,
        patience=0,
        close_mosaic=epochs // 3,
        cache="ram",
        seed=seed,
        device=device,
        project=str(folder),
        name="train",
        augment=AugmentConfig(hsv_s=0.3, hsv_v=0.3, scale=0.2, mosaic=0.15, mixup=0.0, copy_paste=0.0, flipud=0.5),
    )


def run(arguments: argparse.Namespace) -> int:
    for name in ("epochs", "imgsz"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name}: expected at least 1, got {getattr(arguments, name)}")
    started = time.perf_counter()
    folder = fresh_folder(user_path(arguments.project, "--project", UserError))
    data = render_dataset(
        folder / "data", train=TRAIN_IMAGES, val=VAL_IMAGES, size=arguments.imgsz, seed=arguments.seed
    )
    log.info(f"rendered {TRAIN_IMAGES} + {VAL_IMAGES} images of {', '.join(SHAPES)} into {folder / 'data'}")
    config = demo_config(
        data,
        folder,
        epochs=arguments.epochs,
        imgsz=arguments.imgsz,
        seed=arguments.seed,
        device=arguments.device,
    )
    trainer = Trainer(config)
    trainer.run()
    trained = time.perf_counter() - started
    weights = trainer.run_folder.best
    result, _ = evaluate(
        EvaluationOptions(
            weights, data, imgsz=config.imgsz, device=arguments.device, workers=0, project=folder, name="val"
        )
    )
    _predict(weights, data.parent / "images" / "val", folder / "predict", config)
    atomic_write(folder / "report.md", report(config, result, trained, time.perf_counter() - started))
    assert result.metrics is not None
    ap50 = result.metrics.ap50
    say(f"report, images and weights in {folder}")
    say(f"AP50 {ap50:.4f}")
    if not ap50 >= PASSING_AP50:
        log.error("AP50 is below %.2f: this installation does not train correctly", PASSING_AP50)
        return 1
    return 0


def fresh_folder(folder: Path) -> Path:
    """Make an empty folder with the demo's marker file; an earlier demo is removed, any other content refused.

    Raises:
        UserError: the folder has content that is not a demo's, or cannot be created.
    """
    marker = folder / _MARKER
    try:
        if folder.exists() and any(folder.iterdir()):
            if not marker.is_file():
                raise UserError(f"--project: expected a new folder or that of an earlier demo, got {folder}")
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        marker.write_text("made by yolov9-fast demo, which may replace this folder\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot create {folder}: {error.strerror}") from error
    return folder


def _predict(weights: Path, images: Path, folder: Path, config: TrainConfig) -> None:
    predictor = Predictor(weights, config.imgsz, device=config.device)
    files = PredictionFiles(folder, text=True, json=True)
    number, *_ = predict_all(predictor, open_source(images), files, verbose=False)
    log.info(f"{number} annotated images in {folder}")


def report(config: TrainConfig, result: ValidationResult, trained: float, total: float) -> str:
    """The demo's report as Markdown; paths are relative to its folder."""
    assert result.metrics is not None
    metrics = result.metrics
    shown = "\n".join(f"![{n:04d}](predict/{n:04d}.jpg)" for n in range(_SHOWN_IMAGES))
    options = dataclasses.asdict(config)
    names = ("model", "epochs", "imgsz", "batch", "optimizer", "lr0", "schedule", "seed")
    settings = "\n".join(f"| {name} | {options[name]} |" for name in names)
    return f"""# Demo: yolov9-t with PGI on rendered shapes

**AP50 {metrics.ap50:.4f}, AP {metrics.ap:.4f}** on {result.images} images, after {trained:.0f} s of training
({total:.0f} s in all).

| setting | |
| --- | --- |
{settings}

Data: {TRAIN_IMAGES} images to train, {VAL_IMAGES} to evaluate, up to {MOST_OBJECTS} overlapping objects each, of
{", ".join(SHAPES)}; drawn by program from the seed, in [data](data/).

## Per class

```
{metrics.table()}
```

## Predictions

{shown}

All images in [predict](predict/), as text in [predict/labels](predict/labels/) and
[predict/predictions.json](predict/predictions.json).

## Training

![losses and AP over the epochs](train/results.png)
![precision and recall](val/PR_curve.png)
![confusion matrix](val/confusion_matrix.png)
![first batch as the network sees it](train/train_batch0.jpg)

Weights: [train/weights/best.safetensors](train/weights/best.safetensors); every epoch:
[train/results.csv](train/results.csv); all options: [train/config.yaml](train/config.yaml).
"""
