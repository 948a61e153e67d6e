"""Offline tuner: for each streaming kernel and bucket the fastest tile on this GPU. Never called by a launcher."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from yolov9_fast.kernels import adown_pool, bn_silu, cbfuse, config, rep_bn_silu, spp
from yolov9_fast.kernels.device_time import DeviceTimer, overwrite

SHAPES = ((32, 64, 160, 160), (32, 128, 80, 80), (32, 256, 40, 40), (8, 24, 80, 80), (4, 80, 40, 40), (4, 256, 40, 40))
"""Maps of yolov9-c and -t at 640 pixels that between them fill most buckets; others keep the default."""
DTYPES = (torch.bfloat16, torch.float32)


def tune(repeats: int, say: Callable[[str], object]) -> dict[str, Any]:
    """The record of this GPU: device, capability, torch, and kernels: {kernel: {bucket: {"elements", "warps"}}}."""
    kernels: dict[str, dict[str, Any]] = {}
    device = torch.device("cuda", torch.cuda.current_device())
    hold = overwrite(device)
    for dtype in DTYPES:
        for shape in SHAPES:
            for name, call in calls(shape, dtype, "cuda").items():
                bucket = bucket_of(shape, dtype)
                if bucket in kernels.get(name, {}):
                    continue
                timed = {}
                for choice in config.candidates(name):
                    timed[_milliseconds(name, bucket, choice, call, repeats, device, hold)] = choice
                best = min(timed)
                kernels.setdefault(name, {})[bucket] = timed[best]
                say(f"{name} {bucket}: {timed[best]} {best:.4f} ms")
    major, minor = torch.cuda.get_device_capability(device)
    return {
        "device": torch.cuda.get_device_name(device),
        "capability": 10 * major + minor,
        "torch": torch.__version__,
        "kernels": kernels,
    }


def calls(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> dict[str, Callable[[], object]]:
    """For each kernel a call whose time changes with its tile alone."""

    def new(*size: int) -> torch.Tensor:
        return torch.randn(size or shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last)

    x, y, out = new(), new(), new()
    weight1, bias1, mean1, rstd1, weight2, bias2, mean2, rstd2 = torch.rand((8, shape[1]), device=device).unbind()
    mean_dy, mean_dy_xhat1, mean_dy_xhat2 = torch.zeros((3, shape[1]), device=device).unbind()
    one, two = (x, weight1, bias1, mean1, rstd1), (y, weight2, bias2, mean2, rstd2)
    n, c, h, w = shape
    small = new(n, c, h // 2, w // 2)

    def spatial() -> None:
        spp.spp_forward(x, y, out, torch.empty_like(x))
        adown_pool.adown_pool_forward(x, True)
        cbfuse.cbfuse_forward([small], x)

    return {
        "bn_statistics_kernel": lambda: bn_silu.bn_stats(x),
        "bn_silu_apply_kernel": lambda: bn_silu.bn_silu_apply(*one, None, out, True),
        "bn_silu_sums_kernel": lambda: bn_silu.bn_silu_backward_sums(y, *one, True),
        "bn_silu_dx_kernel": lambda: bn_silu.bn_silu_backward_apply(y, *one, mean_dy, mean_dy_xhat1, True),
        "rep_bn_silu_apply_kernel": lambda: rep_bn_silu.rep_bn_silu_apply(*one, *two, None, out, True),
        "rep_bn_silu_sums_kernel": lambda: rep_bn_silu.rep_bn_silu_backward_sums(out, *one, *two, True),
        "rep_bn_silu_dx_kernel": lambda: rep_bn_silu.rep_bn_silu_backward_apply(
            out, *one, *two, mean_dy, mean_dy_xhat1, mean_dy_xhat2, True
        ),
        "spatial": spatial,
    }


def bucket_of(shape: tuple[int, int, int, int], dtype: torch.dtype) -> str:
    n, c, h, w = shape
    block = max(config.channel_block(c), 16 // dtype.itemsize)
    return f"last/{dtype.itemsize}/{block}/{'small' if n * c * h * w <= config.SMALL else 'large'}"


def _milliseconds(
    name: str,
    bucket: str,
    choice: dict[str, int],
    call: Callable[[], object],
    repeats: int,
    device: torch.device,
    hold: Callable[[], object],
) -> float:
    """Median time of `call`'s kernels with this tile; the first calls compile and warm up."""
    with config.forced(name, bucket, choice):
        for _ in range(3):
            call()
        timer = DeviceTimer(device, hold)
        return 1e3 * statistics.median(timer(call).device for _ in range(repeats))
