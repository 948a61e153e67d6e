"""Find objects in images, folders or videos: `python examples/predict.py best.safetensors pictures/`."""

from __future__ import annotations

import argparse

import yolov9_fast as yf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights")
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--conf", type=float, default=0.25)
    options = parser.parse_args()
    predictor = yf.Predictor(options.weights, conf=options.conf)
    for found in predictor(options.sources):
        print(found.path, found.counts())
        for x1, y1, x2, y2, score, label in found.boxes:
            print(f"  {found.names[int(label)]} {score:.2f} at ({x1:.0f}, {y1:.0f}), ({x2:.0f}, {y2:.0f})")


if __name__ == "__main__":
    main()
