"""The compiled decode, on the CPU and by emulated CUDA blocks, against eager and float64."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

import yolov9_fast as yf
from tests.ops import CASES, emulated
from yolov9_fast.ops import _library as library
from yolov9_fast.ops import decode
from yolov9_fast.ops._decode import (
    OPERATOR,
    decode_for_assignment,
    decode_for_assignment_reference,
    decode_reference,
    with_one_pixel_stride,
)

REASON = OPERATOR.why_not("cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no compiled decode: {REASON}")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def random_maps(seed: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], tuple[int, ...]]:
    """Maps of one to three levels; contiguous, channels_last, channels or columns of wider maps."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, classes = draw.randint(1, 3), draw.choice((1, 2, 5, 40, 70))
    strides = tuple((8, 16, 32)[: draw.randint(1, 3)])
    layout, spread = draw.choice(("contiguous", "channels_last", "slice", "crop")), draw.choice((0.1, 1.0, 5.0, 40.0))
    maps = []
    for _ in strides:
        height, width = draw.randint(1, 9), draw.randint(1, 12)
        level = (torch.randn(batch, 64 + classes, height, width, generator=generator) * spread).to(dtype)
        if layout == "channels_last":
            level = level.to(memory_format=torch.channels_last)
        elif layout == "slice":
            level = torch.cat((torch.full_like(level[:, :2], math.nan), level, level[:, :1]), 1)[:, 2:-1]
        elif layout == "crop":
            level = torch.cat((torch.full_like(level[..., :1], math.nan), level), 3)[..., 1:]
        maps.append(level)
    return maps, strides


