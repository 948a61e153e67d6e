"""Other people's packages in a process: what they import works, and their own commands can be run.

The torchvision of PyPI is built for a torch with CUDA: beside a CPU build its compiled half cannot be loaded, and
importing it fails at the first operator that it looks for. Here its two NMS operators are declared before, and `nms` is
computed by this library's exact greedy one; all else that these packages use of torchvision is Python.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.metadata
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def repair_torchvision() -> None:
    """Import torchvision, with `declare_operators` where its compiled half was built for another torch."""
    spec = importlib.machinery.PathFinder.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return  # whoever needs it says so
    library = next(Path(spec.origin).parent.glob("_C*"), None)
    try:
        torch.ops.load_library(str(library))
    except OSError:
        declare_operators()
        # Without its compiled half it refuses even operators that are there.
        vars(importlib.import_module("torchvision.extension"))["_has_ops"] = lambda: True


def declare_operators() -> None:
    """`torchvision::nms` by this library, and the schema of `torchvision::qnms`, which nothing here calls."""
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", _SCHEMA)
    torch.library.impl("torchvision::nms", "CPU", _nms)


def _nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    import yolov9_fast as yf

    return yf.accelerate_nms().nms(dets, scores, iou_threshold)


def prepare() -> None:
    """Before the first import of a peer: torchvision as above, and no files of theirs in the user's home."""
    os.environ.setdefault("YOLO_CONFIG_DIR", os.path.join(os.environ.get("TMPDIR", "/tmp"), "yolov9-fast-peers"))
    os.environ.setdefault("YOLO_OFFLINE", "1")
    os.environ.setdefault("MPLBACKEND", "Agg")
    # Their checkpoints are pickles that they wrote themselves a moment ago.
    os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    repair_torchvision()


def version(distribution: str) -> str:
    """`NAME VERSION` of an installed distribution; raises `PackageNotFoundError`."""
    return f"{distribution} {importlib.metadata.version(distribution)}"


def main(words: Sequence[str]) -> int:
    """Run a console script next to the interpreter, or a module, with words, as the command line would."""
    prepare()
    name, *rest = words
    script = Path(sys.executable).with_name(name)
    sys.argv = [str(script) if script.is_file() else name, *rest]
    if script.is_file():
        runpy.run_path(str(script), run_name="__main__")
    else:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    return 0
