"""The compiled operators themselves: sanitizers find nothing in the C++, and no CUDA kernel spills registers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from csrc import build, sanitize
from yolov9_fast.ops import _library as library

ROOT = Path(__file__).resolve().parent.parent
CUDA = library.build_info().get("parts", {}).get("cuda", {})
no_cuda = pytest.mark.skipif(CUDA.get("file") is None, reason=f"no CUDA part: {CUDA.get('reason')}")


def sanitizer_runtime() -> str | None:
    """Why there is none here."""
    try:
        preloaded = sanitize.environment()["LD_PRELOAD"].split(":")
    except (OSError, subprocess.CalledProcessError) as error:
        return str(error)
    missing = [path for path in preloaded if not Path(path).is_absolute()]
    return f"the compiler has no {', '.join(missing)}" if missing else None


RUNTIME_REASON = sanitizer_runtime()
needs_sanitizers = pytest.mark.skipif(RUNTIME_REASON is not None, reason=f"no sanitizers: {RUNTIME_REASON}")


@pytest.mark.slow
@needs_sanitizers
def test_the_operators_tests_are_clean_under_sanitizers() -> None:
    done = subprocess.run([sys.executable, "-m", "csrc.sanitize"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " passed" in done.stdout


@pytest.mark.slow
@needs_sanitizers
@pytest.mark.parametrize(
    ("statement", "finding"),
    [
        ("volatile int* p = new int[4]; delete[] p; return p[at];", "heap-use-after-free"),
        ("return 0x7FFFFFFF + (at + 1);", "signed integer overflow"),
    ],
)
def test_the_sanitizers_see_an_error(tmp_path: Path, statement: str, finding: str) -> None:
    (tmp_path / "cpu").mkdir()
    code = f'extern "C" __attribute__((visibility("default"))) int wrong(int at) {{ {statement} }}\n'
    (tmp_path / "cpu" / "wrong.cpp").write_text(code)
    (tmp_path / "cuda").mkdir()
    folder = sanitize.build_sanitized(tmp_path, tmp_path / "out")
    call = f"import ctypes; ctypes.CDLL({str(folder / '_C_cpu.so')!r}, ctypes.RTLD_GLOBAL).wrong(0)"
    # The library names torch's as needed; it is found by loading it first.
    done = subprocess.run(
        [sys.executable, "-c", f"import torch; {call}"],
        env=sanitize.environment(folder),
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert finding in done.stderr


@no_cuda
def test_no_cuda_kernel_spills() -> None:
    kernels = CUDA["kernels"]
    assert {row["file"] for row in kernels} == {path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    assert not [row for row in kernels if row["spill_stores"] or row["spill_loads"]]
    # An assigned anchor's 64 bins are an array of its thread; they are few, and the other kernels have no such array.
    assert not [row for row in kernels if row["stack"] and "anchors_kernel" not in row["kernel"]]


@no_cuda
def test_every_architecture_asked_for_has_every_kernel() -> None:
    asked = {flag.rsplit("=", 1)[1] for flag in CUDA["flags"] if flag.startswith("-gencode") and "code=sm_" in flag}
    files = {path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    assert asked
    assert {(row["file"], row["arch"]) for row in CUDA["kernels"]} == {(f, a) for f in files for a in asked}
    assert os.environ.get("YOLOV9_FAST_CUDA_ARCHS") or {"sm_80", "sm_90", "sm_100"} <= asked


def test_the_report_reads_what_ptxas_says() -> None:
    log = (
        "ptxas info    : 0 bytes gmem\n"
        "ptxas info    : Compiling entry function '_Z1kPf' for 'sm_90'\n"
        "ptxas info    : Function properties for _Z1kPf\n"
        "    8 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 8 bytes cumulative stack size, 36 bytes smem\n"
    )
    assert build.kernel_report("k.cu", log) == [
        {
            "file": "k.cu",
            "kernel": "_Z1kPf",
            "arch": "sm_90",
            "registers": 40,
            "stack": 8,
            "spill_stores": 16,
            "spill_loads": 24,
        }
    ]


def test_a_library_in_another_folder_is_the_one_that_loads(tmp_path: Path) -> None:
    code = "from yolov9_fast.ops import _library as library; print(library.loaded['cpu'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "YOLOV9_FAST_LIBRARY_FOLDER": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("not compiled"), done.stderr
