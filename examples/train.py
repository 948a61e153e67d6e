"""Train on your own images: `python examples/train.py my.yaml`; without a data file on rendered shapes."""

from __future__ import annotations

import argparse
import tempfile

from yolov9_fast.data.rendered import render_dataset
from yolov9_fast.engine.config import TrainConfig
from yolov9_fast.engine.trainer import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="?", help="data file, see README.md")
    parser.add_argument("--model", default="yolov9-t")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--imgsz", type=int, default=160)
    parser.add_argument("--project", default="runs/examples")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or str(render_dataset(folder, train=32, val=8, size=options.imgsz))
        config = TrainConfig(
            data=data,
            model=options.model,
            epochs=options.epochs,
            imgsz=options.imgsz,
            batch=8,
            nominal_batch=8,  # one optimiser step per batch; the published 64 suits large data sets
            project=options.project,
        )
        result = train(config)
    if result is not None and result.metrics is not None:
        print(f"AP {result.metrics.ap:.3f}, AP50 {result.metrics.ap50:.3f}")


if __name__ == "__main__":
    main()
