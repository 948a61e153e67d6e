"""Memory of long runs: training over many epochs, prediction over many images and the frames of a long video.

    python -m tests.stress.memory --epochs 50 --images 5000 --frames 5000 --out memory.json

The resident memory of the process and of its loader processes is sampled while it works. It is flat if the median of
the last quarter of the samples exceeds that of the second quarter by at most 2 % (the first quarter fills caches).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.engine.conftest import TINY_GRAPH
from tests.stress.process import Command

MOST_GROWTH = 0.02
_MIB = 2**20


def resident(pid: int) -> int:
    """Bytes of resident memory of a process and its children; 0 if it has ended."""
    try:
        own = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, IndexError):
        return 0
    return own + sum(resident(int(child)) for child in children)


def sample(command: Command, working: Callable[[], bool]) -> list[int]:
    """Bytes of resident memory, every 20 ms while `working`, until the command has ended with success."""
    samples = []
    while command.poll() is None:
        if working():
            samples.append(resident(command.pid))
        time.sleep(0.02)
    if command.wait() != 0:
        raise SystemExit(command.errors())
    return [value for value in samples if value]


def summary(samples: list[int]) -> dict[str, Any]:
    """The medians of the four quarters of the samples in MiB, the growth from the second to the last, and the peak."""
    size = len(samples) // 4
    quarters = [statistics.median(samples[part * size : (part + 1) * size]) / _MIB for part in range(4)]
    growth = quarters[3] / quarters[1] - 1
    return {
        "samples": len(samples),
        "mib_by_quarter": [round(value, 1) for value in quarters],
        "peak_mib": round(max(samples) / _MIB, 1),
        "growth": round(growth, 4),
        "flat": growth <= MOST_GROWTH,
    }


class Workload:
    """A tiny data set, network, folder of images and video in `folder`."""

    def __init__(self, folder: Path) -> None:
        from yolov9_fast.data.rendered import render_dataset

        self.folder = folder
        self.data = render_dataset(folder / "data", train=16, val=4, size=96, seed=3)
        (folder / "tiny.yaml").write_text(TINY_GRAPH)

    def train(self, epochs: int) -> list[int]:
        run = self.folder / "train"
        options = (
            f"--epochs {epochs} --imgsz 64 --batch 8 --workers 1 --device cpu --class-tower 8 --no-plots --name train"
        )
        paths = ["--data", str(self.data), "--model", str(self.folder / "tiny.yaml"), "--project", str(self.folder)]

        def between_first_and_last_epoch() -> bool:
            try:
                rows = len((run / "results.csv").read_text().splitlines()) - 1
            except OSError:
                return False
            return 1 <= rows < epochs

        return sample(self._command("train", ["train", *paths, *options.split()]), between_first_and_last_epoch)

    def predict_images(self, images: int) -> list[int]:
        source, drawn = self.folder / "many", sorted((self.data.parent / "images").rglob("*.jpg"))
        source.mkdir()
        for number in range(images):
            os.link(drawn[number % len(drawn)], source / f"{number:05d}.jpg")
        samples = self._predict(source, "images")
        written = len(list((self.folder / "images" / "labels").iterdir()))
        if written != images:
            raise SystemExit(f"expected {images} label files, got {written}")
        return samples

    def predict_video(self, frames: int) -> list[int]:
        import cv2
        import numpy as np

        source, random = self.folder / "clip.avi", np.random.default_rng(0)
        writer = cv2.VideoWriter(str(source), cv2.VideoWriter.fourcc(*"MJPG"), 25.0, (96, 96))
        still = random.integers(0, 256, (96, 96, 3), dtype=np.uint8)
        for number in range(frames):
            writer.write(np.roll(still, number, axis=1))
        writer.release()
        samples = self._predict(source, "video")
        written = int(cv2.VideoCapture(str(self.folder / "video" / "clip.mp4")).get(cv2.CAP_PROP_FRAME_COUNT))
        if written != frames:
            raise SystemExit(f"expected {frames} frames, got {written}")
        return samples

    def _predict(self, source: Path, name: str) -> list[int]:
        weights = self.folder / "train" / "weights" / "last.safetensors"
        words = ["predict", "--weights", str(weights), "--source", str(source), "--imgsz", "64", "--device", "cpu"]
        command = self._command(
            name, [*words, "--conf", "0.01", "--save-txt", "--project", str(self.folder), "--name", name]
        )
        return sample(command, lambda: command.out.exists() and command.out.stat().st_size > 1000)

    def _command(self, name: str, words: list[str]) -> Command:
        return Command(words, self.folder / f"log-{name}", forked=False)


def measure(epochs: int, images: int, frames: int) -> dict[str, Any]:
    """Summaries of the three workloads; see `summary`."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        os.environ["YOLOV9_FAST_CACHE"] = f"{folder}/cache"
        workload = Workload(Path(folder))
        return {
            "training": {"epochs": epochs, **summary(workload.train(epochs))},
            "predict, images": {"images": images, **summary(workload.predict_images(images))},
            "predict, video": {"frames": frames, **summary(workload.predict_video(frames))},
            "most_growth": MOST_GROWTH,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cores": os.cpu_count(),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--frames", type=int, default=5000)
    parser.add_argument("--out", type=Path, help="write the result here")
    arguments = parser.parse_args()
    result = measure(arguments.epochs, arguments.images, arguments.frames)
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    return 0 if all(part["flat"] for part in result.values() if isinstance(part, dict)) else 1


if __name__ == "__main__":
    sys.exit(main())
