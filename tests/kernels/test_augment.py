"""The Triton kernel of `augment`, interpreted, gives OpenCV's pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from yolov9_fast.kernels import augment
from yolov9_fast.kernels.launch import INTERPRETED

from yolov9_fast.ops._augment import augment_reference

DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="neither a GPU nor interpreted"
)


def plans(
    seed: int, batch: int = 2, views: int = 2, tiles: int = 4, size: int = 32, perspective: bool = False
) -> list[Any]:
    """Arguments of the kernel: canvases with `tiles` places of which four have an image; of two views every other
    sample has one."""
    draw = np.random.default_rng(seed)
    placed = np.zeros((batch, views, tiles, 5), np.int64)
    canvases = np.zeros((batch, views, 2), np.int64)
    matrices = np.zeros((batch, views, 3, 3))
    end = 0
    for sample in range(batch):
        for view in range(views if sample % 2 == 0 else 1):
            canvases[sample, view] = 2 * size
            centre = draw.integers(size // 2, 3 * size // 2, 2)
            for tile in range(min(tiles, 4)):
                height, width = draw.integers(size // 4, size + 1, 2)
                left = centre[0] - (0 if tile % 2 else width)
                top = centre[1] - (0 if tile // 2 else height)
                placed[sample, view, tile] = end, height, width, left, top
                end += height * width * 3
            scale, angle = draw.uniform(0.4, 1.9), draw.uniform(-0.3, 0.3)
            turned = scale * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
            matrix = np.eye(3)
            matrix[:2, :2], matrix[:2, 2] = turned, draw.uniform(-size / 2, size / 2, 2)
            matrix[2, :2] = draw.uniform(-4e-3, 4e-3, 2) * perspective
            matrices[sample, view] = np.linalg.inv(matrix)
    tables = draw.integers(0, 256, (batch, 3, 256), np.uint8)
    tables[:, 0] %= 180
    arrays = (draw.integers(0, 256, end, np.uint8), placed, canvases, matrices, tables)
    flips, shares = draw.random((batch, 2)) < 0.5, draw.beta(32, 32, batch)
    tensors = [torch.from_numpy(each).to(DEVICE) for each in (*arrays, flips, shares)]
    return [*tensors, size, perspective]


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"views": 1, "tiles": 1},
        {"tiles": 9, "batch": 1},
        {"perspective": True},
        {"views": 1, "perspective": True, "size": 64, "batch": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("coloured", [True, False])
def test_every_pixel_is_that_of_opencv(form: dict[str, Any], coloured: bool) -> None:
    given = plans(3, **form)
    if not coloured:
        given[4] = None
    assert torch.equal(augment.augment(*given), augment_reference(*given))


def test_later_calls_use_their_own_plans() -> None:
    for seed in (0, 1):
        given = plans(seed)
        assert torch.equal(augment.augment(*given), augment_reference(*given))


def test_a_size_with_columns_beyond_opencvs_vectors_differs_by_a_level() -> None:
    """OpenCV rounds, and does not truncate, the colours of the last columns of a row there."""
    given = plans(5, size=27)
    far = (augment.augment(*given).int() - augment_reference(*given).int()).abs()
    assert far.max() <= 1


def test_an_exact_identity_copies() -> None:
    pixels = torch.randint(0, 256, (32 * 32 * 3,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tiles = torch.tensor([[[[0, 32, 32, 0, 0]]]])
    sides, eye = torch.tensor([[[32, 32]]]), torch.eye(3, dtype=torch.float64)[None, None]
    no, one = torch.zeros(1, 2, dtype=torch.bool), torch.ones(1, dtype=torch.float64)
    given = [each.to(DEVICE) for each in (pixels, tiles, sides, eye)]
    found = augment.augment(*given, None, no.to(DEVICE), one.to(DEVICE), 32, False)
    assert torch.equal(found[0].cpu(), pixels.view(32, 32, 3).flip(2).permute(2, 0, 1))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30, 0.0])
def test_coordinates_that_are_no_numbers_or_far_away_are_grey_and_read_nothing(value: float) -> None:
    given = plans(0, views=1, perspective=True)
    given[3][:] = value
    given[4] = None
    found = augment.augment(*given)
    if value:
        assert (found == 114).all()


def test_hues_saturations_and_values_return_as_opencv_has_them() -> None:
    """A sample for each of 24 hues and saturations, with all values."""
    levels = torch.arange(256, dtype=torch.uint8)
    pixels = levels.repeat(4).repeat_interleave(3).to(DEVICE)  # 32 x 32 greys: their value is their level
    draw = np.random.default_rng(0)
    tables = torch.zeros(24, 3, 256, dtype=torch.uint8)
    tables[:, 0] = torch.from_numpy(draw.integers(0, 180, (24, 1)))
    tables[:, 1] = torch.from_numpy(draw.integers(0, 256, (24, 1)))
    tables[:, 2] = levels
    given = [
        torch.tensor([[[[0, 32, 32, 0, 0]]]]).repeat(24, 1, 1, 1),
        torch.full((24, 1, 2), 32),
        torch.eye(3, dtype=torch.float64).repeat(24, 1, 1, 1),
        tables,
        torch.zeros(24, 2, dtype=torch.bool),
        torch.ones(24, dtype=torch.float64),
    ]
    given = [each.to(DEVICE) for each in given]
    assert torch.equal(augment.augment(pixels, *given, 32, False), augment_reference(pixels, *given, 32, False))


def test_a_later_call_has_a_result_of_its_own() -> None:
    given = plans(0, batch=1)
    first = augment.augment(*given)
    kept = first.clone()
    augment.augment(*given[:3], given[3] + 1, *given[4:])
    assert torch.equal(first, kept)
