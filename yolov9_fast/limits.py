"""How much a file may ask for: sizes, counts and depths that are checked before work is done and memory is taken.

Each limit is far above what real data need. The environment variable `YOLOV9_FAST_MAX_NAME` raises the limit `NAME`.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from yolov9_fast.errors import UserError


class Limit(NamedTuple):
    """A default, its unit, and what it bounds."""

    default: int
    unit: str
    meaning: str


LIMITS = {
    "YAML_BYTES": Limit(4 << 20, "bytes", "a data, graph or options file in YAML"),
    "YAML_NODES": Limit(1_000_000, "values", "values of a YAML file, aliases expanded"),
    "NESTING": Limit(50, "levels", "lists and mappings within one another in YAML"),
    "JSON_BYTES": Limit(2 << 30, "bytes", "a JSON file, such as COCO annotations"),
    "OUTLINE_POINTS": Limit(100_000, "points", "the outline of one object in COCO annotations, of at most 1/100 parts"),
    "IMAGE_OBJECTS": Limit(100_000, "objects", "the objects of one image"),
    "LABEL_BYTES": Limit(16 << 20, "bytes", "the label file of one image"),
    "LABEL_ROWS": Limit(100_000, "rows", "the label file of one image"),
    "LIST_BYTES": Limit(512 << 20, "bytes", "a list of images"),
    "LIST_LINES": Limit(3_000_000, "lines", "a list of images"),
    "IMAGE_BYTES": Limit(1 << 30, "bytes", "an image file"),
    "IMAGE_PIXELS": Limit(1 << 28, "pixels", "an image, decoded"),
    "CHECKPOINT_BYTES": Limit(8 << 30, "bytes", "a file of weights, or the state of a run"),
    "PICKLE_BYTES": Limit(64 << 20, "bytes", "the pickle inside a checkpoint, its numbers not counted"),
    "PICKLE_STEPS": Limit(2_000_000, "steps", "instructions of such a pickle, and elements that they copy"),
    "TENSORS": Limit(100_000, "tensors", "a file of weights"),
    "MODULES": Limit(20_000, "modules", "a network while it is built"),
    "PARAMETERS": Limit(1 << 30, "parameters", "a network while it is built"),
    "LAYERS": Limit(1000, "layers", "a graph, in YAML or inside a file of weights"),
    "TABLE_BYTES": Limit(64 << 20, "bytes", "the results.csv of a run"),
    "CLASSES": Limit(100_000, "classes", "class names of a data file or of weights"),
    "CLASS_NAME": Limit(1000, "characters", "the name of one class"),
    "WORKERS": Limit(512, "processes", "loader processes of one process of a run"),
    "SILENT_SECONDS": Limit(60, "seconds", "without a sign of life of a process of the run"),
}


def limit(name: str) -> int:
    """The value of a limit: its environment variable or the default; raises `UserError` if that is no number."""
    variable = f"YOLOV9_FAST_MAX_{name}"
    text = os.environ.get(variable)
    if text is None:
        return LIMITS[name].default
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise UserError(f"{variable}: expected an integer of at least 1, got {text!r}")
    return value


def above_limit(name: str, found: int | None = None) -> str:
    """The end of an error message: what the limit is, what was found, and how to raise it."""
    got = "more" if found is None else f"{found:,}"
    return f"expected at most {limit(name):,} {LIMITS[name].unit}, got {got} (YOLOV9_FAST_MAX_{name} raises the limit)"
