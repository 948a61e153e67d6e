"""Decoding, letterboxing, and boxes scaled back to the original image."""

from __future__ import annotations

import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tests.data.drawing import paint
from yolov9_fast.data import letterbox, read_image, scale_boxes_to_original, to_tensor


@pytest.mark.parametrize(
    "image",
    [
        np.full((20, 30), 120, np.uint8),
        np.full((20, 30), 120 * 257, np.uint16),
        np.dstack((np.full((20, 30, 3), 120, np.uint8), np.zeros((20, 30), np.uint8))),
    ],
    ids=["grey", "16-bit", "transparent"],
)
def test_any_image_is_decoded_to_three_channels_of_eight_bits(tmp_path: Path, image: np.ndarray) -> None:
    file = tmp_path / "ünï.png"
    file.write_bytes(cv2.imencode(".png", image)[1].tobytes())
    result = read_image(file)
    assert result.shape == (20, 30, 3)
    assert result.dtype == np.uint8
    assert np.abs(result.astype(int) - 120).max() <= 1


def test_image_is_rotated_by_its_exif_tag(tmp_path: Path) -> None:
    plain = cv2.imencode(".jpg", paint(20, 40, [(0, 0, 0, 20, 20)]))[1].tobytes()
    directory = struct.pack("<HHHIHHI", 1, 0x0112, 3, 1, 6, 0, 0)
    payload = b"Exif\0\0" + b"II*\0" + struct.pack("<I", 8) + directory
    tag = b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload
    file = tmp_path / "rotated.jpg"
    file.write_bytes(plain[:2] + tag + plain[2:])
    image = read_image(file)
    assert image.shape == (40, 20, 3)
    assert image[5, 10, 2] > 200
    assert image[30, 10, 2] < 50


def test_long_side_is_scaled_and_the_padding_is_grey() -> None:
    boxed = letterbox(np.zeros((50, 100, 3), np.uint8), 64)
    assert boxed.image.shape == (64, 64, 3)
    assert (boxed.ratio, boxed.pad) == ((0.64, 0.64), (0, 16))
    assert (boxed.image[16:48] == 0).all()
    assert (boxed.image[:16] == 114).all()
    assert (boxed.image[48:] == 114).all()


def test_rectangle_is_only_as_large_as_needed() -> None:
    boxed = letterbox(np.zeros((30, 100, 3), np.uint8), 128, rectangle=True)
    assert boxed.image.shape == (64, 128, 3)
    assert boxed.pad == (0, 13)


@pytest.mark.parametrize(("height", "width"), [(37, 101), (101, 37), (500, 3), (64, 64), (1, 1)])
def test_boxes_return_to_the_original_pixels(height: int, width: int) -> None:
    boxed = letterbox(np.zeros((height, width, 3), np.uint8), 96)
    boxes = torch.tensor([[0.0, 0.0, width, height, 0.5, 2.0]])
    gain = torch.tensor([boxed.ratio[1], boxed.ratio[0]] * 2)
    placed = boxes.clone()
    placed[:, :4] = boxes[:, :4] * gain + torch.tensor([*boxed.pad, *boxed.pad])
    torch.testing.assert_close(scale_boxes_to_original(placed, boxed.ratio, boxed.pad, (height, width)), boxes)


def test_boxes_are_clipped_to_the_original_image_without_changing_the_input() -> None:
    boxes = torch.tensor([[-50.0, -50.0, 500.0, 500.0]])
    result = scale_boxes_to_original(boxes, (0.5, 0.5), (0, 10), (60, 80))
    assert result.tolist() == [[0, 0, 80, 60]]
    assert boxes[0, 0] == -50
    assert scale_boxes_to_original(torch.zeros(0, 4), (1, 1), (0, 0), (5, 5)).shape == (0, 4)
    with pytest.raises(ValueError, match=r"boxes: expected \[n, 4 or more\]"):
        scale_boxes_to_original(torch.zeros(4), (1, 1), (0, 0), (5, 5))


def test_tensor_is_rgb_channels_first() -> None:
    tensor = to_tensor(paint(4, 6, [(0, 0, 0, 6, 4)]))
    assert tensor.shape == (3, 4, 6)
    assert tensor.dtype == torch.uint8
    assert tensor.is_contiguous()
    assert tensor[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("size", [0, -32, 100])
def test_a_size_that_is_no_multiple_of_the_stride_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        letterbox(np.zeros((50, 100, 3), np.uint8), size)
