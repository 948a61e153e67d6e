"""What a step costs the host on a GPU, without one: Python calls, Triton launches, variants, microseconds.

    python -m tests.fake_cuda.host_time [NETWORK ...] [--units] [--amp bf16|off] [--repeats N] [--cold] [--json]

The microseconds are measured on this machine's processor with a driver that launches nothing, so they are predicted for
a machine with a GPU; they hold what PyTorch's operators compute on small maps, and nothing of cuDNN. Maps are of 64
pixels, but the kernels are those of large maps: a map is never held in registers as a whole.
"""

from __future__ import annotations

import sys

from tests import fake_cuda
from tests.fake_cuda import triton_driver

if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(prog="python -m tests.fake_cuda.host_time", description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help="as yolov9-t: its training step and inference")
    parser.add_argument("--units", action="store_true", help="one operator at a time, forward and backward")
    parser.add_argument("--amp", choices=("bf16", "off"), default="bf16", help="autocast (default %(default)s)")
    parser.add_argument("--backend", default="auto", help="backend of the steps: auto, triton, eager (default auto)")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="timed runs, the least counts; 0: none")
    parser.add_argument("--cold", action="store_true", help="compile everything again and say how long it takes")
    parser.add_argument("--sizes", type=int, nargs=2, metavar="PX", help="two image sizes, one after the other")
    parser.add_argument("--arch", type=int, choices=(80, 90, 100), default=90, help="compute capability (default 90)")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    ARGUMENTS = parser.parse_args()
    if ARGUMENTS.cold:
        import os
        import tempfile

        COLD = tempfile.TemporaryDirectory()
        os.environ["TRITON_CACHE_DIR"] = COLD.name
    DRIVER = triton_driver.start(ARGUMENTS.arch)

import functools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import NoClock
from bench.networks import TrainingStep
from yolov9_fast import ops
from yolov9_fast.models import create_model, fuse, to_deploy
from yolov9_fast.ops._backend import backend

CLASSES, SIZE, BATCH = 80, 64, 2
CHANNELS = 64
_DEVICE = "cuda"


