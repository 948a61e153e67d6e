"""`yolov9-fast paper TARGET`: the tables and figures of the paper, rebuilt; each target has options of its own."""

from __future__ import annotations

import argparse
import importlib

from yolov9_fast.cli.output import add_shared_flags
from yolov9_fast.paper import TARGETS

WHEN_BUSY = "waits"
"""See `engine.share_cores`."""
_EPILOG = """examples:
  yolov9-fast paper tables --dry                                  parameters and GFLOPs next to the published ones
  yolov9-fast paper table5 --data my.yaml --epochs 30 --imgsz 320 --seeds 3
  yolov9-fast paper fig6 picture.jpg
  yolov9-fast paper fig1 --mine my-detector:7.2:27.0:47.1         your own result among the published ones"""


def configure(parser: argparse.ArgumentParser) -> None:
    """One sub-parser per target."""
    parser.epilog = _EPILOG
    targets = parser.add_subparsers(dest="target", metavar="TARGET", title="targets", required=True)
    for name, target in TARGETS.items():
        sub = targets.add_parser(
            name,
            help=target.text,
            description=target.text[0].upper() + target.text[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_shared_flags(sub)
        importlib.import_module(f"yolov9_fast.paper.{target.module}").configure(sub, name)


def run(arguments: argparse.Namespace) -> int:
    module = importlib.import_module(f"yolov9_fast.paper.{TARGETS[arguments.target].module}")
    return int(module.run(arguments))
