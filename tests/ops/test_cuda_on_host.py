"""csrc/cuda run by the host: the wrappers and kernels as they are, on a machine without a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from csrc import on_host, sanitize
from tests.test_compiled_code import needs_sanitizers

ROOT = Path(__file__).resolve().parents[2]

KERNELS = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include "common/block.h"
#include "cuda/stream.cuh"
namespace {
using torch::stable::Tensor;
using namespace yolov9_fast;

struct Shared { int of[64]; };

__global__ void kernel(int* out, int case_) {
  __shared__ Shared memory;
  int* shared = memory.of;
  const int t = threadIdx.x;
  if (case_ == 0) { shared[t] = t; __syncthreads(); out[t] = shared[63 - t]; }
  if (case_ == 1) { shared[t] = t; out[t] = shared[63 - t]; }                        // no barrier
  if (case_ == 2) { if (t < 32) __syncthreads(); out[t] = 63 - t; }                  // a divergent barrier
  if (case_ == 3) { out[t] = shared[t] + 63 - t; }                                   // shared memory never written
  if (case_ == 4) { shared[t] = 0; out[t + 1] = t; }                                 // behind the end
  if (case_ == 5) {
    if (t == 0) shared[0] = 0;
    __syncthreads();
    atomicAdd(shared, 1);
    __syncthreads();
    out[t] = shared[0] - 1 - t;
  }
}

Tensor run(const Tensor& like, int64_t case_, int64_t threads) {
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  Tensor out = torch::stable::new_empty(like, {64});
  if (case_ == 6) return out;                                                        // never written
  kernel<<<1, static_cast<unsigned>(threads), 0, current_stream(like.get_device_index())>>>(
      static_cast<int*>(out.mutable_data_ptr()), static_cast<int>(case_));
  check_launch("kernel");
  return out;
}
}  // namespace
STABLE_TORCH_LIBRARY(probe, library) { library.def("run(Tensor like, int case_, int threads) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(probe, CUDA, library) { library.impl("run", TORCH_BOX(&run)); }
"""


def test_launches_become_calls() -> None:
    text = "a(); sum_kernel<float, true><<<dim3(f(a, 1), b), kThreads, 0, stream>>>(p, g(x)); c();"
    assert on_host._with_calls(text) == (
        'a(); cuda_on_host::launch("sum_kernel", dim3(f(a, 1), b), kThreads, 0, stream, '
        "[&] { sum_kernel<float, true>(p, g(x)); }); c();"
    )
    with pytest.raises(ValueError, match="expected <<<grid"):
        on_host._with_calls("k<<<1, 2>>>(p);")


def test_every_launch_of_every_file_is_translated() -> None:
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        text = path.read_text()
        translated = on_host.translate(text)
        assert translated.count("cuda_on_host::launch(") == text.count("<<<") > 0
        assert "__shared__" not in translated
        assert "CUDA" not in translated.split("LIBRARY_IMPL")[1]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("csrc")
    for name in ("common", "cuda_on_host"):
        (source / name).symlink_to(ROOT / "csrc" / name)
    (source / "cuda").mkdir()
    (source / "cuda" / "wrong.cu").write_text(KERNELS)
    (source / "cuda" / "stream.cuh").write_text((ROOT / "csrc" / "cuda" / "stream.cuh").read_text())
    return on_host.build_on_host(source, tmp_path_factory.mktemp("out"))


def run(folder: Path, case: int, seed: int, threads: int = 64) -> subprocess.CompletedProcess[str]:
    code = (
        f"import torch; torch.ops.load_library({str(folder / '_C_cpu.so')!r}); "
        f"out = torch.ops.probe.run(torch.zeros(1, dtype=torch.int32), {case}, {threads}); "
        "print(out.equal(torch.arange(63, -1, -1, dtype=torch.int32)))"
    )
    environment = {**sanitize.environment(folder), "YOLOV9_FAST_CUDA_SEED": str(seed)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@needs_sanitizers
@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize(
    ("case", "threads", "finding"),
    [
        (0, 64, "True"),
        (5, 64, "True"),
        (1, 64, "False"),
        (2, 64, "32 threads of a block wait at a barrier that 32 threads never reach"),
        (3, 64, "False"),
        (4, 64, "heap-buffer-overflow"),
        (6, 64, "False"),
        (0, 2048, "a block of 2048 x 1 x 1 threads is not possible"),
        (0, 0, "a block of 0 x 1 x 1 threads is not possible"),
    ],
)
def test_wrong_kernels_are_found(library: Path, case: int, threads: int, finding: str, seed: int) -> None:
    done = run(library, case, seed, threads)
    assert finding in done.stdout + done.stderr


@pytest.mark.slow
@needs_sanitizers
def test_launches_go_to_the_tensors_device_and_its_stream() -> None:
    folder = on_host.build_on_host()
    command = [sys.executable, "-m", "tests.ops.cuda_probe"]
    done = subprocess.run(
        command, cwd=ROOT, env=sanitize.environment(folder), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "detection_loss_forward" in done.stdout


@pytest.mark.slow
@needs_sanitizers
def test_the_operators_tests_pass_through_the_cuda_wrappers() -> None:
    done = subprocess.run([sys.executable, "-m", "csrc.on_host"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert done.stdout.count(" passed") == 2
