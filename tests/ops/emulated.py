"""The block algorithms of CUDA kernels on the CPU, one thread at a time: `csrc/emulated/`, built only for tests."""

from __future__ import annotations

import fcntl
import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from csrc import build

ROOT = Path(__file__).resolve().parents[2]
NAME = "_C_emulated.so"


@functools.cache
def library() -> Path:
    """The library in YOLOV9_FAST_LIBRARY_FOLDER if it is there (a build with sanitizers), else in `build/emulated`.

    Compiles only what changed. Skips the calling test where nothing can be compiled.
    """
    folder = os.environ.get("YOLOV9_FAST_LIBRARY_FOLDER")
    if folder and Path(folder, NAME).exists():
        return Path(folder, NAME)
    output = ROOT / "build" / "emulated"
    output.mkdir(parents=True, exist_ok=True)
    with (output / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        part = build.build_emulated(ROOT / "csrc", output, output)
    if part.file is None:
        pytest.skip(f"no emulated operators: {part.reason}")
    return output / part.file


def operators() -> Any:
    """`torch.ops.yolov9_fast_emulated`: assign, decode, decode_for_assignment, detection_loss, nms and nms_boxes.

    The last arguments are the threads of a block and a seed of the order in which threads and blocks run (0:
    ascending); for nms and nms_boxes also whether buffers are so small that a few candidates fill them.
    """
    torch.ops.load_library(str(library()))
    return torch.ops.yolov9_fast_emulated
