"""The augmentation operator: what it computes, on every backend; wrong arguments."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import yolov9_fast as yf
from yolov9_fast import ops
from yolov9_fast.ops import _library

GREY = 114


def arguments(**changed: Any) -> dict[str, Any]:
    """One sample of one image of 6 x 8 at (1, 2) of a canvas of 10 x 10, seen as it is."""
    given: dict[str, Any] = {
        "pixels": torch.arange(200, dtype=torch.uint8),
        "tiles": torch.tensor([[[[10, 6, 8, 1, 2]]]]),
        "canvases": torch.tensor([[[10, 10]]]),
        "matrices": torch.eye(3, dtype=torch.float64)[None, None],
        "tables": None,
        "flips": torch.zeros(1, 2, dtype=torch.bool),
        "shares": torch.ones(1, dtype=torch.float64),
        "size": 10,
    }
    return given | changed


def expected() -> Tensor:
    canvas = torch.full((10, 10, 3), GREY, dtype=torch.uint8)
    canvas[2:8, 1:9] = torch.arange(10, 154, dtype=torch.uint8).view(6, 8, 3)
    return canvas.flip(2).permute(2, 0, 1)


def same(found: Tensor, expected: Tensor) -> bool:
    """Bit for bit where the kernel has the multiply-add that OpenCV's code has; else but for few pixels."""
    if torch.equal(found, expected):
        return True
    fused = "fma" in _library.build_info().get("cpu_features", [])
    return not fused and bool(((found.int() - expected.int()).abs() > 1).double().mean() < 1e-3)


