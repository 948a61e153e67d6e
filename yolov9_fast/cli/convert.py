"""`yolov9-fast convert`: weights of any known origin become ours, if wanted without auxiliary branch or fused."""

from __future__ import annotations

import argparse

from yolov9_fast._untrusted import user_path
from yolov9_fast.cli.output import say
from yolov9_fast.errors import UserError
from yolov9_fast.models import convert, suggest_architecture

_EPILOG = """examples:
  yolov9-fast convert yolov9-c.pt yolov9-c.safetensors                    whole, to train on from
  yolov9-fast convert yolov9-c.pt gelan-c.safetensors --deploy --fuse     smallest, to predict with

Known origins: WongKinYiu/yolov9, MultimediaTechLab/YOLO and Ultralytics, whole pickled modules included; .npz and
.safetensors. Nothing in the file is executed. One that fits no network is refused with the first key that differs."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("source", metavar="SRC", help="weights of any known origin")
    parser.add_argument("target", metavar="DST", help="file to write, ends in .safetensors")
    parser.add_argument("--deploy", action="store_true", help="drop the auxiliary branch (yolov9-X becomes gelan-X)")
    parser.add_argument("--fuse", action="store_true", help="fold BatchNorm and RepConv into the convolutions")


def run(arguments: argparse.Namespace) -> int:
    target = user_path(arguments.target, "DST", UserError)
    layout = suggest_architecture(arguments.source)
    say(f"{arguments.source}: {layout.source}, {layout}")
    model = convert(arguments.source, target, deploy=arguments.deploy, fuse=arguments.fuse)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = target.stat().st_size / 1e6
    form = "fused" if model.is_fused else "not fused"
    say(f"{arguments.target}: {model.graph_name}, {form}, {parameters:,} parameters, {size:.1f} MB")
    return 0
