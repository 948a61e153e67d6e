"""Boxes and labels: position, colour, kinds of images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

cv2 = pytest.importorskip("cv2")

from yolov9_fast.viz import class_color, draw_detections, draw_targets  # noqa: E402
from yolov9_fast.viz.color import text_color  # noqa: E402

NAMES = {0: "cat", 1: "dog", 2: "a very long class name indeed"}


def bgr(index: int) -> list[int]:
    return list(class_color(index)[::-1])


def detections(*rows: tuple[float, ...]) -> np.ndarray:
    return np.array(rows, dtype=np.float64).reshape(-1, 6)


def changed(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    return (before != after).any(axis=2)


def test_a_box_has_its_edges_in_its_colour_and_leaves_the_rest_alone() -> None:
    image = np.full((200, 300, 3), 30, np.uint8)
    drawn = draw_detections(image, detections((50, 60, 150, 160, 0.9, 1)), NAMES, hide_labels=True, line_width=1)
    for x, y in ((50, 100), (150, 100), (100, 60), (100, 160), (50, 60), (150, 160)):
        assert drawn[y, x].tolist() == bgr(1)
    expected = np.zeros((200, 300), dtype=bool)
    expected[60:161, 50:151] = True
    expected[61:160, 51:150] = False
    np.testing.assert_array_equal(changed(image, drawn), expected)


def test_the_given_image_is_not_changed() -> None:
    image = np.full((60, 60, 3), 30, np.uint8)
    drawn = draw_detections(image, detections((5, 20, 50, 50, 0.9, 0)), NAMES)
    assert (image == 30).all()
    assert (drawn != 30).any()


def test_no_detections_give_an_equal_copy() -> None:
    image = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    drawn = draw_detections(image, detections(), NAMES)
    np.testing.assert_array_equal(drawn, image)
    assert not np.shares_memory(drawn, image)


def test_a_label_is_above_its_box_or_inside_without_space_above() -> None:
    image = np.full((200, 300, 3), 30, np.uint8)
    above = changed(image, draw_detections(image, detections((50, 100, 150, 180, 0.9, 0)), NAMES, line_width=1))
    assert above[:99].any()
    assert not above[:60].any()
    at_the_top = draw_detections(image, detections((50, 0, 150, 80, 0.9, 0)), NAMES, line_width=1)
    assert at_the_top[3, 53].tolist() == bgr(0)
    assert changed(image, at_the_top)[1:10, 52:60].all()


def test_a_label_at_the_right_edge_moves_left_to_stay_visible() -> None:
    image = np.full((200, 300, 3), 30, np.uint8)
    box = (280.0, 100.0, 299.0, 180.0)
    drawn = changed(image, draw_detections(image, detections((*box, 0.9, 1)), NAMES, line_width=1))
    middle = changed(image, draw_detections(image, detections((100, 100, 119, 180, 0.9, 1)), NAMES, line_width=1))
    assert drawn[:100].sum() == middle[:100].sum() > 0


@pytest.mark.parametrize(
    ("options", "longer"), [({}, {"hide_conf": True}), ({"hide_conf": True}, {"hide_labels": True})]
)
def test_labels_and_scores_can_be_hidden(options: dict[str, bool], longer: dict[str, bool]) -> None:
    image = np.full((200, 300, 3), 30, np.uint8)
    box = detections((50, 100, 150, 180, 0.9, 0))
    with_more = changed(image, draw_detections(image, box, NAMES, **options))  # type: ignore[arg-type]
    with_less = changed(image, draw_detections(image, box, NAMES, **longer))  # type: ignore[arg-type]
    assert with_more[:98].sum() > with_less[:98].sum()
    if "hide_labels" in longer:
        assert with_less[:98].sum() == 0


@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 3, 3), (5, 200, 3), (200, 5, 3), (8, 8), (9, 7, 1), (30, 40, 4)])
def test_any_size_and_kind_of_image_becomes_bgr_of_its_size(shape: tuple[int, ...]) -> None:
    image = np.zeros(shape, np.uint8)
    drawn = draw_detections(image, detections((0, 0, 4, 4, 0.5, 0), (-100, -100, 1000, 1000, 0.9, 2)), NAMES)
    assert drawn.shape == (shape[0], shape[1], 3)
    assert drawn.dtype == np.uint8
    assert drawn[0, 0].tolist() != [0, 0, 0]


def test_the_higher_score_is_drawn_on_top() -> None:
    image = np.zeros((100, 100, 3), np.uint8)
    box = (10.0, 10.0, 90.0, 90.0)
    rows = ((*box, 0.9, 0.0), (*box, 0.3, 1.0))
    for order in (rows, rows[::-1]):
        assert draw_detections(image, detections(*order), NAMES, hide_labels=True)[50, 10].tolist() == bgr(0)


def test_a_class_without_a_name_is_shown_by_its_number() -> None:
    image = np.zeros((100, 200, 3), np.uint8)
    one, other = (
        draw_detections(image, detections((10, 50, 90, 90, 0.9, 1)), names, hide_conf=True)
        for names in (["only the first"], {1: "1"})
    )
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("image", "boxes", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), detections(), "uint8"),
        (np.zeros((4, 4, 2), np.uint8), detections(), r"\[H, W, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), detections(), r"\[0, 4, 3\]"),
        (np.zeros((4, 4, 3), np.uint8), np.zeros((2, 5)), r"expected shape \[n, 6\]"),
        (np.zeros((4, 4, 3), np.uint8), detections((0, 0, float("nan"), 1, 0.5, 0)), "NaN"),
    ],
)
def test_bad_arguments_are_named(image: np.ndarray, boxes: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_detections(image, boxes, NAMES)


def test_colours_of_80_classes_differ() -> None:
    colors = np.array([class_color(k) for k in range(80)], dtype=np.float64)
    assert colors.min() >= 0
    assert colors.max() <= 255
    distance = np.abs(colors[:, None] - colors[None]).sum(axis=2) + 1000 * np.eye(80)
    assert distance.min() > 8
    assert distance[:20, :20].min() > 40


def test_text_contrasts_with_its_background() -> None:
    assert text_color((240, 228, 66)) == (0, 0, 0)
    assert text_color((0, 114, 178)) == (255, 255, 255)


def test_targets_are_drawn_in_the_tile_of_their_image() -> None:
    images = torch.full((3, 3, 64, 96), 20, dtype=torch.uint8)
    targets = torch.tensor([[0, 1, 0.5, 0.5, 0.5, 0.5], [2, 0, 0.25, 0.5, 0.25, 0.5]])
    mosaic = draw_targets(images, targets, {0: "", 1: ""})
    gap, height, width = 4, 64, 96
    assert mosaic.shape == (2 * (height + gap) + gap, 2 * (width + gap) + gap, 3)
    assert mosaic[gap + 32, gap + 24].tolist() == bgr(1)  # left edge of the first image's box: x = 0.25 * 96
    assert mosaic[gap + 32, gap + 72].tolist() == bgr(1)
    second = mosaic[gap : gap + height, 2 * gap + width : 2 * (gap + width)]
    assert (second == 20).all()
    assert mosaic[2 * gap + height + 32, gap + 12].tolist() == bgr(0)  # third image: x = 0.125 * 96
    assert (mosaic[2 * gap + height :, 2 * gap + width :] == 255).all()


def test_a_mosaic_keeps_the_colours_of_rgb_images_and_stops_at_its_limit() -> None:
    images = torch.zeros(5, 3, 32, 32, dtype=torch.uint8)
    images[:, 0] = 200
    mosaic = draw_targets(images, torch.zeros(0, 6), {}, max_images=1)
    assert mosaic.shape == (40, 40, 3)
    assert mosaic[20, 20].tolist() == [0, 0, 200]


def test_a_mosaic_of_large_images_is_scaled_down() -> None:
    mosaic = draw_targets(torch.zeros(4, 3, 1280, 1280, dtype=torch.uint8), torch.zeros(0, 6), {})
    assert mosaic.shape == (1932, 1932, 3)


def test_bad_batches_are_named() -> None:
    with pytest.raises(ValueError, match="images"):
        draw_targets(torch.zeros(2, 3, 8, 8), torch.zeros(0, 6), {})
    with pytest.raises(ValueError, match="targets"):
        draw_targets(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(0, 5), {})


@pytest.mark.parametrize("name", ["half \udc80", "two\nlines\x00", "猫 é", "x" * 100_000, ""])
def test_any_class_name_is_drawn(name: str) -> None:
    image = np.zeros((200, 300, 3), np.uint8)
    drawn = draw_detections(image, np.array([[20, 60, 200, 150, 0.9, 0]]), {0: name})
    assert drawn[100, 20].any()  # the box


def test_an_opencv_that_draws_only_ascii_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cv2, "__version__", "4.12.0")
    for _ in range(2):
        draw_detections(np.zeros((200, 300, 3), np.uint8), np.array([[20, 60, 200, 150, 0.9, 0]]), {0: "猫"})
    assert [record.getMessage().split(" draws")[0] for record in caplog.records] == ["OpenCV 4.12.0"]
