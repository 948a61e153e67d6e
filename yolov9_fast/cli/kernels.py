"""`yolov9-fast kernels`: compile the Triton kernels ahead of time and report registers, spills and memory accesses."""

from __future__ import annotations

import argparse
import importlib.util
import os

from yolov9_fast.errors import UserError

_EPILOG = """examples:
  yolov9-fast kernels                    what most layers of a network choose, for sm_80, sm_90 and sm_100
  yolov9-fast kernels --all --arch 90    every variant that the launchers can choose, for one architecture
  yolov9-fast kernels --kernel bn_silu

needs no GPU; exit code 1 when a variant spills, needs too much shared memory or moves less than 16 bytes at once"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("--all", action="store_true", help="every variant, not only what most layers choose (long)")
    parser.add_argument("--arch", type=int, action="append", choices=(80, 90, 100), help="default: all of them")
    parser.add_argument("--kernel", metavar="TEXT", default="", help="only kernels whose name contains this")


def run(arguments: argparse.Namespace) -> int:
    if importlib.util.find_spec("triton") is None:
        raise UserError("kernels: triton is not installed: pip install triton")
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise UserError("kernels: TRITON_INTERPRET=1 interprets kernels instead of compiling them; unset it")
    from yolov9_fast.kernels import aot

    code: int = aot.run(arguments)
    return code
