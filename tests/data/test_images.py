"""Decoding: the size is read from the header before any pixel is, and alpha changes no colour, whatever the format."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PillowImage

from yolov9_fast.data.headers import image_size
from yolov9_fast.data.images import decode_image, read_image
from yolov9_fast.errors import DataError

PICTURE = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
SUFFIXES = (".avif", ".bmp", ".gif", ".jp2", ".jpg", ".pgm", ".png", ".ppm", ".tiff", ".webp")


def encoded(suffix: str, image: np.ndarray = PICTURE) -> bytes:
    if suffix == ".pgm":
        image = image[..., 0]
    written, data = cv2.imencode(suffix, image, [cv2.IMWRITE_WEBP_QUALITY, 90] if suffix == ".webp" else [])
    assert written
    return data.tobytes()


def pillow(image: PillowImage.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def tiff(pixels: np.ndarray, order: str = "<", *, big: bool = False, planar: bool = False, tile: int = 0) -> bytes:
    """An uncompressed TIFF of RGBA or grey with alpha [H, W, 4 or 2], uint8 or uint16, its alpha unassociated.

    With `tile` it claims to be stored in tiles of that side.
    """
    height, width, channels = pixels.shape
    wide = pixels.astype(pixels.dtype.newbyteorder(order))
    body = (wide.transpose(2, 0, 1) if planar else wide).tobytes()
    strips = channels if planar else 1
    start, letter = (16, "Q") if big else (8, "I")
    fields: dict[int, tuple[str, list[int]]] = {
        256: ("I", [width]),
        257: ("I", [height]),
        258: ("H", [8 * pixels.itemsize] * channels),
        259: ("H", [1]),
        262: ("H", [2 if channels == 4 else 1]),
        273: ("I", [start + index * len(body) // strips for index in range(strips)]),
        277: ("H", [channels]),
        278: ("I", [height]),
        279: ("I", [len(body) // strips] * strips),
        284: ("H", [2 if planar else 1]),
        **({322: ("I", [tile]), 323: ("I", [tile])} if tile else {}),
        338: ("H", [2]),
    }
    inline = struct.calcsize(letter)
    rows, position = b"", start + len(body)
    for tag, (kind, values) in fields.items():
        value = struct.pack(order + kind * len(values), *values)
        if len(value) > inline:
            body, value, position = body + value, struct.pack(order + letter, position), position + len(value)
        rows += struct.pack(f"{order}HH{letter}", tag, 3 if kind == "H" else 4, len(values)) + value.ljust(
            inline, b"\0"
        )
    head = struct.pack(f"{order}HHHQ", 43, 8, 0, position) if big else struct.pack(f"{order}HI", 42, position)
    count = struct.pack(order + ("Q" if big else "H"), len(fields))
    return (b"II" if order == "<" else b"MM") + head + body + count + rows + bytes(inline)


def with_alpha(dtype: type = np.uint8) -> np.ndarray:
    """RGBA: one colour, alpha from 0 to 255."""
    image = np.empty((32, 32, 4), np.uint8)
    image[:] = (200, 100, 10, 0)
    image[..., 3] = np.linspace(0, 255, 32)
    return image.astype(dtype) * (1 if dtype == np.uint8 else 257)


def transparent_files() -> dict[str, bytes]:
    rgba = with_alpha()
    bgra = rgba[..., [2, 1, 0, 3]]
    image = PillowImage.fromarray(rgba)
    files = {suffix: encoded(suffix, bgra) for suffix in (".bmp", ".jp2", ".png", ".tiff")}
    files |= {f"16 bit {suffix}": encoded(suffix, bgra.astype(np.uint16) * 257) for suffix in (".png", ".tiff")}
    files["palette .png"] = pillow(image.convert("RGB").quantize(4), "PNG", transparency=bytes([60] * 4))
    files["one colour of .png"] = pillow(image.convert("RGB"), "PNG", transparency=(200, 100, 10))
    files["animated .png"] = pillow(image, "PNG", save_all=True, append_images=[image.rotate(180)])
    files["exact .webp"] = pillow(image, "WEBP", lossless=True, exact=True)
    for compression in (None, "tiff_lzw", "tiff_deflate", "packbits"):
        files[f".tiff {compression}"] = pillow(image, "TIFF", compression=compression)
    files["pages .tiff"] = pillow(image, "TIFF", save_all=True, append_images=[image.rotate(180)])
    files["big .tiff"] = pillow(image, "TIFF", big_tiff=True)
    for order in "<>":
        for dtype in (np.uint8, np.uint16):
            files[f"own .tiff {order} {dtype.__name__}"] = tiff(with_alpha(dtype), order)
            files[f"planes .tiff {order} {dtype.__name__}"] = tiff(with_alpha(dtype), order, planar=True)
            files[f"own big .tiff {order} {dtype.__name__}"] = tiff(with_alpha(dtype), order, big=True)
    return files


def test_alpha_changes_no_colour_in_any_format() -> None:
    for name, data in transparent_files().items():
        assert np.unique(decode_image(data, name).reshape(-1, 3), axis=0).tolist() == [[10, 100, 200]], name


def test_alpha_changes_no_grey_in_any_format() -> None:
    grey = with_alpha()[..., [0, 3]]
    image = PillowImage.fromarray(grey, "LA")
    files = {"png": pillow(image, "PNG"), "tiff": pillow(image, "TIFF"), "jp2": pillow(image, "JPEG2000")}
    files["webp"] = pillow(image, "WEBP", lossless=True, exact=True)
    for dtype in (np.uint8, np.uint16):
        for planar in (False, True):
            files[f"{dtype.__name__} {planar}"] = tiff(with_alpha(dtype)[..., [0, 3]], planar=planar)
    for name, data in files.items():
        assert np.unique(decode_image(data, name)).tolist() == [200], name


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_header_has_the_size_of_the_decoded_image(suffix: str) -> None:
    for shape in ((40, 64), (33, 65), (1000, 32)):
        data = encoded(suffix, np.zeros((*shape, 3), np.uint8))
        assert image_size(data) == decode_image(data, "x").shape[:2]


def test_headers_of_other_writers_have_the_size_of_the_decoded_image() -> None:
    image = PillowImage.fromarray(PICTURE)
    files = [
        pillow(image, "JPEG", progressive=True, exif=b"Exif\0\0II*\0\0\0\0\0"),
        pillow(image, "JPEG2000", no_jp2=True),
    ]
    files += [pillow(image, "WEBP", lossless=lossless) for lossless in (False, True)]
    files += [pillow(image, "TIFF", compression="tiff_lzw"), pillow(image.convert("1"), "PPM"), pillow(image, "GIF")]
    files += [b"P6 # made by hand\n64 # width\n40\n255\n" + PICTURE.tobytes()]
    files += [b"P7\nWIDTH 64\nHEIGHT 40\nDEPTH 3\nMAXVAL 255\nTUPLTYPE RGB\nENDHDR\n" + PICTURE.tobytes()]
    files += [transparent_files()["animated .png"], transparent_files()["exact .webp"]]
    for data in files:
        assert image_size(data) == decode_image(data, "x").shape[:2], data[:20]


def huge(suffix: str, side: int) -> bytes:
    """A small file whose header declares `side` × `side` pixels."""
    data = bytearray(encoded(suffix))
    for was, becomes in zip(PICTURE.shape[:2], (side, side), strict=True):
        letter = "<H" if suffix == ".gif" else "<I" if suffix == ".bmp" else ">I"
        if suffix in (".pgm", ".ppm"):
            data = data.replace(f"{was}".encode(), f"{becomes}".encode(), 1)
        elif suffix == ".jpg":
            place = data.index(b"\xff\xc0") + 5 + (0 if was == 40 else 2)
            struct.pack_into(">H", data, place, becomes)
        elif suffix == ".webp":
            struct.pack_into("<H", data, 28 if was == 40 else 26, min(becomes, 0x3FFF))
        elif suffix == ".tiff":
            for letter in "HI":
                tag = 257 if was == 40 else 256
                field = struct.pack(f"<HHI{letter}", tag, 3 if letter == "H" else 4, 1, was)
                data = data.replace(field, struct.pack("<HHII", tag, 4, 1, becomes)[: len(field)])
        else:
            data = data.replace(struct.pack(letter, was), struct.pack(letter, becomes))
    return bytes(data)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_image_above_the_limit_is_refused_by_its_header(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / f"huge{suffix}"
    file.write_bytes(huge(suffix, 32000))
    monkeypatch.setattr(cv2, "imdecode", None)
    if suffix == ".webp":  # the format ends at 16383 pixels a side
        monkeypatch.setenv("YOLOV9_FAST_MAX_IMAGE_PIXELS", "100_000_000")
    with pytest.raises(
        DataError, match=r"huge\S+: image of \d+x\d+: expected at most .* \(YOLOV9_FAST_MAX_IMAGE_PIXELS"
    ):
        read_image(file)


def test_the_limit_can_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(encoded(".png"))
    monkeypatch.setenv("YOLOV9_FAST_MAX_IMAGE_PIXELS", str(40 * 64))
    assert read_image(file).shape == (40, 64, 3)
    monkeypatch.setenv("YOLOV9_FAST_MAX_IMAGE_PIXELS", str(40 * 64 - 1))
    with pytest.raises(DataError, match="image of 64x40: expected at most 2,559 pixels, got 2,560"):
        read_image(file)
    monkeypatch.setenv("YOLOV9_FAST_MAX_IMAGE_BYTES", "20")
    with pytest.raises(DataError, match="expected at most 20 bytes"):
        read_image(file)


def test_a_tile_counts_as_a_whole() -> None:
    with pytest.raises(DataError, match="image of 1048576x1048576"):
        decode_image(tiff(with_alpha(), tile=1 << 20), "x")


@pytest.mark.parametrize("what", ["PIXELS", pytest.param("WIDTH", marks=pytest.mark.slow)])
def test_opencvs_own_limit_is_named(what: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(".png"))
    code = """if True:
        import sys
        from yolov9_fast.data.images import read_image
        try:
            read_image(sys.argv[1])
        except Exception as error:
            print(error)
    """
    variable = f"OPENCV_IO_MAX_IMAGE_{what}"
    shown = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.png")],
        env={**os.environ, variable: "20"},
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    assert f"a.png: image file of 64x40 is above OpenCV's limit of 20 {what.lower()} ({variable} raises" in shown


@pytest.mark.parametrize(
    "content", [b"", b"no picture", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"P6 " + b" " * 4000 + b"x", b"II*\0"]
)
def test_what_is_no_image_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.jpg: image file is|a\.jpg: image file cannot be decoded") as error:
        read_image(tmp_path / "a.jpg")
    assert "\n" not in str(error.value)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("pipe.png", "."):
        with pytest.raises(DataError, match="expected a regular file"):
            read_image(tmp_path / name)


@given(st.sampled_from(SUFFIXES), st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=6), st.data())
def test_damaged_images_are_an_error_or_an_image(
    suffix: str, changes: list[tuple[int, int]], data: st.DataObject
) -> None:
    content = bytearray(encoded(suffix))
    for position, value in changes:
        content[position % len(content)] = value
    end = data.draw(st.integers(0, len(content)))
    for damaged in (bytes(content), bytes(content[:end])):
        try:
            image = decode_image(damaged, "x")
        except DataError as error:
            assert "\n" not in str(error)  # noqa: PT017
            continue
        declared = image_size(damaged)
        assert image.dtype == np.uint8
        assert sorted(image.shape[:2]) == sorted(declared or ())
