"""Memory and shared memory of the loader of a training run, with many processes.

    python -m tests.stress.loader --workers 8 --imgsz 640 --batch 16 --images 400 --out loader.json

Proportional memory (a page that several processes share counts once) of this process and the loader's, and what is
taken of /dev/shm, sampled while batches are made, from files and with images kept in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from yolov9_fast.data import AugmentConfig, DetectionDataset, create_loader, load_data_config, load_split
from yolov9_fast.data.rendered import render_dataset

_MIB = 2**20


def proportional(pid: int) -> int:
    """Bytes of memory of a process and its children, shared pages divided among them; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    own = sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return own + sum(proportional(int(child)) for child in children)


def shared_used() -> int:
    """Bytes in use of /dev/shm."""
    status = os.statvfs("/dev/shm")
    return (status.f_blocks - status.f_bfree) * status.f_frsize


class Peaks(threading.Thread):
    """The largest values while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.memory = self.shared = 0
        self._before = shared_used()
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.02):
            self.memory = max(self.memory, proportional(os.getpid()))
            self.shared = max(self.shared, shared_used() - self._before)

    def end(self) -> None:
        self._done.set()
        self.join()


def measure(data: Path, cache: Any, *, workers: int, size: int, batch: int, batches: int) -> dict[str, Any]:
    """Peaks of memory over so many batches, and the seconds until the first."""
    records = load_split(load_data_config(data), "train", for_training=True)[0]
    start, before = time.perf_counter(), proportional(os.getpid())
    dataset = DetectionDataset(records, image_size=size, augment=AugmentConfig(), cache=cache)
    loader = create_loader(dataset, batch_size=batch, workers=workers, shuffle=True)
    peaks = Peaks()
    peaks.start()
    first, made, epoch = 0.0, 0, 0
    while made < batches:
        loader.set_epoch(epoch)
        for _ in loader:
            made += 1
            first = first or time.perf_counter() - start
        epoch += 1
    seconds = time.perf_counter() - start
    peaks.end()
    loader.close()
    return {
        "cache": cache or "off",
        "images": len(records),
        "batches": made,
        "seconds": round(seconds, 1),
        "first_batch_seconds": round(first, 2),
        "before_mib": round(before / _MIB, 1),
        "peak_mib": round(peaks.memory / _MIB, 1),
        "shared_peak_mib": round(peaks.shared / _MIB, 1),
        "shared_bound_mib": round(loader.memory.largest / _MIB, 1),
        "loader": str(loader.memory),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--batches", type=int, default=50)
    parser.add_argument("--data", help="data file (default: rendered images)")
    parser.add_argument("--out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = (
            Path(options.data)
            if options.data
            else render_dataset(Path(folder), train=options.images, val=1, size=options.imgsz)
        )
        asked = {"workers": options.workers, "size": options.imgsz, "batch": options.batch, "batches": options.batches}
        report = {
            "machine": {"python": platform.python_version(), "cores": os.cpu_count(), "system": platform.platform()},
            "asked": asked,
            "runs": [measure(data, cache, **asked) for cache in (None, "ram")],
        }
    text = json.dumps(report, indent=1)
    print(text)
    if options.out:
        Path(options.out).write_text(text + "\n")


if __name__ == "__main__":
    main()
