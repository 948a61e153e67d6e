"""The guard without a clock: what a training step of yolov9-t does, counted and compared with a file in the repository.

Kernels, copies, allocations and their bytes, bytes saved for the backward, calls of this package's Python functions:
numbers that a busy machine does not change. They depend on the version of torch, so each version has its own entry; a
version without an entry is not checked. A commit that changes them updates the file: `yolov9-fast bench guard
--update`.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from yolov9_fast.atomic import atomic_write
from yolov9_fast.errors import UserError
from yolov9_fast.ops import _convs
from yolov9_fast.ops import _library as library

from . import counting, instructions
from .cases import NoClock
from .networks import TrainingStep

FILE = Path(__file__).with_name("counts.json")
NETWORK, IMAGE_SIZE, BATCH = "yolov9-t", 64, 2
SIDES = {"eager": ("nchw", "eager"), "fused": ("channels_last", "auto")}
PYTHON_NETWORKS = (NETWORK, "gelan-s")
"""Those whose steps' Python calls are counted."""
_BYTES_TOLERANCE = 1e-3
_CALLS_TOLERANCE = 1e-2
"""Where Triton is interpreted, operators ask for one backend more."""
UPDATE = "yolov9-fast bench guard --update"


@dataclass(frozen=True)
class Finding:
    """One number that is not what the file says."""

    where: str
    expected: int | None
    found: int | None

    def text(self) -> str:
        if self.expected is None:
            return f"{self.where}: {self.found}, and nothing is expected"
        if self.found is None:
            return f"{self.where}: nothing, expected {self.expected}"
        return f"{self.where}: {self.found}, expected {self.expected} ({self.found - self.expected:+d})"


def environment_key() -> str:
    """What the counts depend on: torch's version, whether the compiled operators run, and whether `convs` does."""
    version = ".".join(torch.__version__.split("+")[0].split(".")[:2])
    if library.loaded.get("cpu") is not None:
        return f"torch {version}, no compiled operators"
    return f"torch {version}, compiled{', AVX-512' if _convs.measured(torch.float32) else ''}"


def counts() -> dict[str, dict[str, Any]]:
    """The counts of this tree, by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {name: _counts(layout, backend) for name, (layout, backend) in SIDES.items()}
    finally:
        torch.set_num_threads(threads)


def _counts(layout: str, backend_name: str) -> dict[str, Any]:
    device = torch.device("cpu")
    steps = {
        name: TrainingStep(name, IMAGE_SIZE, BATCH, device, layout=layout, backend_name=backend_name)
        for name in PYTHON_NETWORKS
    }
    for step in (*steps.values(), *steps.values()):
        step(NoClock())
    calls = {
        f"python_calls of {name}": counting.python_calls(functools.partial(step, NoClock()))
        for name, step in steps.items()
    }
    step = steps[NETWORK]
    found = counting.count(lambda: step(NoClock()), device)
    saved = counting.saved_bytes(lambda: step.forward(NoClock()))
    return {**found.numbers(), **calls, "saved_bytes": saved, "by_kernel": found.by_kernel}


def check(path: Path = FILE) -> list[Finding] | None:
    """What differs from the file; None where the file has no entry for this environment."""
    expected = _load(path).get(environment_key())
    if expected is None:
        return None
    return differences(expected, counts())


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[Finding]:
    """Numbers that differ, kernels one by one only where their sum or the copies do."""
    findings = []
    for side in expected.keys() | found.keys():
        old, new = expected.get(side, {}), found.get(side, {})
        own = [
            Finding(f"{side} {name}", old.get(name), new.get(name))
            for name in sorted((old.keys() | new.keys()) - {"by_kernel"})
            if _differ(name, old.get(name), new.get(name))
        ]
        findings += own
        kernels, others = old.get("by_kernel", {}), new.get("by_kernel", {})
        findings += [
            Finding(f"{side} {name}", kernels.get(name, 0), others.get(name, 0))
            for name in sorted(kernels.keys() | others.keys())
            if kernels.get(name, 0) != others.get(name, 0)
        ]
    return findings


def _differ(name: str, old: int | None, new: int | None) -> bool:
    """Whether a number is worse or, but for Python calls, better than expected.

    Bytes by more than a thousandth: an anchor assigned otherwise by another processor's rounding changes some hundred.
    """
    if old is None or new is None:
        return old != new
    if name.startswith("python_calls"):
        return new > (1 + _CALLS_TOLERANCE) * old
    if not name.endswith("_bytes"):
        return old != new
    return abs(new - old) > _BYTES_TOLERANCE * old


def check_instructions(path: Path = FILE) -> list[Finding] | str:
    """Instructions of the C++ algorithms against the file (1 % apart at most), or why they cannot be counted."""
    found = instructions.count_all()
    if isinstance(found, str):
        return found
    key, numbers = found
    expected = _load(path).get("instructions", {}).get(key)
    if expected is None:
        return f"the file has no instruction counts for {key}"
    return [
        Finding(f"instructions of {name}", expected.get(name), numbers.get(name))
        for name in sorted(expected.keys() | numbers.keys())
        if abs(numbers.get(name, 0) - expected.get(name, 0)) > 0.01 * max(expected.get(name, 0), 1)
    ]


def update(path: Path = FILE) -> Path:
    """Write this tree's counts over those of the same environment; the others stay."""
    content = _load(path)
    content[environment_key()] = counts()
    found = instructions.count_all()
    if not isinstance(found, str):
        content.setdefault("instructions", {})[found[0]] = found[1]
    return atomic_write(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; write it anew with `{UPDATE}`") from error
    return content if isinstance(content, dict) else {}
