"""Calls of every launcher that between them make each kernel choose each of its variants, on tensors without data.

A kernel that is not called here is not in the ahead-of-time list: add a call to `call_all` with the kernel.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from yolov9_fast.kernels import (
    adown_pool,
    augment,
    bn_silu,
    cbfuse,
    concat,
    conv1x1,
    flat_update,
    rep_bn_silu,
    spp,
    sync_statistics,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LAYOUTS = (torch.channels_last, torch.contiguous_format)
TYPICAL = ((32, 64, 80, 80), (1, 256, 20, 20))
"""A large tensor in tiles and a small one in a single pass: what most layers of a network choose."""
EVERY = (
    *((32, c, s, s) for c in (8, 16, 32, 64) for s in (160, 16)),
    *((1, c, s, s) for c in (16, 64) for s in (80, 64, 40, 32, 20, 16, 10)),
    (32, 24, 80, 80),
    *((n, c, s, s) for n in (1, 32) for c in (16, 512, 1024) for s in (8, 9, 15, 16)),
    (1, 127, 9, 9),
    (1, 256, 9, 9),
    (1, 32, 9, 9),
    (32, 64, 20, 20),
    *((n, c, s, s) for c in (7, 15, 31, 63) for n, s in ((32, 161), (32, 21), (32, 9), (2, 21))),
    *((1, 7, s, s) for s in (81, 63, 45, 31, 21, 9)),
    *((n, 64, s, s) for n, s in ((32, 81), (32, 21), (32, 9), (1, 63), (1, 45), (1, 31), (1, 21), (1, 9))),
)
"""Every block of channels and of pixels, every single-pass size, sizes that allow no 16-byte access."""


def call_all(shape: tuple[int, int, int, int], dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Call every launcher for maps of one shape."""
    channels = shape[1]

    def new(*size: int) -> Tensor:
        if not size:
            return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)
        return torch.empty(size, dtype=dtype, device="meta", memory_format=layout)

    def vector() -> Tensor:
        return torch.empty(channels, device="meta")

    x, y, out = new(), new(), new()
    for plain in (False, True):
        weight, bias = (None, None) if plain else (vector(), vector())
        mean, rstd = vector(), vector()
        first, second = (x, weight, bias, weight, bias), (y, weight, bias, weight, bias)
        one, two = (x, weight, bias, mean, rstd), (y, weight, bias, mean, rstd)
        residual = None if plain else y
        for silu in (True, False):
            bn_silu.bn_silu_forward(*first, 0.03, 1e-3, residual, out, silu)
            bn_silu.bn_silu_forward(*first, 0.03, 1e-3, None, out, silu)
            bn_silu.bn_silu_apply(*one, residual, out, silu)
            bn_silu.bn_silu_backward(y, *one, silu)
            bn_silu.bn_silu_backward_sums(y, *one, silu)
            bn_silu.bn_silu_backward_apply(y, *one, mean, rstd, silu)
            rep_bn_silu.rep_bn_silu_forward(*first, *second, 0.03, 1e-3, None, out, silu)
            rep_bn_silu.rep_bn_silu_forward(*first, *second, 0.03, 1e-3, residual, out, silu)
            rep_bn_silu.rep_bn_silu_apply(*one, *two, residual, out, silu)
            rep_bn_silu.rep_bn_silu_backward(out, *one, *two, silu)
            rep_bn_silu.rep_bn_silu_backward_apply(out, *one, *two, mean, rstd, mean, silu)
            rep_bn_silu.rep_bn_silu_backward_sums(out, *one, *two, silu)
    bn_silu.bn_stats(x)
    for running in (None, vector()):
        table = torch.empty((2, 2 * channels + 1), device="meta")
        sync_statistics.bn_combine(table, running, running, 0.03, 1e-3)
    spp.spp_forward(x, new(), new(), new())
    spp.spp_backward(x, x, x, x, x, x, x)
    n, _, h, w = shape
    for split in (False, True):
        d_first = new(n, channels // 2 if split else channels, h - 1, w - 1)
        d_second = new(n, channels - channels // 2, h // 2, w // 2) if split else None
        adown_pool.adown_pool_forward(x, split)
        adown_pool.adown_pool_backward(d_first, d_second, x, split)
    for count in range(1, cbfuse.MOST + 1):
        cbfuse.cbfuse_forward([new(n, channels, h // 2, w // 2)] * count, x)
    cbfuse.cbfuse_backward(x, [h // 2], [w // 2])
    concat.tap_backward(x, new(n, channels - channels // 2, h, w), channels // 2)
    flat, numbers = (torch.empty(count, device="meta") for count in (x.numel(), 9 + 5))
    for option in (False, True):
        ends = [0, 16, len(flat)]
        flat_update.sgd_update(flat, flat, flat, flat, numbers[:9], ends, option)
        flat_update.adam_update(flat, flat, flat, flat, flat, numbers, ends, 1e-8, option)
    _call_augment(n, h)
    for _ in _precisions(dtype):
        _call_conv1x1(shape, dtype, x, new)


def _call_augment(batch: int, size: int) -> None:
    def new(dtype: torch.dtype, *size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    for views in (1, 2):
        tiles, canvases = new(torch.int64, batch, views, 4, 5), new(torch.int64, batch, views, 2)
        matrices, shares = new(torch.float64, batch, views, 3, 3), new(torch.float64, batch)
        flips = new(torch.bool, batch, 2)
        for tables in (None, new(torch.uint8, batch, 3, 256)):
            for perspective in (False, True):
                augment.augment(
                    new(torch.uint8, 4096), tiles, canvases, matrices, tables, flips, shares, size, perspective
                )


def _precisions(dtype: torch.dtype) -> Iterator[str]:
    """Both settings of torch's convolutions of float32; within an iteration it is set."""
    setting: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = setting.fp32_precision
    try:
        for precision in ("ieee", "tf32") if dtype == torch.float32 else (before,):
            if setting.fp32_precision != precision:
                setting.fp32_precision = precision
            yield precision
    finally:
        if setting.fp32_precision != before:
            setting.fp32_precision = before


def _call_conv1x1(shape: tuple[int, int, int, int], dtype: torch.dtype, x: Tensor, new: Callable[..., Tensor]) -> None:
    n, channels, h, w = shape
    for count in range(1, conv1x1.MOST + 1):
        for outputs in (32, 64, 256) if channels % 8 == 0 else (7, 33, 65):
            weight = torch.empty((outputs, channels * count, 1, 1), dtype=dtype, device="meta")
            turned = torch.empty((channels * count, outputs, 1, 1), dtype=dtype, device="meta").transpose(0, 1)
            dy = new(n, outputs, h, w)
            bias = torch.empty(outputs, dtype=dtype, device="meta")
            for matrix in (weight, turned):
                conv1x1.conv1x1_forward([x] * count, matrix, bias, dy)
                conv1x1.conv1x1_forward([x] * count, matrix, None, dy)
                conv1x1.conv1x1_input_grad(dy, matrix, [channels] * count)
            conv1x1.conv1x1_weight_grad(dy, [x] * count)
