"""Measures one source tree on request: a process per tree that reads commands line by line, so that trees take turns.

Started by its path, with the tree's folder as argument. Operators, kernels, networks and the benchmark's cases are
those of that tree: a case calls what its tree has. This file and `compare.py` decide when and how often.

`worker.py TREE MODULE:FUNCTION WORDS` calls a function of that tree with words instead; its result is the exit code.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


class TreeFinder:
    """Finds `yolov9_fast` in a given tree before anything that is installed."""

    def __init__(self, tree: Path) -> None:
        self.folders = {
            "yolov9_fast": tree / "yolov9_fast",
            "yolov9_fast.kernels": tree / "kernels",
            "yolov9_fast.bench": tree / "bench",
        }

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        folder = self.folders.get(name)
        if folder is None:
            return None
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


class Worker:
    """Answers commands; at most one case is open at a time."""

    def __init__(self) -> None:
        import torch
        from yolov9_fast.bench import measure, suite
        from yolov9_fast.bench.cases import Settings

        self._torch, self._measure, self._suite, self._settings_type = torch, measure, suite, Settings
        self._cases: dict[str, Any] = {}
        self._candidates: dict[str, Any] = {}
        self._device = torch.device("cpu")

    def list(self, *, only: list[str], match: str, full: bool, batch: int, device: str, threads: int) -> list[str]:
        """Names of the cases."""
        self._torch.set_num_threads(threads)
        if threads == 1 and hasattr(os, "sched_setaffinity"):
            # Both trees on one core: whatever else runs there slows both down.
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        self._device = self._torch.device(device)
        self._settings = self._settings_type(full=full, batch=batch, peers=False)
        cases = self._suite.all_cases(self._settings, self._device, only)
        self._cases = {case.name: case for case in cases if match in case.name and case.family not in ("places",)}
        return list(self._cases)

    def open(self, *, case: str) -> dict[str, Any]:
        """Prepare a case; for each `provider layout` the repeats of one sample, and what cannot be measured."""
        self._candidates = {}
        opened = self._cases[case].open(self._device, self._settings)
        reasons = {}
        for outcome in self._measure.judged(opened):
            if isinstance(outcome, dict):
                reasons[f"{outcome['provider']} {outcome['layout']}"] = outcome["reason"]
            else:
                self._candidates[f"{outcome.runner.provider} {outcome.runner.layout}"] = outcome
        self._phased = self._cases[case].family in self._measure.PHASED
        self._measure.calibrate(list(self._candidates.values()), self._phased, self._device, self._settings)
        return {
            "repeats": {key: self._longer(one.repeats) for key, one in self._candidates.items()},
            "reasons": reasons,
        }

    def _longer(self, repeats: int) -> int:
        """Samples of several milliseconds: here each begins on caches that the other process has used."""
        return repeats if self._phased or repeats == 1 else 5 * repeats

    def sample(self, *, key: str, repeats: int) -> float:
        """Seconds of one sample, after a call that brings the caches back from the other process.

        With one thread on the CPU they are seconds of the processor, which other processes disturb least.
        """
        candidate = self._candidates[key]
        if not self._phased:
            candidate.runner.call(self._measure.NoClock())
        if self._device.type == "cpu" and self._torch.get_num_threads() == 1:
            clock = self._measure.NoClock()
            begin = time.process_time()
            for _ in range(repeats):
                candidate.runner.call(clock)
            return (time.process_time() - begin) / repeats
        candidate.repeats = repeats
        candidate.samples.clear()
        self._measure.sample(candidate, self._phased, self._device)
        return float(candidate.samples[-1])

    def close(self) -> None:
        self._candidates = {}


def serve(make: Callable[[], Any]) -> int:
    """Answer commands from standard input, one line of JSON each, by methods of what `make` gives, until it ends."""
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    begin = time.perf_counter()
    try:
        worker = make()
    except Exception as error:
        answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        answers.flush()
        return 1
    answers.write(json.dumps({"value": {"ready": time.perf_counter() - begin}}) + "\n")
    answers.flush()
    for line in sys.stdin:
        request = json.loads(line)
        name = request.pop("command")
        try:
            value = getattr(worker, name)(**request)
            answers.write(json.dumps({"value": value}) + "\n")
        except Exception as error:
            answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        answers.flush()
    return 0


def main() -> int:
    sys.meta_path.insert(0, TreeFinder(Path(sys.argv[1]).resolve()))
    if len(sys.argv) == 2:
        return serve(Worker)
    module, _, name = sys.argv[2].partition(":")
    return int(getattr(importlib.import_module(module), name)(sys.argv[3:]))


if __name__ == "__main__":
    sys.exit(main())