class Calls:
    """Counts calls of Python functions of whatever module, in this thread and in autograd's thread of the device."""

    def __init__(self) -> None:
        self.number = 0
        self.active = False

    def _profile(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and self.active:
            self.number += not frame.f_code.co_name.startswith("<")  # newer versions of Python inline comprehensions

    def follow(self, gradient: Tensor) -> None:
        """A hook of a tensor: autograd runs it in the thread of the device."""
        sys.setprofile(self._profile)

    def count(self, call: Callable[[], Any]) -> int:
        _backward_thread(self.follow)
        before = sys.getprofile()
        self.number, self.active = 0, True
        sys.setprofile(self._profile)
        try:
            call()
        finally:
            sys.setprofile(before)
            self.active = False
            _backward_thread(lambda gradient: sys.setprofile(None))
        return self.number


@torch.enable_grad()
def _backward_thread(hook: Callable[[Tensor], None]) -> None:
    x = torch.zeros(1, device=_DEVICE, requires_grad=True)
    y = x * 2
    y.register_hook(hook)
    y.sum().backward()


@contextmanager
def large_maps() -> Iterator[None]:
    """As if no map were small enough to be held in registers as a whole."""
    from yolov9_fast.kernels import bn_silu_single_pass, replay

    before = bn_silu_single_pass.tile_of
    bn_silu_single_pass.tile_of = lambda *args: None
    replay.forget()
    try:
        yield
    finally:
        bn_silu_single_pass.tile_of = before
        replay.forget()


def least_microseconds(call: Callable[[], Any], repeats: int) -> float:
    """Of this process's time on the processor, in all threads: what waits costs nothing."""
    found = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        found.append(1e6 * (time.process_time() - start))
    return round(min(found), 1)


def measured(call: Callable[[], Any], repeats: int, inner: int = 1) -> dict[str, Any]:
    """One call after two others: launches, Python calls, and microseconds unless `repeats` is 0."""
    call()
    call()
    DRIVER.reset()
    call()
    found: dict[str, Any] = {"launches": DRIVER.count(), "python calls": Calls().count(call)}
    if repeats:
        many = call if inner == 1 else functools.partial(_times, call, inner)
        found["microseconds"] = round(least_microseconds(many, repeats) / inner, 1)
    return found


def _times(call: Callable[[], Any], number: int) -> None:
    for _ in range(number):
        call()


# ---- units


def units(dtype: torch.dtype) -> dict[str, tuple[Callable[[], Any], list[Tensor]]]:
    """By name: a forward on the device, and the tensors whose gradients its backward gives."""

    def map_of(channels: int = CHANNELS, side: int = 16) -> Tensor:
        made = torch.randn(BATCH, channels, side, side, device=_DEVICE).to(dtype)
        return made.contiguous(memory_format=torch.channels_last).requires_grad_()

    def vector(value: float = 1.0, learn: bool = True) -> Tensor:
        return torch.full((CHANNELS,), value, device=_DEVICE, requires_grad=learn)

    def norm() -> list[Tensor]:
        return [vector(), vector(), vector(0.0, False), vector(1.0, False)]

    x, y, wide, small = map_of(), map_of(), map_of(2 * CHANNELS), map_of(side=8)
    one, two = norm(), norm()
    weight, other = (torch.randn(CHANNELS, CHANNELS, 1, 1, device=_DEVICE).to(dtype).requires_grad_() for _ in range(2))
    training = {"training": True, "momentum": 0.03, "eps": 1e-3}
    norms = ops.Norm(*one), ops.Norm(*two)
    learned = [*one[:2], *two[:2]]

    def buffered() -> Tensor:
        buffer = ops.ConcatBuffer.like(x, (CHANNELS, CHANNELS))
        first = ops.bn_silu(x, *one, **training, out=buffer.slot(0))
        second = ops.bn_silu(y, *two, **training, out=buffer.slot(1))
        return buffer.join(first, second)

    return {
        "bn_silu": (lambda: ops.bn_silu(x, *one, **training), [x, *one[:2]]),
        "two bn_silu into a ConcatBuffer": (buffered, [x, y, *learned]),
        "rep_bn_silu": (lambda: ops.rep_bn_silu(x, norms[0], y, norms[1], **training), [x, y, *learned]),
        "conv1x1 of two maps": (
            lambda: ops.conv1x1([x, y], torch.cat((weight, other), 1)),
            [x, y, weight, other],
        ),
        "tap": (lambda: torch.add(*ops.tap(wide, 0, CHANNELS)[1:], small.sum()), [wide]),
        "spp": (lambda: sum(ops.spp(x)), [x]),
        "adown_pool": (lambda: sum(part.sum() for part in ops.adown_pool(wide) if part is not None), [wide]),
        "cbfuse": (lambda: ops.cbfuse([small], x), [small, x]),
        "bn_silu in eager PyTorch": (
            lambda: nn.functional.silu(nn.functional.batch_norm(x, one[2], one[3], *one[:2], True, 0.03, 1e-3)),
            [x, *one[:2]],
        ),
    }


def report_units(dtype: torch.dtype, repeats: int) -> dict[str, dict[str, Any]]:
    found = {}
    with large_maps(), backend("auto"):
        for name, (forward, inputs) in units(dtype).items():
            gradient = torch.ones_like(forward())

            def both(forward: Any = forward, inputs: Any = inputs, gradient: Tensor = gradient) -> None:
                torch.autograd.grad(forward(), inputs, gradient)

            found[f"{name}, forward"] = measured(forward, repeats, 20)
            found[f"{name}, forward and backward"] = measured(both, repeats, 20)
        with torch.no_grad():
            x = torch.randn(BATCH, CHANNELS, 16, 16, device=_DEVICE).to(dtype)
            x = x.contiguous(memory_format=torch.channels_last)
            bias = torch.zeros(CHANNELS, device=_DEVICE)
            found["bias_silu of a folded unit"] = measured(lambda: ops.bias_silu(x, bias), repeats, 20)
    return found


# ---- networks


def training_step(network: str, amp: str, name: str, size: int = SIZE) -> Callable[[], Any]:
    dtype = "bfloat16" if amp == "bf16" else "float32"
    device = torch.device(_DEVICE)
    step = TrainingStep(network, size, BATCH, device, dtype=dtype, layout="channels_last", backend_name=name)
    return lambda: step(NoClock())


def inference(network: str, amp: str, name: str, size: int = SIZE) -> Callable[[], Any]:
    model: Any = fuse(to_deploy(create_model(network, CLASSES))).to(_DEVICE).eval()
    model = nn.Module.to(model, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.rand(1, 3, size, size, device=_DEVICE).contiguous(memory_format=torch.channels_last)

    def predict() -> None:
        with torch.no_grad(), backend(name):
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=amp == "bf16"):
                maps = model.raw(images, auxiliary=False).main
            ops.nms(model.decode([one.float() for one in maps]), conf=0.001)

    return predict


def report_network(network: str, amp: str, name: str, repeats: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with large_maps():
        for what, make in {"step": training_step, "inference": inference}.items():
            found[what] = measured(make(network, amp, name), repeats)
    return found


def report_sizes(network: str, amp: str, name: str, sizes: list[int]) -> dict[str, Any]:
    """Variants of kernels that two image sizes compile, in the order of calls: training steps, then inference."""
    found: dict[str, Any] = {}
    for what, make in {"step": training_step, "inference": inference}.items():
        for size in sizes:
            call = make(network, amp, name, size)
            for order in ("first", "second"):
                before = Counter(DRIVER.variants())
                DRIVER.reset()
                call()
                new = Counter(DRIVER.variants()) - before
                found[f"{what} of {size} px, {order}"] = {"launches": DRIVER.count(), "compiled": dict(new)}
            del call
    return found


def main() -> None:
    torch.set_num_threads(1)
    arguments = ARGUMENTS
    stages: Counter[str] = Counter()
    compiled = 0

    def compiled_one(*, times: Any, cache_hit: bool, **others: Any) -> None:
        nonlocal compiled
        compiled += not cache_hit
        stages.update(dict(times.lowering_stages))

    import triton

    triton.knobs.compilation.listener = compiled_one
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "amp": arguments.amp}
    if arguments.units:
        dtype = torch.bfloat16 if arguments.amp == "bf16" else torch.float32
        report["units"] = report_units(dtype, arguments.repeats)
    for network in arguments.networks:
        if arguments.sizes:
            report[network] = report_sizes(network, arguments.amp, arguments.backend, arguments.sizes)
        else:
            report[network] = report_network(network, arguments.amp, arguments.backend, arguments.repeats)
    report["variants"] = DRIVER.variants()
    report["compiled now"] = compiled
    report["seconds of compilation"] = {name: round(value / 1e6, 2) for name, value in stages.items()}
    if arguments.json:
        print(json.dumps(report))
        fake_cuda.end()
    for name, value in report.items():
        if isinstance(value, dict) and name != "variants":
            print(name)
            for key, numbers in value.items():
                print(
                    f"  {key:44}",
                    ", ".join(f"{k}: {v}" for k, v in numbers.items()) if isinstance(numbers, dict) else numbers,
                )
        else:
            print(f"{name}: {value}")
    fake_cuda.end()


if __name__ == "__main__":
    main()
