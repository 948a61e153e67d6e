"""What one CSP-ELAN block runs in Python: this package's function calls, functions and files, forward and backward.

    python bench/block_calls.py

It imports public names only, so that it also counts another checkout that is installed in the environment.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

import yolov9_fast
from yolov9_fast.nn import CSPELAN

PACKAGE = str(yolov9_fast.__path__[0])


def calls(function: Callable[[], Any]) -> tuple[Counter[tuple[str, str]], Any]:
    """How often each function of the package, as (file, name), is called; and the result of `function`."""
    counted: Counter[tuple[str, str]] = Counter()

    def profile(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            counted[frame.f_code.co_filename, frame.f_code.co_qualname] += 1

    sys.setprofile(profile)
    try:
        result = function()
    finally:
        sys.setprofile(None)
    return counted, result


def main() -> None:
    """Print one line for forward and one for backward."""
    block = CSPELAN(64, 64, 64, 32, 1).train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(2, 64, 16, 16).contiguous(memory_format=torch.channels_last).requires_grad_()
    for _ in range(3):
        block(x).sum().backward()
    forward, y = calls(lambda: block(x))
    backward, _ = calls(lambda: y.sum().backward())
    for name, counted in (("forward", forward), ("backward", backward)):
        print(f"{name}: {counted.total()} calls, {len(counted)} functions, {len({file for file, _ in counted})} files")


if __name__ == "__main__":
    main()
