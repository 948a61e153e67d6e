"""csrc/cuda run by the host: the wrappers and kernels as they are, on a machine without a GPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from csrc import on_host
from tests.test_compiled_code import needs_sanitizers

ROOT = Path(__file__).resolve().parents[2]

KERNELS = """
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include "common/block.h"
#include "cuda/stream.cuh"
namespace {
using torch::stable::Tensor;
using namespace yolov9_fast;

struct Shared { int of[64]; };

// Each right case gives 63, 62, ..., 0.
__global__ void kernel(int* out, const int* other, int case_) {
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
  if (case_ == 6) { out[t] = 63 - t + *other; }                                      // a tensor that nobody checked
  if (case_ == 7) { out[t] = blockIdx.x; }                                           // two blocks write one number
  if (case_ == 8) { shared[0] = 63; __syncthreads(); out[t] = shared[0] - t; }       // all threads write the same
  if (case_ == 9) {
    int sum = 1;
    for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
    out[t] = sum + 31 - t + (__ballot_sync(~0u, t % 2 == 0) == 0x55555555u ? 0 : 1);
  }
  if (case_ == 10) { if (t % 32 > 0) __syncwarp(); out[t] = 63 - t; }                // lane 0 is not there
  if (case_ == 11) { shared[t] = t; __syncwarp(); out[t] = 63 - shared[t ^ 1] + (t % 2 == 0 ? 1 : -1); }
  if (case_ == 12) { shared[t] = t; __syncthreads(); shared[t] += shared[63 - t]; out[t] = 63 - t; }  // no barrier
}
__global__ void dynamic_kernel(int* out) {
  extern __shared__ int numbers[];
  numbers[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = numbers[63 - threadIdx.x];
}
__global__ void __launch_bounds__(32) narrow_kernel(int* out) { out[threadIdx.x] = 63 - threadIdx.x; }

int* numbers(const Tensor& tensor) { return static_cast<int*>(tensor.mutable_data_ptr()); }

Tensor guarded(const Tensor& like, const Tensor& other, int64_t case_) {
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  Tensor out = torch::stable::new_empty(like, {64});
  const cudaStream_t stream = current_stream(like.get_device_index());
  const int number = static_cast<int>(case_);
  if (case_ == 20) return out;                                                       // never written
  if (case_ == 21) kernel<<<1, 2048, 0, stream>>>(numbers(out), numbers(out), 0);
  if (case_ == 22) kernel<<<0, 64, 0, stream>>>(numbers(out), numbers(out), 0);
  if (case_ == 23) kernel<<<dim3(1, 65536), 64, 0, stream>>>(numbers(out), numbers(out), 0);
  if (case_ == 24) dynamic_kernel<<<1, 64, 50000, stream>>>(numbers(out));
  if (case_ == 25) {
    cudaFuncSetAttribute(dynamic_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 50000);
    dynamic_kernel<<<1, 64, 50000, stream>>>(numbers(out));
    cudaFuncSetAttribute(dynamic_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 0);
  }
  if (case_ == 26) narrow_kernel<<<1, 64, 0, stream>>>(numbers(out));
  if (case_ == 27) { kernel<<<1, 64, 0, stream>>>(numbers(out), numbers(out), 0); return out; }  // no check
  if (case_ == 28) kernel<<<1, 64, 0, nullptr>>>(numbers(out), numbers(out), 0);
  if (case_ == 29) kernel<<<1, 64, 0, current_stream(1)>>>(numbers(out), numbers(out), 0);
  if (case_ == 30) {
    kernel<<<1, 64, 0, stream>>>(numbers(out), numbers(out), 0);
    if (*numbers(out) == 1) return out;                                              // the host reads
  }
  if (case_ == 31) {
    const int* freed = numbers(torch::stable::new_empty(like, {64}));
    kernel<<<1, 64, 0, stream>>>(numbers(out), freed, 6);
  }
  if (case_ < 20) kernel<<<case_ == 7 ? 2 : 1, 64, 0, stream>>>(numbers(out), numbers(other), number);
  check_launch("kernel");
  return out;
}

Tensor bare(const Tensor& like) {
  Tensor out = torch::stable::new_empty(like, {64});
  kernel<<<1, 64, 0, current_stream(like.get_device_index())>>>(numbers(out), numbers(out), 0);
  check_launch("kernel");
  return out;
}
}  // namespace
STABLE_TORCH_LIBRARY(probe, library) {
  library.def("guarded(Tensor like, Tensor other, int case) -> Tensor");
  library.def("bare(Tensor like) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(probe, CUDA, library) {
  library.impl("guarded", TORCH_BOX(&guarded));
  library.impl("bare", TORCH_BOX(&bare));
}
"""
SCRIPT = """
import json, os, sys, torch
torch.ops.load_library(sys.argv[1])
like, other = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
found = []
for seed in sys.argv[2].split(","):
    os.environ["YOLOV9_FAST_CUDA_SEED"] = seed
    for case in map(int, sys.argv[3:]):
        try:
            out = torch.ops.probe.bare(like) if case < 0 else torch.ops.probe.guarded(like, other, case)
            found.append(out.equal(torch.arange(63, -1, -1, dtype=torch.int32)))
        except RuntimeError as error:
            found.append(str(error))
print(json.dumps(found))
"""
IN_ALL_BUILDS = {
    0: True,
    2: "32 threads of a block wait at a barrier that 32 threads never reach",
    5: True,
    8: True,
    9: True,
    10: "wait at an operation of a warp that others of its lanes never reach",
    11: True,
    20: False,
    21: "invalid configuration argument",
    22: "invalid configuration argument",
    23: "invalid configuration argument",
    24: "invalid argument",
    25: True,
    26: "invalid argument",
    27: "no cudaGetLastError after its launch",
    28: "into the legacy default stream",
    29: "launched on device 0 into a stream of device 1",
    -1: "launched outside a device guard",
}
BY_ACCESSES = {
    1: "shared memory",  # read before or after it is written, as the order has it
    3: "reads shared memory that nobody has written",
    4: "writes memory of no tensor",
    6: "reads memory of no tensor that was asked for its device",
    7: "in no order, in a tensor",
    12: "in no order, in shared memory",
    30: "the host reads the memory of a tensor on a device",
}


def test_launches_become_calls() -> None:
    text = "a(); sum_kernel<float, true><<<dim3(f(a, 1), b), kThreads, 0, stream>>>(p, g(x)); c();"
    assert on_host._with_calls(text) == (
        'a(); cuda_on_host::launch({"sum_kernel", 1024, dim3(f(a, 1), b), kThreads, 0, stream}, '
        "[](auto... given) { sum_kernel<float, true>(given...); }, p, g(x)); c();"
    )
    with pytest.raises(ValueError, match="expected <<<grid"):
        on_host._with_calls("k<<<1, 2>>>(p);")
    with pytest.raises(ValueError, match="shared memory in a form that is not known"):
        on_host.translate("__shared__ float a, b;")


def test_every_launch_of_every_file_is_translated() -> None:
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        text = path.read_text()
        translated = on_host.translate(text)
        assert translated.count("cuda_on_host::launch(") == text.count("<<<") > 0
        assert "CUDA" not in translated.split("LIBRARY_IMPL")[1]


@pytest.fixture(scope="module", params=["address", "accesses"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    source = tmp_path_factory.mktemp("csrc")
    (source / "common").symlink_to(ROOT / "csrc" / "common")
    (source / "cuda").mkdir()
    (source / "cuda" / "wrong.cu").write_text(KERNELS)
    (source / "cuda" / "stream.cuh").write_text((ROOT / "csrc" / "cuda" / "stream.cuh").read_text())
    return request.param, on_host.build_on_host(request.param, source, tmp_path_factory.mktemp("out"))


def run(kind: str, folder: Path, *cases: int, seeds: str = "0,3") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, str(folder / "_C_cpu.so"), seeds, *map(str, cases)]
    environment = on_host.environment(kind, folder, "0")
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@needs_sanitizers
def test_wrong_kernels_and_wrappers_are_found(library: tuple[str, Path]) -> None:
    kind, folder = library
    expected = IN_ALL_BUILDS | (BY_ACCESSES if kind == "accesses" else {})
    done = run(kind, folder, *expected)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    for (case, finding), got in zip([*expected.items(), *expected.items()], found, strict=True):
        assert finding in got if isinstance(finding, str) and isinstance(got, str) else finding is got, (case, got)
    if kind == "address":
        for case, finding in ((4, "heap-buffer-overflow"), (31, "heap-use-after-free")):
            assert finding in run(kind, folder, case, seeds="3").stderr


@pytest.mark.slow
@needs_sanitizers
@pytest.mark.parametrize("kind", ["address", "accesses"])
def test_launches_go_to_the_tensors_device_and_its_stream(kind: str) -> None:
    environment = on_host.environment(kind, on_host.build_on_host(kind), "1")
    command = [sys.executable, "-m", "tests.ops.cuda_probe"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert done.stdout.endswith("huge\n")


@pytest.mark.slow
@needs_sanitizers
def test_the_operators_tests_pass_through_the_cuda_wrappers() -> None:
    done = run_module("csrc.on_host", "--quick")
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert len(re.findall(r"^\d+ tests: \d+ launches of (\d+) kernels of \1$", done.stdout, re.M)) == len(on_host.SEEDS)


@pytest.mark.slow
@needs_sanitizers
def test_fuzz_targets_run_through_the_cuda_wrappers() -> None:
    done = run_module("tests.fuzz", "--cuda", "accesses", "box_iou", "--seconds", "2")
    assert done.returncode == 0, done.stdout[-6000:]
    assert json.loads(done.stdout)[0]["launches"] > 0
    assert run_module("tests.fuzz", "--cuda", "accesses", "spp").returncode == 2


def run_module(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
