"""Where a figure and the numbers behind it go, and how they are written."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from yolov9_fast._untrusted import read_json, user_path
from yolov9_fast.atomic import atomic_write
from yolov9_fast.errors import UserError

SUFFIXES = (".png", ".svg", ".pdf", ".jpg")


def add_out(parser: argparse.ArgumentParser, name: str, companions: str) -> None:
    """`--out`, by default runs/paper/NAME.png; `companions` names the files written with it."""
    parser.add_argument(
        "--out",
        default=f"runs/paper/{name}.png",
        metavar="FILE",
        help=f"the figure: {', '.join(s.lstrip('.') for s in SUFFIXES)} by suffix (default %(default)s); "
        f"next to it {companions}",
    )


def figure_path(text: str) -> Path:
    """`--out` as a path; `UserError` for a suffix that no figure can have."""
    path = user_path(text, "--out", UserError)
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"--out must end in {', '.join(SUFFIXES)}, got {text}")
    return path


def write_numbers(path: Path, numbers: dict[str, Any]) -> Path:
    return atomic_write(path, json.dumps(numbers, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_numbers(path: Path) -> dict[str, Any]:
    """What `write_numbers` wrote; `UserError` where the file holds something else."""
    numbers = read_json(path, "numbers of a figure", UserError)
    if not isinstance(numbers, dict):
        raise UserError(f"{path} does not hold the numbers of a figure")
    return numbers
