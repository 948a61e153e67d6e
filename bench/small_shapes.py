"""Every operator once, forward and backward, on its smallest shapes: what a memory checker can afford to watch.

python bench/small_shapes.py cuda|cpu
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
from yolov9_fast.bench.cases import Absent, Case, Settings
from yolov9_fast.bench.detection import detection_cases
from yolov9_fast.bench.operators import ENTRIES, operator_cases


def small_cases() -> list[Case]:
    """The smallest plane of each operator of yolov9-t, and scenes with few objects at 320 px."""
    settings = Settings(batch=1)
    chosen: dict[tuple[str, str], Case] = {}
    for case in operator_cases(settings, ("float32",)):
        key = (case.subject, case.mode)
        if key not in chosen or _size(case.shape) < _size(chosen[key].shape):
            chosen[key] = case
    scenes = [case for case in detection_cases(settings, ("float32",)) if case.shape.get("objects", 0) in (0, 7)]
    return [*chosen.values(), *scenes]


def _size(shape: dict[str, Any]) -> int:
    return int(shape["height"] * shape["width"])


def run(device: torch.device) -> int:
    """Run all of them; returns how many runs there were."""
    settings = replace(Settings(), batch=1, peers=False)
    done = 0
    for case in small_cases():
        for runner in case.open(device, settings).runners:
            if isinstance(runner, Absent) or runner.provider == "eager":
                continue
            runner.results()
            done += 1
            print(f"{case.name} {runner.provider} {runner.layout}", flush=True)
    return done


def main() -> int:
    device = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda")
    done = run(device)
    print(f"{done} runs of {len(ENTRIES)} operators and the detection scenes on {device}")
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
