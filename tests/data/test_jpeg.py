"""JPEG files: an ordinary one has OpenCV's pixels, others go to OpenCV; scaled decoding is for training alone."""

from __future__ import annotations

import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PillowImage

from tests.data.test_images import pillow
from yolov9_fast.data import images, jpeg
from yolov9_fast.data.images import decode_image, decoder, read_resized, resize_long_side
from yolov9_fast.data.jpeg import decode_jpeg
from yolov9_fast.errors import DataError

needs_simplejpeg = pytest.mark.skipif(jpeg.simplejpeg() is None, reason="simplejpeg is not installed")


def picture(height: int, width: int) -> np.ndarray:
    """Smooth colours with some noise, so that chroma subsampling and every coefficient matter."""
    y, x = np.mgrid[:height, :width]
    smooth = np.stack((128 + 100 * np.sin(x / 9), 128 + 100 * np.cos(y / 7), (x + y) % 256), axis=2)
    return np.clip(smooth + np.random.default_rng(0).normal(0, 20, smooth.shape), 0, 255).astype(np.uint8)


def exif(orientation: int, order: str = "<", kind: str = "H") -> bytes:
    tiff = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, 1)
    value = struct.pack(order + kind, orientation).ljust(4, b"\0")
    return b"Exif\0\0" + tiff + struct.pack(f"{order}HHI", 274, 3 if kind == "H" else 4, 1) + value + b"\0\0\0\0"


def by_opencv(data: bytes) -> np.ndarray:
    result: np.ndarray = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    return result


ORDINARY = {
    f"{mode} {sampling} {shape}": pillow(
        PillowImage.fromarray(picture(*shape)), "JPEG", quality=quality, subsampling=sampling, progressive=mode == "p"
    )
    for mode, quality in (("s", 90), ("p", 60))
    for sampling in ("4:4:4", "4:2:2", "4:2:0")
    for shape in ((48, 64), (47, 61), (1, 1), (17, 333))
}
ORDINARY["restarts"] = pillow(PillowImage.fromarray(picture(64, 96)), "JPEG", restart_marker_blocks=3)
ORDINARY["comment"] = pillow(PillowImage.fromarray(picture(64, 96)), "JPEG", comment=b"said", icc_profile=b"profile")
ORDINARY["upright"] = pillow(PillowImage.fromarray(picture(64, 96)), "JPEG", exif=exif(1))
ORDINARY["upright, big endian"] = pillow(PillowImage.fromarray(picture(64, 96)), "JPEG", exif=exif(1, ">"))

OTHERS = {
    "grey": pillow(PillowImage.fromarray(picture(48, 64)).convert("L"), "JPEG"),
    "CMYK": pillow(PillowImage.fromarray(picture(48, 64)).convert("CMYK"), "JPEG"),
    "orientation of another kind": pillow(PillowImage.fromarray(picture(48, 64)), "JPEG", exif=exif(1, kind="I")),
    "broken EXIF": pillow(PillowImage.fromarray(picture(48, 64)), "JPEG", exif=b"Exif\0\0II"),
    **{
        f"rotated {value} {order}": pillow(PillowImage.fromarray(picture(48, 64)), "JPEG", exif=exif(value, order))
        for value in range(2, 10)
        for order in "<>"
    },
}


@needs_simplejpeg
@pytest.mark.parametrize("name", ORDINARY)
def test_an_ordinary_file_has_opencvs_pixels(name: str) -> None:
    data = ORDINARY[name]
    expected = by_opencv(data)
    fast = decode_jpeg(data)
    assert fast is not None
    assert np.array_equal(fast, expected)
    buffer = np.zeros_like(expected)
    assert decode_jpeg(data, out=buffer) is buffer
    assert np.array_equal(buffer, expected)
    assert np.array_equal(decode_image(data, "x"), expected)


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_file_is_opencvs(name: str) -> None:
    data = OTHERS[name]
    assert decode_jpeg(data) is None
    assert np.array_equal(decode_image(data, "x"), by_opencv(data))


@pytest.mark.parametrize("name", ["s 4:2:0 (48, 64)", "comment", "grey"])
def test_without_simplejpeg_opencv_decodes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {**ORDINARY, **OTHERS}[name]
    expected, key = decode_image(data, "x"), decoder()
    monkeypatch.setattr(jpeg, "simplejpeg", lambda: None)
    monkeypatch.setattr(images, "simplejpeg", lambda: None)
    assert np.array_equal(decode_image(data, "x"), expected)
    assert decoder().endswith("simplejpeg none")
    assert (key == decoder()) == (jpeg.decode_jpeg(ORDINARY["comment"]) is not None)


