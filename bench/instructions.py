"""Instructions of the C++ algorithms, counted by valgrind's callgrind on a small driver: no clock, no drift.

Counted are the instructions of one more repeat: those of two runs with different repeats, subtracted.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

ALGORITHMS = ("box_iou",)
SOURCE = Path(__file__).with_name("instructions.cpp")
HEADERS = Path(__file__).resolve().parent.parent / "csrc"
# Valgrind knows no AVX-512; and the counts shall be those of any machine of the architecture.
_FLAGS = ("-O2", "-std=c++20", "-ffp-contract=off")


def count_all(headers: Path = HEADERS) -> tuple[str, dict[str, int]] | str:
    """(compiler, instructions of one repeat by algorithm), or why they cannot be counted."""
    compiler, valgrind = shutil.which("c++") or shutil.which("g++"), shutil.which("valgrind")
    if compiler is None or valgrind is None:
        return "no C++ compiler" if compiler is None else "valgrind is not installed"
    if not (headers / "common" / "box_iou.h").is_file():
        return "the sources in csrc/ are not part of this installation"
    with tempfile.TemporaryDirectory() as folder:
        driver = Path(folder) / "driver"
        done = subprocess.run(
            [compiler, *_FLAGS, f"-I{headers}", str(SOURCE), "-o", str(driver)], capture_output=True, text=True
        )
        if done.returncode:
            return f"the driver does not compile: {done.stderr[:200]}"
        found = {}
        for name in ALGORITHMS:
            counts = [_count(valgrind, driver, name, repeats, Path(folder)) for repeats in (1, 2)]
            if None in counts:
                return f"callgrind failed on {name}"
            found[name] = counts[1] - counts[0]  # type: ignore[operator]
    version = subprocess.run([compiler, "-dumpfullversion"], capture_output=True, text=True).stdout.strip()
    machine = subprocess.run([compiler, "-dumpmachine"], capture_output=True, text=True).stdout.strip()
    return f"{Path(compiler).name} {version} {machine}", found


def _count(valgrind: str, driver: Path, name: str, repeats: int, folder: Path) -> int | None:
    out = f"--callgrind-out-file={folder / 'out'}"
    done = subprocess.run(
        [valgrind, "--tool=callgrind", out, str(driver), name, str(repeats)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r"Collected : (\d+)", done.stderr)
    return int(found.group(1)) if found and done.returncode == 0 else None
