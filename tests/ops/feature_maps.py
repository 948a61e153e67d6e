"""Random feature maps, dense and as slices, and what a backend must hold: at most twice eager's own rounding error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import yolov9_fast as yf

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def feature_map(
    *shape: int,
    seed: int = 0,
    layout: str = "channels_last",
    dtype: torch.dtype = torch.float32,
    sliced: bool = False,
    ties: bool = False,
    device: str = "cpu",
) -> Tensor:
    """A leaf [B, C, H, W] that requires a gradient, the same numbers on each device.

    `sliced`: channels from the middle of a wider buffer.
    """
    batch, channels, height, width = shape
    wide = channels + 8 if sliced else channels
    values = torch.randn(batch, wide, height, width, generator=torch.Generator().manual_seed(seed))
    if ties:
        values = (2 * values).round() / 2
    buffer = values.to(device, dtype).to(memory_format=LAYOUTS[layout])
    return (buffer[:, 3 : 3 + channels] if sliced else buffer).detach().requires_grad_()


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def float32_precision(convolutions: str = "tf32", products: str = "none") -> Iterator[None]:
    """How torch's convolutions and products of float32 compute on a GPU: "tf32" or "ieee"; the defaults are torch's."""
    settings: tuple[Any, ...] = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [setting.fp32_precision for setting in settings]
    try:
        _set_where_different(settings, (convolutions, products))
        yield
    finally:
        _set_where_different(settings, before)


def _set_where_different(settings: Sequence[Any], values: Sequence[str]) -> None:
    """Once set in this way a precision cannot be read by its older name."""
    for setting, value in zip(settings, values, strict=True):
        if setting.fp32_precision != value:
            setting.fp32_precision = value


def outputs_and_gradients(
    name: str, call: Callable[..., object], inputs: Sequence[Tensor], seed: int = 1
) -> tuple[list[Tensor], list[Tensor]]:
    """What `call(*inputs)` gives on backend `name`, and its inputs' gradients for fixed random output gradients."""
    with yf.backend(name):
        result = call(*inputs)
    given = result if isinstance(result, tuple | list) else [result]
    outputs = [output for output in given if isinstance(output, Tensor)]
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
    wanted = [x for x in inputs if x.requires_grad]
    gradients = torch.autograd.grad(outputs, wanted, weights, allow_unused=True)
    return outputs, [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, gradients, strict=True)]


def assert_as_exact_as_eager(name: str, call: Callable[..., object], inputs: Sequence[Tensor], seed: int = 1) -> None:
    """err(backend, float64) <= 2 err(eager, float64) for every output and every gradient, by the mean square."""
    exact_inputs = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    exact = outputs_and_gradients("eager", call, exact_inputs, seed)
    eager = outputs_and_gradients("eager", call, inputs, seed)
    mine = outputs_and_gradients(name, call, inputs, seed)
    for kind, truth, theirs, ours in zip(("output", "gradient"), exact, eager, mine, strict=True):
        for index, (t, e, m) in enumerate(zip(truth, theirs, ours, strict=True)):
            assert m.shape == e.shape, f"{kind} {index}"
            assert m.dtype == e.dtype, f"{kind} {index}"
            if not m.numel():
                continue
            # A unit in the last place is no worse than eager where eager happens to be exact; in float64 the truth
            # itself is only that good.
            units = 64 if m.dtype == torch.float64 else 1
            unit = units * torch.finfo(m.dtype).eps * t.abs().max().item()
            error, allowed = _rms(m - t), 2 * _rms(e - t) + unit
            assert error <= allowed, f"{kind} {index}: {error} against {allowed}"


def _rms(error: Tensor) -> float:
    return error.double().square().mean().sqrt().item()