@needs_simplejpeg
def test_the_version_of_simplejpeg_is_part_of_every_caches_key() -> None:
    module = jpeg.simplejpeg()
    assert module is not None
    assert f"simplejpeg {module.__version__}" in decoder()


@given(st.sampled_from(sorted(ORDINARY)), st.lists(st.tuples(st.integers(2, 2000), st.integers(0, 255)), max_size=4))
def test_a_damaged_file_is_what_opencv_makes_of_it(name: str, changes: list[tuple[int, int]]) -> None:
    content = bytearray(ORDINARY[name])
    for position, value in changes:
        content[position % len(content)] = value
    fast = decode_jpeg(bytes(content))
    if fast is not None:
        assert np.array_equal(fast, by_opencv(bytes(content)))


def write(folder: Path, data: bytes) -> Path:
    file = folder / "a.jpg"
    file.write_bytes(data)
    return file


@needs_simplejpeg
@pytest.mark.parametrize(
    ("size", "factor"), [(400, 1), (201, 1), (200, 2), (150, 2), (100, 4), (99, 4), (50, 8), (10, 8), (500, 1)]
)
def test_training_decodes_at_the_smallest_size_that_is_enough(
    size: int, factor: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []

    def spied(data: bytes, factor: int = 1, out: np.ndarray | None = None) -> np.ndarray | None:
        image = decode_jpeg(data, factor, out)
        decoded.append(None if image is None else image.shape)
        return image

    monkeypatch.setattr(images, "decode_jpeg", spied)
    source = picture(301, 400)
    file = write(tmp_path, pillow(PillowImage.fromarray(source), "JPEG", quality=95))
    shape = images.scaled_size(301, 400, size)
    plain = read_resized(file, (301, 400), size, training=True)
    assert decoded == [(-(-301 // factor), 400 // factor, 3)]
    assert plain.shape == (*shape, 3)
    # The same in a buffer, bit for bit.
    buffer = np.zeros((*shape, 3), np.uint8)
    assert read_resized(file, (301, 400), size, training=True, out=buffer) is buffer
    assert np.array_equal(buffer, plain)
    # It shows the same picture, about the average of the area.
    area = cv2.resize(images.read_image(file), shape[::-1], interpolation=cv2.INTER_AREA).astype(int)
    if size * factor == 400 and factor > 1:
        assert np.abs(plain.astype(int) - area).mean() < 12


@pytest.mark.parametrize("size", [50, 200, 400, 500])
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_evaluation_decodes_at_full_size(size: int, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"a{suffix}"
    cv2.imwrite(str(file), picture(300, 400))
    expected = resize_long_side(cv2.imread(str(file)), size, training=False)
    assert np.array_equal(read_resized(file, (300, 400), size, training=False), expected)
    buffer = np.zeros_like(expected)
    assert read_resized(file, (300, 400), size, training=False, out=buffer) is buffer
    assert np.array_equal(buffer, expected)


def test_a_rotated_file_is_decoded_at_full_size_in_training(tmp_path: Path) -> None:
    data = pillow(PillowImage.fromarray(picture(300, 400)), "JPEG", exif=exif(6))
    expected = resize_long_side(by_opencv(data), 100, training=True)
    assert expected.shape == (100, 75, 3)
    assert np.array_equal(read_resized(write(tmp_path, data), (400, 300), 100, training=True), expected)


@pytest.mark.parametrize("training", [False, True])
def test_damage_and_another_size_are_one_line(training: bool, tmp_path: Path) -> None:
    data = pillow(PillowImage.fromarray(picture(300, 400)), "JPEG")
    file = write(tmp_path, data[: len(data) // 2])
    with pytest.raises(DataError, match=r"a\.jpg: image file is truncated"):
        read_resized(file, (300, 400), 100, training=training)
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.jpg: file changed while in use: expected 100x150 pixels, got 300x400"):
        read_resized(file, (100, 150), 50, training=training)
    # Rows in the middle are missing, but not the end: OpenCV's decoder alone decides what becomes of it.
    cut = data[: len(data) // 2] + data[-2:]
    file.write_bytes(cut)
    expected = by_opencv(cut)
    result = read_resized(file, (300, 400), 100, training=training)
    assert np.array_equal(result, resize_long_side(expected, 100, training=training))
