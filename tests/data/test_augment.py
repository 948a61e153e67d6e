"""Built-in augmentations: boxes move with the pixels; probabilities and strengths."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from tests.data.drawing import box_of_colour, paint
from yolov9_fast.data import AugmentConfig, LabelledImage
from yolov9_fast.data.augment import Objects, copy_paste, mixup, random_affine, random_flips, random_hsv
from yolov9_fast.data.plan import map_to_canvas, paste
from yolov9_fast.ops import augment

NOTHING = AugmentConfig(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


def labelled(
    *objects: tuple[int, int, int, int, int], height: int = 160, width: int = 160, polygons: bool = False
) -> LabelledImage:
    boxes = np.array([item[1:] for item in objects], np.float32).reshape(-1, 4)
    corners = [np.array([[a, b], [c, b], [c, d], [a, d]], np.float32) for a, b, c, d in boxes]
    classes = np.array([item[0] for item in objects], np.float32)
    return LabelledImage(paint(height, width, list(objects)), classes, boxes, list(corners) if polygons else [])


def objects_of(start: LabelledImage) -> Objects:
    return Objects(start.classes, start.boxes, start.polygons)


def rendered(
    start: LabelledImage,
    size: int,
    *,
    matrix: np.ndarray | None = None,
    tables: np.ndarray | None = None,
    flips: tuple[bool, bool] = (False, False),
    perspective: bool = False,
) -> np.ndarray:
    """The image by the operator, BGR [size, size, 3]; `matrix` from canvas to image, as `random_affine` gives it."""
    found = augment(
        torch.from_numpy(start.image.reshape(-1)),
        torch.tensor([[[[0, *start.size, 0, 0]]]]),
        torch.tensor([[start.size]]),
        torch.from_numpy(map_to_canvas(np.eye(3) if matrix is None else matrix, perspective))[None, None],
        None if tables is None else torch.from_numpy(tables)[None],
        torch.tensor([flips]),
        torch.ones(1, dtype=torch.float64),
        size,
        perspective,
    )
    return np.ascontiguousarray(found[0].flip(0).permute(1, 2, 0).numpy())


def affine(start: LabelledImage, size: int, config: AugmentConfig, rng: np.random.Generator) -> LabelledImage:
    matrix, objects = random_affine(objects_of(start), start.size, (size, size), config, rng)
    image = rendered(start, size, matrix=matrix, perspective=config.perspective > 0)
    return LabelledImage(image, objects.classes, objects.boxes)


def coloured(image: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    start = LabelledImage(image, np.zeros(0, np.float32), np.zeros((0, 4), np.float32))
    return rendered(start, len(image), tables=random_hsv(config, rng))


def pasted(start: LabelledImage, share: float) -> LabelledImage:
    polygons, objects = copy_paste(objects_of(start), start.size[1], share, rng())
    image = start.image.copy()
    paste(image, polygons)
    return LabelledImage(image, objects.classes, objects.boxes, objects.polygons)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("kind", ["flipud", "fliplr"])
def test_flip_moves_the_box_with_the_pixels(kind: str) -> None:
    start = labelled((0, 10, 20, 50, 40), (1, 100, 70, 130, 110))
    flips, objects = random_flips(objects_of(start), (160, 160), replace(NOTHING, **{kind: 1.0}), rng())
    image = rendered(start, 160, flips=flips)
    assert not np.array_equal(image, start.image)
    for label, box in zip(objects.classes, objects.boxes, strict=True):
        assert box_of_colour(image, int(label)) == tuple(box)


@pytest.mark.parametrize(
    ("change", "tolerance"),
    [
        ({"scale": 0.5}, 1.0),
        ({"translate": 0.2}, 1.0),
        ({"shear": 8.0}, 1.5),
        ({"degrees": 30.0}, 1.5),
        ({"perspective": 0.001}, 1.5),
        ({"scale": 0.3, "degrees": 20.0, "translate": 0.1, "shear": 5.0}, 1.5),
    ],
)
@pytest.mark.parametrize("polygons", [False, True])
def test_affine_moves_the_box_with_the_pixels(change: dict, tolerance: float, polygons: bool) -> None:
    found = 0
    for seed in range(12):
        start = labelled((0, 40, 40, 90, 80), polygons=polygons)
        result = affine(start, 160, replace(NOTHING, **change), rng(seed))
        seen = box_of_colour(result.image, 0)
        if len(result.boxes) == 0:
            continue
        found += 1
        assert seen is not None
        np.testing.assert_allclose(result.boxes[0], seen, atol=tolerance)
    assert found >= 10


@pytest.mark.parametrize("extra", [{}, {"degrees": 45.0, "shear": 20.0, "scale": 0.9, "translate": 0.5}])
def test_the_strongest_perspective_leaves_every_label_on_its_object(extra: dict) -> None:
    corners = [(x, y) for x in (0, 1200, 2400) for y in (0, 1200, 2400)]
    boxes = np.array([(x, y, x + 160, y + 160) for x, y in corners], np.float32)
    inner = np.stack(np.meshgrid(np.linspace(0, 160, 33), np.linspace(0, 160, 33)), axis=-1).reshape(-1, 2)
    for seed in range(40):
        start = Objects(np.arange(9, dtype=np.float32), boxes)
        config = replace(NOTHING, perspective=0.001, **extra)
        matrix, result = random_affine(start, (2560, 2560), (1280, 1280), config, rng(seed))
        assert (matrix[2, :2] @ np.array([[0, 0, 2560, 2560], [0, 2560, 0, 2560]]) + matrix[2, 2] > 0).all()
        for label, (x1, y1, x2, y2) in zip(result.classes, result.boxes, strict=True):
            x, y, w = matrix @ np.column_stack((inner + corners[int(label)], np.ones(len(inner)))).T
            drawn = (x1 - 3 <= x / w) & (x / w <= x2 + 3) & (y1 - 3 <= y / w) & (y / w <= y2 + 3)
            assert drawn.any(), (seed, label)


def test_affine_without_strength_changes_nothing() -> None:
    start = labelled((0, 40, 40, 90, 80))
    result = affine(start, 160, NOTHING, rng())
    assert np.array_equal(result.image, start.image)
    np.testing.assert_allclose(result.boxes, start.boxes, atol=1e-4)


def test_affine_to_a_smaller_canvas_keeps_the_centre() -> None:
    result = affine(labelled((0, 60, 50, 100, 70), height=120), 80, NOTHING, rng())
    assert result.image.shape == (80, 80, 3)
    np.testing.assert_allclose(result.boxes, [[20, 30, 60, 50]], atol=1e-4)
    assert box_of_colour(result.image, 0) == (20, 30, 60, 50)


def test_rotated_polygon_gives_a_smaller_box_than_its_rotated_box() -> None:
    start = labelled((0, 40, 20, 120, 100))
    diamond = np.array([[80, 20], [120, 60], [80, 100], [40, 60]], np.float32)
    with_polygon = replace_polygon(start, diamond)
    config = replace(NOTHING, degrees=45.0)
    loose, tight = (affine(item, 160, config, rng(1)).boxes[0] for item in (start, with_polygon))
    assert np.prod(tight[2:] - tight[:2]) < 0.8 * np.prod(loose[2:] - loose[:2])


def replace_polygon(start: LabelledImage, polygon: np.ndarray) -> LabelledImage:
    return LabelledImage(start.image, start.classes, start.boxes, [polygon])


@pytest.mark.parametrize(
    ("box", "polygons", "kept"),
    [
        ((0, 0, 100, 100), False, True),  # 36 % of the box is on the canvas
        ((0, 0, 47, 100), False, False),  # 7/47 × 60/100 = 9 %
        ((0, 0, 47, 100), True, True),  # a polygon stays down to 1 %
        ((60, 60, 62, 90), False, False),  # 2 px wide
        ((60, 60, 63, 90), False, True),
        ((0, 0, 30, 30), False, False),  # outside
        ((0, 0, 30, 30), True, False),
    ],
)
def test_only_visible_objects_are_kept(box: tuple[int, int, int, int], polygons: bool, kept: bool) -> None:
    start = labelled((0, *box), height=140, width=160, polygons=polygons)
    _, result = random_affine(objects_of(start), start.size, (60, 80), NOTHING, rng())  # sees x 40..120, y 40..100
    assert (len(result.boxes) == 1) == kept


def test_hsv_without_strength_is_the_same_image_and_with_it_changes_within_bounds() -> None:
    image = rng().integers(0, 255, (30, 30, 3), np.uint8)
    assert random_hsv(NOTHING, rng()) is None
    assert np.array_equal(coloured(image, NOTHING, rng()), image)
    value = np.full((8, 8, 3), 100, np.uint8)
    config = replace(NOTHING, hsv_v=0.4)
    levels = {int(coloured(value, config, rng(seed))[0, 0, 0]) for seed in range(200)}
    assert min(levels) >= 60
    assert max(levels) <= 140
    assert min(levels) < 65
    assert max(levels) > 135


def test_hue_wraps_around() -> None:
    red = np.full((4, 4, 3), 0, np.uint8)
    red[..., 2] = 255
    red[..., 0] = 10  # hue just below 180
    for seed in range(20):
        hue = cv2.cvtColor(coloured(red, replace(NOTHING, hsv_h=0.1), rng(seed)), cv2.COLOR_BGR2HSV)[0, 0, 0]
        assert hue < 22 or hue > 158


def test_mixup_blends_and_keeps_the_objects_of_both() -> None:
    first, second = labelled((0, 10, 10, 60, 60)), labelled((1, 80, 50, 120, 100))
    share, result = mixup(objects_of(first), objects_of(second), rng())
    assert result.classes.tolist() == [0, 1]
    assert np.array_equal(result.boxes, np.concatenate((first.boxes, second.boxes)))
    assert 0.2 < share < 0.8


def test_copy_paste_mirrors_object_and_box() -> None:
    start = labelled((0, 10, 20, 50, 60), polygons=True)
    result = pasted(start, 1.0)
    assert result.classes.tolist() == [0, 0]
    assert result.boxes[1].tolist() == [110, 20, 150, 60]
    assert box_of_colour(result.image[:, 80:], 0) == (30, 20, 70, 60)
    assert result.polygons[1] is not None
    assert result.polygons[1][:, 0].min() == 110


def test_copy_paste_never_covers_an_object() -> None:
    start = labelled((0, 10, 20, 50, 60), (1, 105, 15, 140, 65), polygons=True)
    start.polygons[1] = None
    result = pasted(start, 1.0)
    assert len(result.boxes) == 2
    assert np.array_equal(result.image, start.image)


def test_copy_paste_leaves_boxes_without_polygon_alone() -> None:
    start = labelled((0, 10, 20, 50, 60))
    objects = objects_of(start)
    assert copy_paste(objects, 160, 1.0, rng()) == ([], objects)


def test_copy_paste_copies_the_given_share() -> None:
    objects = [(0, 2, y, 12, y + 8) for y in range(0, 100, 10)]
    result = pasted(labelled(*objects, polygons=True), 0.3)
    assert len(result.boxes) == 13


def test_every_augmentation_takes_an_image_without_objects() -> None:
    config = AugmentConfig()
    _, result = copy_paste(Objects(np.zeros(0, np.float32), np.zeros((0, 4), np.float32)), 128, 1.0, rng())
    _, result = random_affine(result, (128, 128), (64, 64), config, rng())
    _, result = random_flips(result, (64, 64), config, rng())
    assert mixup(result, result, rng())[1].boxes.shape == (0, 4)


@pytest.mark.parametrize(
    "wrong", [{"mosaic": 1.5}, {"fliplr": -0.1}, {"scale": 1.0}, {"degrees": 200.0}, {"hsv_h": float("nan")}]
)
def test_strength_out_of_range_is_named(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AugmentConfig(**wrong)
