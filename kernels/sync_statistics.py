"""BatchNorm statistics of all processes from the gathered ones of each, in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from yolov9_fast.kernels.batch_norm import FINISH_CHANNELS, store_statistics
from yolov9_fast.kernels.launch import kernel
from yolov9_fast.kernels.replay import replayed

_BLOCK_PROCESSES = 8


# Reads 8 bytes per channel and process, twice; writes 8 (16 with running statistics) per channel. Grid: channels.
@kernel(streams=False)
def bn_combine_kernel(
    table_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    total_ptr: tl.tensor,
    running_mean_ptr: tl.tensor,
    running_var_ptr: tl.tensor,
    momentum: tl.tensor,
    eps: tl.tensor,
    processes: tl.tensor,
    channels: tl.tensor,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    g = tl.arange(0, BLOCK_G)
    width = 2 * channels + 1
    seen = tl.zeros([BLOCK_G], tl.float32)
    # Relative to one of the means: a weighted sum of means far from zero would cancel.
    anchor = tl.full([BLOCK_C], float("-inf"), tl.float32)
    for start in range(0, processes, BLOCK_G):
        row = start + g
        valid = (row < processes)[:, None] & (c < channels)[None, :]
        n = tl.load(table_ptr + row * width + 2 * channels, mask=row < processes, other=0.0)
        mean = tl.load(table_ptr + row[:, None] * width + c[None, :], mask=valid, other=0.0)
        seen += n
        anchor = tl.maximum(anchor, tl.max(tl.where((n > 0)[:, None] & valid, mean, float("-inf")), axis=0))
    total = tl.sum(seen, axis=0)
    count = tl.maximum(total, 1.0)
    anchor = tl.where(anchor > float("-inf"), anchor, 0.0)
    acc = tl.zeros([BLOCK_G, BLOCK_C], tl.float32)
    for start in range(0, processes, BLOCK_G):
        row = start + g
        valid = (row < processes)[:, None] & (c < channels)[None, :]
        n = tl.load(table_ptr + row * width + 2 * channels, mask=row < processes, other=0.0)[:, None]
        mean = tl.load(table_ptr + row[:, None] * width + c[None, :], mask=valid, other=0.0)
        acc += tl.where((n > 0) & valid, n * (mean - anchor[None, :]), 0.0)
    combined = anchor + tl.div_rn(tl.sum(acc, axis=0), count)
    acc = tl.zeros([BLOCK_G, BLOCK_C], tl.float32)
    for start in range(0, processes, BLOCK_G):
        row = start + g
        valid = (row < processes)[:, None] & (c < channels)[None, :]
        n = tl.load(table_ptr + row * width + 2 * channels, mask=row < processes, other=0.0)[:, None]
        mean = tl.load(table_ptr + row[:, None] * width + c[None, :], mask=valid, other=0.0)
        m2 = tl.load(table_ptr + row[:, None] * width + channels + c[None, :], mask=valid, other=0.0)
        off = mean - combined[None, :]
        acc += tl.where((n > 0) & valid, m2 + n * off * off, 0.0)
    m2 = tl.sum(acc, axis=0)
    tl.store(total_ptr, total, mask=tl.program_id(0) == 0)
    store_statistics(
        combined, m2, count, c, channels, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, momentum, eps, True
    )


@replayed()
def bn_combine(
    table: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and rstd [C] and the number of values [] of all processes, from rows of mean, M2 and number [2 C + 1]."""
    processes, channels = table.shape[0], table.shape[1] // 2
    mean, rstd = (torch.empty(channels, dtype=torch.float32, device=table.device) for _ in range(2))
    total = torch.empty((), dtype=torch.float32, device=table.device)
    bn_combine_kernel(
        (triton.cdiv(channels, FINISH_CHANNELS),),
        table,
        mean,
        rstd,
        total,
        running_mean,
        running_var,
        float(momentum),
        float(eps),
        processes,
        channels,
        warps=1,
        BLOCK_G=_BLOCK_PROCESSES,
        BLOCK_C=FINISH_CHANNELS,
    )
    return mean, rstd, total
