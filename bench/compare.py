"""Two measurements compared: files of records, commits, or this tree against a commit, with a threshold of 5 %.

Commits are checked out into git worktrees of their own, compiled, and measured by one process each; the processes take
turns sample by sample, so that what disturbs the machine disturbs both. A difference counts when every repeat shows it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from yolov9_fast._untrusted import user_path
from yolov9_fast.errors import UserError

from . import machine
from .first import aligned
from .processes import ROOT, WorkerProcess
from .progress import progress
from .records import Record, measures, read
from .stats import THRESHOLD, Ratio, ratio_of_medians, settled, verdict

THIS_TREE = ("tree", ".")
REPEATS = 3
ROUNDS = 15
# Threads that wait by spinning would take the cores from the other process, whose turn it is. glibc keeps freed memory:
# otherwise page faults decide, and one allocation more can make everything after it faster.
_QUIET = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "KMP_BLOCKTIME": "0",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
}
_CHECKED_OUT = ("yolov9_fast", "kernels", "csrc", "bench")


@dataclass(frozen=True)
class Difference:
    """New against old for one case and provider: `ratio` of times (above 1: slower) and what it means."""

    case: str
    provider: str
    ratio: Ratio
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """All differences, and what only one side could measure."""

    old: str
    new: str
    differences: list[Difference]
    missing: list[str]

    @property
    def slower(self) -> list[Difference]:
        return [one for one in self.differences if one.verdict == "slower"]

    def text(self, threshold: float = THRESHOLD) -> str:
        """A table of what differs, then counts."""
        changed = [one for one in self.differences if one.verdict != "same"]
        rows = [["case", "provider", "new / old", ""]]
        rows += [[one.case, one.provider, one.ratio.text(), one.verdict] for one in changed]
        counts = {word: sum(one.verdict == word for one in self.differences) for word in ("slower", "faster", "same")}
        tail = f"{self.new} against {self.old}: " + ", ".join(f"{number} {word}" for word, number in counts.items())
        tail += f" (threshold {threshold:.0%}, every repeat has to show it)"
        if self.missing:
            tail += "\nmeasured on one side only: " + ", ".join(self.missing[:20])
        return "\n".join([*(aligned(rows) if changed else []), tail])


def compare_files(old: Path, new: Path, threshold: float = THRESHOLD) -> Comparison:
    """Records against records of the same device.

    A provider is compared by its time in units of the eager form in the same file, which takes out how fast the machine
    was on the day; the eager form itself is compared as it is.

    Raises:
        UserError: unreadable files, or of different devices.
    """
    before, after = read(old), read(new)
    devices = [_device(records) for records in (before, after)]
    if devices[0] != devices[1]:
        raise UserError(f"{old} is of {devices[0]}, {new} of {devices[1]}: only one device's records can be compared")
    first, second = measures(before), measures(after)
    differences = []
    for key in first.keys() & second.keys():
        if "samples" in first[key] and "samples" in second[key]:
            ratio = _ratio(key, first, second)
            differences.append(Difference(key[0], f"{key[1]} {key[2]}".strip(), ratio, verdict(ratio, threshold)))
    differences.sort(key=lambda one: -one.ratio.value)
    missing = [" ".join(key) for key in sorted(first.keys() ^ second.keys())]
    return Comparison(str(old), str(new), differences, missing)


def _device(records: Sequence[Record]) -> str:
    found = {r["environment"]["device"] for r in records if r["kind"] == "run" and "device" in r.get("environment", {})}
    return ", ".join(sorted(found)) or "unknown device"


def _ratio(key: tuple[str, str, str], first: dict[Any, Record], second: dict[Any, Record]) -> Ratio:
    own = ratio_of_medians(second[key]["samples"], first[key]["samples"])
    base = (key[0], "eager", key[2])
    if key[1] == "eager" or base not in first or base not in second:
        return own
    drift = ratio_of_medians(second[base]["samples"], first[base]["samples"], seed=1)
    # The widths of independent intervals add as squares, on the logarithm.
    low, high = (
        float(np.hypot(np.log(edge / own.value), np.log(other / drift.value)))
        for edge, other in ((own.low, drift.high), (own.high, drift.low))
    )
    value = own.value / drift.value
    return Ratio(value, value * float(np.exp(-low)), value * float(np.exp(high)))


def compare_trees(
    old: Path,
    new: Path,
    *,
    names: tuple[str, str] = ("old", "new"),
    only: Sequence[str] = ("ops", "loss", "nms"),
    match: str = "",
    full: bool = False,
    batch: int = 2,
    device: str = "cpu",
    rounds: int = ROUNDS,
    repeats: int = REPEATS,
    threshold: float = THRESHOLD,
    threads: int = 1,
) -> Comparison:
    """Two source trees, measured by turns. `rounds`: samples of a repeat; `repeats`: as often a difference must show.

    With one thread the processor's time is compared, else the wall clock's (use that on a machine that is idle).
    """
    options = {"only": list(only), "match": match, "full": full, "batch": batch, "device": device}
    options["threads"] = threads
    differences: list[Difference] = []
    missing: list[str] = []
    with WorkerProcess(old, environment=_QUIET) as first, WorkerProcess(new, environment=_QUIET) as second:
        cases = first.ask("list", **options)
        others = second.ask("list", **options)
        missing.extend(sorted(set(cases) ^ set(others)))
        for case in progress([case for case in cases if case in set(others)], str):
            opened = [one.ask("open", case=case) for one in (first, second)]
            for key, count in opened[0]["repeats"].items():
                if key not in opened[1]["repeats"]:
                    missing.append(f"{case} {key}: {opened[1]['reasons'].get(key, 'no such provider')}")
                    continue
                differences.append(_turns(first, second, case, key, count, rounds, repeats, threshold))
            missing.extend(
                f"{case} {key}: {opened[0]['reasons'].get(key, 'no such provider')}"
                for key in opened[1]["repeats"].keys() - opened[0]["repeats"].keys()
            )
            for one in (first, second):
                one.ask("close")
    differences.sort(key=lambda one: -one.ratio.value)
    return Comparison(names[0], names[1], differences, missing)


def _turns(
    first: WorkerProcess,
    second: WorkerProcess,
    case: str,
    key: str,
    count: int,
    rounds: int,
    repeats: int,
    threshold: float,
) -> Difference:
    samples: list[tuple[float, float]] = []
    verdicts: list[str] = []
    for _ in range(repeats):
        begin = len(samples)
        for number in range(rounds):
            pair: dict[int, float] = {}
            order = ((0, first), (1, second))
            for side, process in order if number % 2 == 0 else order[::-1]:
                pair[side] = process.ask("sample", key=key, repeats=count)
            samples.append((pair[0], pair[1]))
        part = samples[begin:]
        ratio = ratio_of_medians([n for _, n in part], [o for o, _ in part], paired=True)
        verdicts.append(verdict(ratio, threshold))
        if verdicts[-1] == "same":
            break
    whole = ratio_of_medians([n for _, n in samples], [o for o, _ in samples], paired=True)
    return Difference(case, key.strip(), whole, settled(verdicts))


@contextlib.contextmanager
def source_tree(name: str) -> Iterator[Path]:
    """The folder of a commit, branch or tag, checked out and compiled for the length of the block, or of this tree.

    Raises:
        UserError: no repository, or no such commit.
    """
    if name in THIS_TREE:
        yield ROOT
        return
    commit = machine.git(ROOT, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    if commit is None:
        raise UserError(f"{name!r} is neither a file of records, nor a commit of {ROOT}, nor `tree`")
    folder = Path(tempfile.mkdtemp(prefix="yolov9-fast-compare-"))
    tree = folder / commit[:10]
    try:
        if machine.git(ROOT, "worktree", "add", "--detach", "--no-checkout", str(tree), commit) is None:
            raise UserError(f"git cannot make a worktree of {name}")
        parts = [part for part in _CHECKED_OUT if machine.git(ROOT, "cat-file", "-e", f"{commit}:{part}") is not None]
        if machine.git(tree, "checkout", commit, "--", *parts) is None:
            raise UserError(f"git cannot check out {name}")
        _compile(tree, commit)
        yield tree
    finally:
        machine.git(ROOT, "worktree", "remove", "--force", str(tree))
        machine.git(ROOT, "worktree", "prune")
        shutil.rmtree(folder, ignore_errors=True)


def _compile(tree: Path, commit: str) -> None:
    """The compiled operators of a tree: this tree's own where their sources are the same, else compiled now."""
    if machine.git(ROOT, "diff", "--quiet", commit, "--", "csrc") is not None and not machine.git(
        ROOT, "ls-files", "--others", "--exclude-standard", "--", "csrc"
    ):
        for path in (*(ROOT / "yolov9_fast").glob("_C_*.so"), ROOT / "yolov9_fast" / "_build_info.json"):
            if path.exists():
                shutil.copy2(path, tree / "yolov9_fast" / path.name)
        return
    scratch = tree.parent / "scratch"
    if (ROOT / "build" / "operators").is_dir():
        # Objects of unchanged sources need no second compilation.
        shutil.copytree(ROOT / "build" / "operators", scratch)
    code = (
        "import importlib.util, pathlib, sys\n"
        "tree, scratch = map(pathlib.Path, sys.argv[1:])\n"
        "spec = importlib.util.spec_from_file_location('recipe', tree / 'csrc' / 'build.py')\n"
        "module = importlib.util.module_from_spec(spec); sys.modules['recipe'] = module\n"
        "spec.loader.exec_module(module)\n"
        "module.build(tree / 'csrc', tree / 'yolov9_fast', scratch)\n"
    )
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["YOLOV9_FAST_SKIP_CUDA"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tree), str(scratch)], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(f"the operators of {tree.name} cannot be compiled: {done.stderr.strip().splitlines()[-1:]}")


def compare(old: str, new: str, **options: Any) -> Comparison:
    """Two files of records, or two of commit, branch, tag and `tree`."""
    paths = [user_path(name, "records or commit", UserError) for name in (old, new)]
    files = [os.path.isfile(path) for path in paths]
    if all(files):
        return compare_files(paths[0], paths[1], options.get("threshold", THRESHOLD))
    if any(files):
        raise UserError("a file of records can only be compared with another one")
    with source_tree(old) as first, source_tree(new) as second:
        return compare_trees(first, second, names=(old, new), **options)