@pytest.mark.slow
def test_random_cases_agree_with_eager() -> None:
    for seed in range(CASES):
        maps, strides = random_maps(seed)
        with yf.backend("cpu"):
            out = decode(maps, strides)
        expected = decode_reference(maps, strides)
        # Sides reach 15 x 32 pixels: a few units of float32's last place there are 1e-4.
        for part, atol in ((slice(0, 4), 2e-4), (slice(4, None), 1e-6)):
            difference = (out - expected)[:, part].abs().max()
            assert difference <= atol, (seed, difference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_against_float64_is_at_most_twice_that_of_eager(dtype: torch.dtype) -> None:
    for seed in range(100):
        maps, strides = random_maps(10_000 + seed, dtype)
        exact = decode_reference([level.double() for level in maps], strides)
        with yf.backend("cpu"):
            out = decode(maps, strides)
        for part in (slice(0, 4), slice(4, None)):
            error, own = (
                (each.double() - exact)[:, part].abs().max() for each in (out, decode_reference(maps, strides))
            )
            assert error <= 2 * own + 1.2e-7 * exact[:, part].abs().max(), seed


def test_float64_maps_are_decoded_in_float64() -> None:
    for seed in range(50):
        maps, strides = random_maps(20_000 + seed, torch.float64)
        with yf.backend("cpu"):
            out = decode(maps, strides)
        torch.testing.assert_close(out, decode_reference(maps, strides), rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("threads", "shuffle"), [(1, 0), (37, 1), (256, 2)])
def test_emulated_blocks_are_bitwise_identical_to_the_cpu(dtype: torch.dtype, threads: int, shuffle: int) -> None:
    operators = emulated.operators()
    for seed in range(15):
        maps, strides = random_maps(30_000 + seed, dtype)
        maps = [with_one_pixel_stride(level) for level in maps]
        labels = torch.randint(0, maps[0].shape[1] - 64, (maps[0].shape[0], seed % 4))
        with yf.backend("cpu"):
            assert torch.equal(operators.decode(maps, strides, threads, shuffle), decode(maps, strides))
        for wanted in (labels, None):
            got = operators.decode_for_assignment(maps, wanted, strides, threads, shuffle)
            own = torch.ops.yolov9_fast.decode_for_assignment(maps, wanted, strides)
            assert all(torch.equal(a, b) for a, b in zip(got, own, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_assignment_gets_the_scores_of_its_ground_truths(dtype: torch.dtype) -> None:
    for seed in range(200):
        maps, strides = random_maps(40_000 + seed, dtype)
        batch, classes = maps[0].shape[0], maps[0].shape[1] - 64
        labels = torch.randint(0, classes, (batch, seed % 6))
        with yf.backend("cpu"):
            got = decode_for_assignment(maps, labels, strides)
        own = decode_for_assignment_reference(maps, labels, strides)
        torch.testing.assert_close(got.boxes, own.boxes, rtol=0, atol=2e-4)
        assert torch.equal(got.points, own.points)
        assert got.scores.shape[2] == max(1, min(labels.shape[1], classes))
        for image in range(batch):
            found, expected = (each.scores[image][:, each.columns[image]] for each in (got, own))
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_scores_of_a_class_are_adjacent_and_boxes_contiguous() -> None:
    maps, strides = random_maps(1)
    with yf.backend("cpu"):
        got = decode_for_assignment(maps, torch.zeros(maps[0].shape[0], 1, dtype=torch.long), strides)
    assert got.scores.stride(1) == 1
    assert got.boxes.is_contiguous()
    assert not got.boxes.requires_grad


def test_a_label_beyond_the_classes_has_no_column() -> None:
    maps, strides = random_maps(1)
    labels = torch.full((maps[0].shape[0], 1), 99)
    with yf.backend("cpu"):
        given = decode_for_assignment([torch.cat((level, level[:, -2:]), 1) for level in maps], labels, strides)
    assert (given.columns == -1).all()  # `assign` takes its score as 0


def test_labels_of_another_batch_size_are_named() -> None:
    maps, strides = random_maps(1)
    with pytest.raises(ValueError, match=r"^labels: expected \["):
        decode_for_assignment(maps, torch.zeros(9, 1, dtype=torch.long), strides)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("channel", [0, 40, 64])
def test_values_that_are_not_finite_agree_with_eager(bad: float, channel: int) -> None:
    level = torch.randn(1, 66, 3, 3, generator=torch.Generator().manual_seed(0))
    level[0, channel, 1, 1] = bad
    with yf.backend("cpu"):
        out = decode([level], [8])
    torch.testing.assert_close(out, decode_reference([level], [8]), equal_nan=True)


def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    maps = [torch.randn(4, 90, s, s) for s in (40, 20, 10)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with yf.backend("cpu"):
                results.append(decode(maps))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_batch_without_images_is_empty() -> None:
    with yf.backend("cpu"):
        assert decode([torch.zeros(0, 67, 2, 2)], [8]).shape == (0, 7, 4)


def test_the_compiled_kernel_refuses_a_gradient_and_auto_runs_eager() -> None:
    level = torch.randn(1, 66, 2, 2, requires_grad=True)
    with yf.backend("cpu"), pytest.raises(RuntimeError, match="no gradient"):
        decode([level], [8])
    assert decode([level], [8]).requires_grad


def test_backend_cuda_with_tensors_on_the_cpu_raises() -> None:
    with yf.backend("cuda"), pytest.raises(RuntimeError, match="cannot run"):
        decode([torch.zeros(1, 66, 2, 2)], [8])


def test_opcheck() -> None:
    maps, strides = random_maps(4)
    maps = [with_one_pixel_stride(level) for level in maps]
    torch.library.opcheck(torch.ops.yolov9_fast.decode_forward.default, (maps, strides))
    for labels in (None, torch.zeros(maps[0].shape[0], 2, dtype=torch.long)):
        torch.library.opcheck(torch.ops.yolov9_fast.decode_for_assignment.default, (maps, labels, strides))


@pytest.mark.slow
def test_compiles_in_one_graph() -> None:
    maps, strides = random_maps(4)
    with torch.no_grad():
        out = torch.compile(lambda maps: decode(maps, strides), fullgraph=True)(maps)
        assert torch.equal(out, decode(maps, strides))


@pytest.mark.skipif(library.loaded["cuda"] is not None, reason=f"no CUDA part: {library.loaded['cuda']}")
@pytest.mark.parametrize("name", ["decode_forward", "decode_for_assignment"])
def test_the_cuda_part_loads_without_a_gpu(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"yolov9_fast::{name}", "CUDA")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_cuda_agrees_with_the_cpu_and_does_not_synchronise(dtype: torch.dtype, layout: torch.memory_format) -> None:
    maps = [torch.randn(8, 144, s, s).to(dtype).to(memory_format=layout) for s in (80, 40, 20)]
    maps_cuda, labels = [level.cuda() for level in maps], torch.randint(0, 80, (8, 20))
    labels_cuda = labels.cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with yf.backend("cuda"):
            out, got = decode(maps_cuda), decode_for_assignment(maps_cuda, labels_cuda)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with yf.backend("cpu"):
        torch.testing.assert_close(out.cpu(), decode(maps), rtol=1e-5, atol=1e-4)
        for a, b in zip(got, decode_for_assignment(maps, labels), strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
@needs_gpu
def test_cuda_is_captured_in_a_graph() -> None:
    maps = [torch.randn(2, 144, s, s, device="cuda") for s in (80, 40, 20)]
    with yf.backend("cuda"):
        expected = decode(maps)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = decode(maps)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
