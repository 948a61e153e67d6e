"""Run tests over the C++ operators built with AddressSanitizer and UndefinedBehaviorSanitizer; the first finding fails.

    python -m csrc.sanitize [pytest arguments; default: the operators' tests that are not slow]

The libraries are built in build/sanitized; only what changed is compiled again. `YOLOV9_FAST_TEST_CASES` (here 60 by
default) is the number of random cases of the tests that read it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from csrc import build

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "sanitized"
SANITIZERS = "address,undefined"
# A finding ends the process: what it says has to be on the terminal before.
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--capture=sys"]


def build_sanitized(source: Path = ROOT / "csrc", folder: Path = FOLDER) -> Path:
    """Build `_C_cpu.so` and `_C_emulated.so` with sanitizers into `folder`; `RuntimeError` says why not."""
    folder.mkdir(parents=True, exist_ok=True)
    changed = {"YOLOV9_FAST_SANITIZE": SANITIZERS, "YOLOV9_FAST_SKIP_CUDA": "1"}
    changed["MAX_JOBS"] = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        build.build(source, folder, folder / "objects")
        emulated = build.build_emulated(source, folder, folder / "objects")
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
    cpu = json.loads((folder / build.INFO_NAME).read_text())["parts"]["cpu"]
    reason = cpu["reason"] or emulated.reason
    if reason:
        raise RuntimeError(f"no libraries with sanitizers: {reason}")
    return folder


def environment(folder: Path = FOLDER) -> dict[str, str]:
    """For a process that uses the libraries of `build_sanitized`: the sanitizer's runtime has to be loaded first."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    # libstdc++ too: the runtime looks for the function that throws exceptions when it starts.
    runtime = [
        subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    return {
        "YOLOV9_FAST_TEST_CASES": "60",
        **os.environ,
        "LD_PRELOAD": ":".join(runtime),
        "YOLOV9_FAST_LIBRARY_FOLDER": str(folder),
        # Python frees little when it ends, so leaks cannot be told from that.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }


def main(arguments: list[str]) -> int:
    folder = build_sanitized()
    return subprocess.run([*PYTEST, *(arguments or default_tests())], cwd=ROOT, env=environment(folder)).returncode


def default_tests() -> list[str]:
    """The tests of every operator that has a C++ file, without those that trace graphs or need a GPU."""
    names = {path.stem for path in (ROOT / "csrc" / "cpu").glob("*.cpp")}
    files = [path for path in sorted((ROOT / "tests" / "ops").glob("test_*.py")) if of_operator(path.stem, names)]
    return [*map(str, files), "-m", "not slow and not gpu", "-k", "not opcheck"]


def of_operator(stem: str, names: set[str]) -> bool:
    """Whether test file `stem` is of an operator among `names`: test_nms and test_nms_compiled are of nms."""
    return any(stem == f"test_{name}" or stem.startswith(f"test_{name}_") for name in names)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