def drawn(seed: int) -> dict[str, Any]:
    """Samples of one or two views of random images, maps and tables; the images are noise, its worst input."""
    rng = np.random.default_rng(seed)
    size = int(rng.choice([1, 2, 5, 31, 32, 47, 64, 65, 96, 130]))
    batch, views, count = int(rng.integers(1, 4)), int(rng.integers(1, 3)), int(rng.choice([1, 4, 8]))
    side = int(rng.choice([1, 2, 3, size, 2 * size, 3 * size]))
    tiles = np.zeros((batch, views, count, 5), np.int64)
    end = 0
    for view in tiles.reshape(-1, count, 5):
        # Rows of at most three tiles around random places, which do not overlap; some are outside of the canvas.
        tops = np.cumsum([rng.integers(-side, side // 2 + 1), *rng.integers(1, side + 2, 3)])
        for index in range(count):
            row, column = divmod(index, 3)
            height, width = (int(each) for each in rng.integers(0, tops[row + 1] - tops[row] + 1, 2))
            left = (column - 1) * (tops[row + 1] - tops[row]) + int(rng.integers(0, side + 1)) // 2 * (count == 1)
            view[index] = (end, height, width, left, tops[row])
            end += height * width * 3
    matrices = np.tile(np.eye(3), (batch, views, 1, 1))
    perspective = bool(rng.random() < 0.4)
    if rng.random() < 0.8:
        matrices[..., :2, :2] += rng.normal(0, rng.choice([1e-3, 0.3, 2]), (batch, views, 2, 2))
        matrices[..., :2, 2] = rng.uniform(-side / 2, side, (batch, views, 2))
        matrices[..., 2, :2] = rng.uniform(-0.4, 0.4, (batch, views, 2)) / size * perspective
    canvases = np.full((batch, views, 2), side)
    canvases[:, 1:] *= rng.random((batch, views - 1, 1)) < 0.7
    tables = rng.integers(0, 256, (batch, 3, 256), np.uint8)
    tables[:, 0] %= 180
    return {
        "pixels": torch.from_numpy(rng.integers(0, 256, end + int(rng.integers(0, 3)), np.uint8)),
        "tiles": torch.from_numpy(tiles),
        "canvases": torch.from_numpy(canvases),
        "matrices": torch.from_numpy(matrices),
        "tables": torch.from_numpy(tables) if rng.random() < 0.6 else None,
        "flips": torch.from_numpy(rng.random((batch, 2)) < 0.5),
        "shares": torch.from_numpy(rng.random(batch)),
        "size": size,
        "perspective": perspective,
    }


COMPILED = pytest.mark.skipif(
    _library.why_not_compiled("augment", "cpu") is not None, reason="the operator is not compiled"
)


@COMPILED
@pytest.mark.parametrize("seed", range(150))
def test_the_kernel_is_opencv_bit_for_bit(seed: int) -> None:
    given = drawn(seed)
    with yf.backend("eager"):
        wanted = ops.augment(**given)
    with yf.backend("cpu"):
        assert same(ops.augment(**given), wanted)


@COMPILED
def test_a_large_image_on_a_large_canvas() -> None:
    tiles = torch.tensor([[[[0, 4000, 3000, 100, 200]]]])
    matrix = torch.tensor([[1.01, 0.02, 5.5], [-0.03, 0.99, 7.25], [0, 0, 1]], dtype=torch.float64)[None, None]
    pixels = torch.randint(0, 256, (36_000_000,), generator=torch.Generator().manual_seed(1)).byte()
    given = arguments(pixels=pixels, tiles=tiles, matrices=matrix, canvases=torch.full((1, 1, 2), 4200), size=3200)
    with yf.backend("eager"):
        wanted = ops.augment(**given)
    assert same(ops.augment(**given), wanted)


@COMPILED
@pytest.mark.parametrize("threads", [1, 3])
def test_a_batch_is_its_samples(threads: int) -> None:
    given = drawn(3)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = ops.augment(**given)
    finally:
        torch.set_num_threads(before)
    for index in range(len(together)):
        one = {
            name: each[index : index + 1] if isinstance(each, Tensor) and name != "pixels" else each
            for name, each in given.items()
        }
        assert torch.equal(ops.augment(**one)[0], together[index])


@COMPILED
def test_every_colour_changes_as_in_opencv() -> None:
    colours = torch.arange(2**24, dtype=torch.int32)[:: 1 if os.environ.get("YOLOV9_FAST_EVERY_COLOUR") else 61]
    side = int(len(colours) ** 0.5)
    colours = colours[: side * side]
    pixels = torch.stack((colours & 255, colours >> 8 & 255, colours >> 16), 1).byte().reshape(-1)
    tables = torch.randint(0, 256, (1, 3, 256), generator=torch.Generator().manual_seed(0)).byte()
    for tables_of in (tables, torch.arange(256).byte().repeat(1, 3, 1)):
        given = arguments(
            pixels=pixels,
            tiles=torch.tensor([[[[0, side, side, 0, 0]]]]),
            canvases=torch.tensor([[[side, side]]]),
            tables=tables_of,
            size=side,
        )
        with yf.backend("eager"):
            wanted = ops.augment(**given)
        assert torch.equal(ops.augment(**given), wanted)


def test_an_image_on_a_canvas_becomes_rgb_planes() -> None:
    assert torch.equal(ops.augment(**arguments())[0], expected())


@pytest.mark.parametrize(("flips", "sides"), [((True, False), [1]), ((False, True), [2]), ((True, True), [1, 2])])
def test_flips(flips: tuple[bool, bool], sides: list[int]) -> None:
    found = ops.augment(**arguments(flips=torch.tensor([flips])))
    assert torch.equal(found[0], expected().flip(sides))


def test_a_canvas_cuts_its_images_and_a_height_of_zero_is_none() -> None:
    tiles = torch.tensor([[[[0, 2, 2, -1, 9], [0, 2, 2, 9, -1], [0, 0, 9, 3, 3], [0, 2, 2, -2, 0]]]])
    pixels = torch.arange(12, dtype=torch.uint8)
    found = ops.augment(**arguments(tiles=tiles, pixels=pixels))[0]
    assert found[:, 9, 0].tolist() == [5, 4, 3]
    assert found[:, 0, 9].tolist() == [8, 7, 6]
    assert (found == GREY).sum() == 300 - 6


@pytest.mark.parametrize("perspective", [False, True])
def test_half_a_pixel_is_the_mean_of_two_across_a_seam(perspective: bool) -> None:
    tiles = torch.tensor([[[[0, 10, 5, 0, 0], [150, 10, 5, 5, 0]]]])
    pixels = torch.cat((torch.full((150,), 10), torch.full((150,), 30))).to(torch.uint8)
    matrix = torch.eye(3, dtype=torch.float64)[None, None].clone()
    matrix[0, 0, 0, 2] = 0.5
    given = arguments(tiles=tiles, pixels=pixels, matrices=matrix)
    found = ops.augment(**given, perspective=perspective)[0, 0, 4]
    assert found.tolist() == [10, 10, 10, 10, 20, 30, 30, 30, 30, (30 + GREY) // 2]


def test_two_views_are_blended() -> None:
    tiles = torch.tensor([[[[0, 10, 10, 0, 0]], [[300, 10, 10, 0, 0]]]])
    pixels = torch.cat((torch.full((300,), 10), torch.full((300,), 30))).to(torch.uint8)
    given = arguments(
        tiles=tiles,
        pixels=pixels,
        canvases=torch.full((1, 2, 2), 10),
        matrices=torch.eye(3, dtype=torch.float64).expand(1, 2, 3, 3),
        shares=torch.tensor([0.75], dtype=torch.float64),
    )
    assert (ops.augment(**given) == 15).all()
    given["canvases"] = torch.tensor([[[10, 10], [0, 0]]])
    assert (ops.augment(**given) == 10).all()


def test_tables_change_hue_saturation_and_value() -> None:
    tables = np.tile(np.arange(256, dtype=np.uint8), (3, 1))
    tables[2] //= 2
    pixels = torch.full((300,), 100, dtype=torch.uint8)
    given = arguments(pixels=pixels, tiles=torch.tensor([[[[0, 10, 10, 0, 0]]]]), tables=torch.from_numpy(tables)[None])
    assert (ops.augment(**given) == 50).all()


def test_no_sample_is_an_empty_batch() -> None:
    given = {name: each[:0] if isinstance(each, Tensor) else each for name, each in arguments().items()}
    assert ops.augment(**given).shape == (0, 3, 10, 10)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("pixels", torch.zeros(200), TypeError, "pixels: expected a tensor of uint8, got torch.float32"),
        ("pixels", None, TypeError, "pixels: expected a tensor of uint8, got NoneType"),
        ("pixels", torch.zeros(2, 100, dtype=torch.uint8), ValueError, "pixels: expected [n], got [2, 100]"),
        ("pixels", torch.zeros(153, dtype=torch.uint8), ValueError,
         "tiles: expected images inside the 153 bytes of pixels, got 144 at 10"),
        ("tiles", torch.zeros(1, 3, 1, 5, dtype=torch.int64), ValueError,
         "tiles: expected [B, 1 or 2, T, 5] with T of at least 1, got [1, 3, 1, 5]"),
        ("tiles", torch.tensor([[[[-1, 6, 8, 1, 2]]]]), ValueError,
         "tiles: expected images inside the 200 bytes of pixels, got 144 at -1"),
        ("tiles", torch.tensor([[[[0, -6, -8, 1, 2]]]]), ValueError,
         "tiles: expected heights and widths of 0..32766, got -6"),
        ("tiles", torch.tensor([[[[0, 2**40, 8, 1, 2]]]]), ValueError,
         "tiles: expected heights and widths of 0..32766, got 1099511627776"),
        ("tiles", torch.tensor([[[[0, 6, 8, 2**40, 2]]]]), ValueError,
         "tiles: expected places within 2^30 pixels, got 1099511627776"),
        ("canvases", torch.tensor([[[0, 0]]]), ValueError, "canvases: expected sides of 1..32766, got 0x0"),
        ("canvases", torch.tensor([[[5, 40000]]]), ValueError, "canvases: expected sides of 1..32766, got 5x40000"),
        ("canvases", torch.ones(2, 1, 2, dtype=torch.int64), ValueError,
         "canvases: expected [1, 1, 2], got [2, 1, 2]"),
        ("matrices", torch.full((1, 1, 3, 3), float("nan"), dtype=torch.float64), ValueError,
         "matrices: expected finite numbers, got NaN or infinity"),
        ("matrices", torch.zeros(1, 1, 3, 3), TypeError, "matrices: expected a tensor of float64, got torch.float32"),
        ("tables", torch.zeros(1, 3, 180, dtype=torch.uint8), ValueError,
         "tables: expected [1, 3, 256], got [1, 3, 180]"),
        ("flips", torch.zeros(1, 2), TypeError, "flips: expected a tensor of bool, got torch.float32"),
        ("flips", torch.zeros(1, 2, dtype=torch.bool, device="meta"), ValueError,
         "pixels, tiles, canvases, matrices, flips, shares: expected tensors on one device, got pixels on cpu, tiles "
         "on cpu, canvases on cpu, matrices on cpu, flips on meta, shares on cpu"),
        ("shares", torch.zeros(2, dtype=torch.float64), ValueError, "shares: expected [1], got [2]"),
        ("size", 0, ValueError, "size: expected 1..32766, got 0"),
        ("size", 2.0, TypeError, "size: expected an int, got float"),
        ("perspective", 1, TypeError, "perspective: expected a bool, got int"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named(name: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        ops.augment(**arguments(**{name: value}))
    assert str(raised.value) == message


def test_opcheck() -> None:
    given = arguments()
    torch.library.opcheck(torch.ops.yolov9_fast.augment.default, (*given.values(), False))
    given["tables"] = torch.arange(256, dtype=torch.uint8).repeat(1, 3, 1)
    torch.library.opcheck(torch.ops.yolov9_fast.augment.default, (*given.values(), True))


def test_a_backend_by_name_that_has_no_kernel_raises() -> None:
    with yf.backend("cuda", "augment"), pytest.raises(ops.BackendUnavailable, match="augment: backend 'cuda' is set"):
        ops.augment(**arguments())
