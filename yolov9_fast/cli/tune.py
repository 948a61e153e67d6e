"""`yolov9-fast tune`: measure the Triton kernels' tiles on this GPU and keep the fastest as its record."""

from __future__ import annotations

import argparse
import json

from yolov9_fast._untrusted import user_path
from yolov9_fast.atomic import atomic_write
from yolov9_fast.cli.output import say
from yolov9_fast.errors import UserError

_EPILOG = """examples:
  yolov9-fast tune                       writes the record of this GPU next to the package's defaults
  yolov9-fast tune --out my_records      then set YOLOV9_FAST_TUNING=my_records"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("--out", metavar="DIR", help="folder of the record (default: that of the installed kernels)")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="timings of a tile (default %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    import torch

    from yolov9_fast.ops import _probe
    from yolov9_fast.ops._backend import backends

    if reason := backends["triton"].why_not():
        raise UserError(f"tune: {reason}")
    if not torch.cuda.is_available():
        raise UserError("tune: expected a GPU, torch sees none; without a record the default tiles are used")
    if arguments.repeats < 1:
        raise UserError(f"--repeats: expected at least 1, got {arguments.repeats}")
    if reason := _probe.tried("triton", torch.cuda.current_device()):
        raise UserError(f"tune: triton cannot run on this GPU: {reason}")
    from yolov9_fast.kernels.config import FOLDER, slug
    from yolov9_fast.kernels.tune import tune

    record = tune(arguments.repeats, print)
    folder = user_path(arguments.out, "--out", UserError) if arguments.out else FOLDER
    path = atomic_write(folder / f"{slug(record['device'])}.json", json.dumps(record, indent=2) + "\n")
    say(f"wrote {path}")
    return 0
