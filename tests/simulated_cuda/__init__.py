"""A CUDA device of host memory: tests for `device="cuda"` run on a machine without a GPU.

    python -m pytest -p tests.simulated_cuda tests/ops tests/nn ...

gives the CPU build of torch a device "cuda" with two indices. Its tensors lie in the host's memory and every operation
of torch runs as the CPU's (tests/fake_cuda/simulated.cpp); Triton kernels are interpreted; the operators of csrc/cuda
are those of `csrc.on_host`, without sanitizers. So the tests' own code for CUDA runs: where their tensors are, which
backends they choose, what waits for the device, captures and replays. It says nothing about speed, rounding or compiled
kernels.
"""

from __future__ import annotations

import sys

from tests import fake_cuda

if "torch" in sys.modules:
    raise RuntimeError("tests.simulated_cuda has to be loaded before torch: python -m pytest -p tests.simulated_cuda")
fake_cuda.start()

from tests.simulated_cuda import device  # noqa: E402

device.start()
