"""pad_targets: target rows of a batch, sorted by image and padded."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from yolov9_fast.losses.targets import pad_targets, sort_rows

SIZE = (64, 128)


def test_rows_keep_their_order_within_their_image() -> None:
    targets = torch.tensor(
        [[2, 5, 0.5, 0.5, 0.5, 0.5], [0, 1, 0.25, 0.5, 0.5, 1.0], [2, 3, 0.5, 0.25, 0.25, 0.5]], dtype=torch.float32
    )
    padded = pad_targets(targets, 3, 6, SIZE, torch.float32)
    assert padded.labels.tolist() == [[1, 0], [0, 0], [5, 3]]
    assert padded.mask.tolist() == [[True, False], [False, False], [True, True]]
    assert padded.boxes[0].tolist() == [[0, 0, 64, 64], [0, 0, 0, 0]]
    assert padded.boxes[2].tolist() == [[32, 16, 96, 48], [48, 0, 80, 32]]


def test_no_rows_pad_to_nothing() -> None:
    padded = pad_targets(torch.zeros(0, 6), 4, 2, SIZE, torch.float32)
    assert padded.labels.shape == padded.mask.shape == (4, 0)
    assert padded.boxes.shape == (4, 0, 4)


def test_a_row_without_size_is_real_and_one_at_the_origin_is_not() -> None:
    rows = torch.tensor([[0, 0, 0.5, 0.5, 0, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.float32)
    assert pad_targets(rows, 1, 1, SIZE, torch.float32).mask.tolist() == [[True, False]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([3.0, 0, 0.5, 0.5, 0.1, 0.1], "expected image indices in [0, 3), got 3..3"),
        ([-1.0, 0, 0.5, 0.5, 0.1, 0.1], "expected image indices in [0, 3), got -1..-1"),
        ([0.0, 2, 0.5, 0.5, 0.1, 0.1], "expected classes in [0, 2), got 2..2"),
        ([0.0, float("nan"), 0.5, 0.5, 0.1, 0.1], "expected classes in [0, 2), got nan..nan"),
    ],
)
def test_an_index_out_of_range_is_named(row: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^targets: {re.escape(message)}$"):
        pad_targets(torch.tensor([row]), 3, 2, SIZE, torch.float32)


def test_another_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"targets: expected \[n, 6\]"):
        pad_targets(torch.zeros(3, 5), 3, 2, SIZE, torch.float32)


def test_a_fixed_count_pads_every_image_to_it() -> None:
    rows = torch.tensor([[0, 1, 0.5, 0.5, 0.1, 0.1], [0, 2, 0.4, 0.5, 0.1, 0.1], [2, 0, 0.5, 0.5, 0.2, 0.2]])
    free, fixed = pad_targets(rows, 3, 3, SIZE, torch.float32), pad_targets(rows, 3, 3, SIZE, torch.float32, 5)
    assert fixed.labels.shape == (3, 5)
    assert fixed.fits is None
    assert torch.equal(fixed.labels[:, :2], free.labels)
    assert torch.equal(fixed.boxes[:, :2], free.boxes)
    assert not fixed.mask[:, 2:].any()
    with pytest.raises(ValueError, match=r"expected at most 1 \(max_objects\) rows per image, got 2"):
        pad_targets(rows, 3, 3, SIZE, torch.float32, 1)


def test_rows_sorted_without_synchronisation_are_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (0, 1, 40):
        image = torch.randint(0, 6, (count, 1), generator=generator).float()
        label = torch.randint(0, 4, (count, 1), generator=generator).float()
        rows = torch.cat((image, label, torch.rand(count, 4, generator=generator)), 1)
        waited, placed = (make(rows, 6, 4, SIZE, torch.float32, 30) for make in (pad_targets, sort_rows))
        assert placed.fits is not None
        assert placed.fits
        for name in ("labels", "boxes", "mask"):
            assert torch.equal(getattr(waited, name), getattr(placed, name))


@pytest.mark.parametrize("wrong", [[3.0, 0], [-1.0, 0], [0.0, 2], [0.0, float("nan")], [float("nan"), 0]])
def test_rows_without_a_slot_are_left_out_and_reported(wrong: list[float]) -> None:
    good = [1.0, 1, 0.5, 0.5, 0.1, 0.1]
    placed = sort_rows(torch.tensor([[*wrong, 0.5, 0.5, 0.1, 0.1], good]), 3, 2, SIZE, torch.float32, 2)
    assert placed.fits is not None
    assert not placed.fits
    assert placed.mask.tolist() == [[False, False], [True, False], [False, False]]
    crowded = sort_rows(torch.tensor([good, good, good]), 3, 2, SIZE, torch.float32, 2)
    assert crowded.fits is not None
    assert not crowded.fits
    assert crowded.mask.sum() == 2


class CopiesToTheGpu(TorchFunctionMode):
    """Pretends to copy to a GPU; notes of each copy whether it is from page-locked memory and asynchronous."""

    def __init__(self) -> None:
        super().__init__()
        self.locked: list[Tensor] = []
        self.copies: list[tuple[bool, bool]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.pin_memory:
            self.locked.append(args[0].clone())
            return self.locked[-1]
        if func is Tensor.to and torch.device("cuda", 0) in (*args, *kwargs.values()):
            locked = any(args[0] is tensor for tensor in self.locked)
            self.copies.append((locked, kwargs.get("non_blocking", False)))
            return args[0]
        return func(*args, **kwargs)


def test_targets_are_copied_to_a_gpu_without_waiting_for_it() -> None:
    rows = torch.tensor([[0, 1, 0.5, 0.5, 0.4, 0.6], [1, 0, 0.3, 0.6, 0.2, 0.2]])
    padded = pad_targets(rows, 2, 3, (64, 64), torch.float32)
    with CopiesToTheGpu() as calls:
        there = padded._replace(fits=torch.tensor(True)).to(torch.device("cuda", 0), torch.float64)
    assert calls.copies == [(True, True)] * 4
    assert there.boxes.dtype == torch.float64
    with CopiesToTheGpu() as calls:
        padded.to(torch.device("cpu"), torch.float32)
    assert not calls.locked  # a run on a CPU, also where there is a GPU
