"""`yolov9-fast val`: COCO AP of weights on a labelled split, with tables, plots and the detections as JSON."""

from __future__ import annotations

import argparse

from yolov9_fast._capture import MODES
from yolov9_fast.cli.output import say
from yolov9_fast.engine.config import AMP_MODES
from yolov9_fast.engine.evaluation import EvaluationOptions, evaluate

WHEN_BUSY = "waits"
"""See `engine.share_cores`."""
_EPILOG = """examples:
  yolov9-fast val --weights best.safetensors --data my.yaml
  yolov9-fast val --weights yolov9-c.pt --data coco.yaml --split val --batch 16 --device 0

The defaults are the published settings: 640 px, confidence 0.001, IoU 0.7, 300 detections per image.
Files in PROJECT/NAME: predictions.json (COCO results), metrics.json, per_class.txt, curves and confusion matrix."""


def configure(parser: argparse.ArgumentParser) -> None:
    default = EvaluationOptions
    parser.epilog = _EPILOG
    add = parser.add_argument
    add("--weights", required=True, metavar="FILE", help="weights of this project, or a foreign checkpoint")
    add("--data", required=True, metavar="FILE.yaml", help="data file")
    add("--split", default=default.split, choices=("val", "test", "train"), help="default %(default)s")
    add("--imgsz", type=int, default=default.imgsz, metavar="N", help="image size in pixels (default %(default)s)")
    add("--batch", type=int, default=default.batch, metavar="N", help="images per step (default %(default)s)")
    add("--conf", type=float, default=default.conf, metavar="X", help="lowest confidence (default %(default)s)")
    add("--iou", type=float, default=default.iou, metavar="X", help="IoU threshold of NMS (default %(default)s)")
    add("--max-det", type=int, default=default.max_det, metavar="N", help="detections per image (default %(default)s)")
    add(
        "--rect",
        action=argparse.BooleanOptionalAction,
        default=default.rect,
        help="batches of images of similar shape with little padding, instead of squares (default off)",
    )
    add("--amp", choices=AMP_MODES, default=default.amp, help="mixed precision (default %(default)s)")
    add("--device", default=None, help="cpu or a GPU's number (default: a GPU if there is one)")
    add("--deterministic", action="store_true", help="the same bits in every run, also on a GPU; slower there")
    add("--capture", choices=MODES, default="auto", help="CUDA graphs for shapes that repeat (default %(default)s)")
    add("--workers", type=int, default=None, metavar="N", help="loader processes (default: by the number of cores)")
    add("--plots", action=argparse.BooleanOptionalAction, default=default.plots, help="draw plots (default on)")
    add("--project", default=default.project, metavar="DIR", help="folder of runs (default %(default)s)")
    add("--name", default=default.name, help="name of this run (default %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    values = {key: value for key, value in vars(arguments).items() if key not in ("command", "debug", "imports")}
    result, folder = evaluate(EvaluationOptions(**values))
    assert result.metrics is not None
    say(result.metrics.table())
    per_image = {name: 1000 * seconds / max(result.images, 1) for name, seconds in result.seconds.items()}
    say("ms per image: " + ", ".join(f"{name} {value:.1f}" for name, value in per_image.items()))
    say(f"results in {folder}")
    return 0
