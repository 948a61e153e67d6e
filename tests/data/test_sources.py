"""Sources to predict on: every kind gives frames; an unreadable file is a frame with an error."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np
import pytest

from tests.data.drawing import paint
from yolov9_fast.data import open_source
from yolov9_fast.data.addresses import without_password
from yolov9_fast.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "in"
    (root / "deep").mkdir(parents=True)
    for name in ("b.png", "a.JPG", "deep/c.png"):
        cv2.imwrite(str(root / name), paint(20, 30, [(0, 5, 5, 10, 10)]))
    (root / "notes.md").write_text("no image")
    return root


def write_video(file: Path, count: int) -> None:
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"MJPG"), 5.0, (64, 48))
    if not writer.isOpened():
        pytest.skip("this OpenCV writes no video")
    for number in range(count):
        writer.write(np.full((48, 64, 3), 40 * number % 251, np.uint8))
    writer.release()


def damage_frames(file: Path, damaged: range, tag: bytes = b"00dc") -> None:
    """Overwrite the contents of some frames of an AVI file; its structure stays whole."""
    data = bytearray(file.read_bytes())
    position = data.index(b"movi") + 4
    number = 0
    while data[position : position + 4] == tag:
        size = int.from_bytes(data[position + 4 : position + 8], "little")
        if number in damaged:
            data[position + 8 : position + 8 + size] = bytes(size)
        position += 8 + size + size % 2
        number += 1
    file.write_bytes(data)


class FakeCapture:
    """A video whose reads succeed where `pattern` has an x, and fail after its end."""

    pattern, total, fps, size = "xxx", 3.0, 25.0, (48.0, 64.0)
    opened: ClassVar[list[object]] = []

    def __init__(self, source: object) -> None:
        self.opened.append(source)
        self._reads = iter(self.pattern)

    def isOpened(self) -> bool:
        return True

    def get(self, what: int) -> float:
        height, width = self.size
        return {
            cv2.CAP_PROP_FRAME_COUNT: self.total,
            cv2.CAP_PROP_FPS: self.fps,
            cv2.CAP_PROP_FRAME_HEIGHT: height,
            cv2.CAP_PROP_FRAME_WIDTH: width,
        }[what]

    def read(self) -> tuple[bool, np.ndarray | None]:
        kind = next(self._reads, ".")
        if kind == "!":
            raise cv2.error("read")
        return (True, np.zeros((48, 64, 3), np.uint8)) if kind == "x" else (False, None)

    def release(self) -> None:
        pass


def fake_video(monkeypatch: pytest.MonkeyPatch, **attributes: object) -> None:
    fake = type("Fake", (FakeCapture,), {"opened": [], **attributes})
    monkeypatch.setattr(cv2, "VideoCapture", fake)
    FakeCapture.opened.clear()


def names(frames) -> list[str]:
    return [Path(frame.path).name for frame in frames]


def test_single_image(folder: Path) -> None:
    [frame] = open_source(folder / "b.png")
    assert frame.image is not None
    assert frame.image.shape == (20, 30, 3)
    assert (frame.index, frame.frame, frame.is_video, frame.error) == (0, 0, False, None)


def test_folder_gives_its_own_images_sorted(folder: Path) -> None:
    frames = list(open_source(str(folder)))
    assert names(frames) == ["a.JPG", "b.png"]
    assert [frame.index for frame in frames] == [0, 1]


def test_glob_finds_files_in_subfolders(folder: Path) -> None:
    assert names(open_source(f"{folder}/**/*.png")) == ["b.png", "c.png"]


def test_name_with_brackets_is_a_file_when_it_exists(folder: Path) -> None:
    (folder / "b.png").rename(folder / "b[1].png")
    assert names(open_source(folder / "b[1].png")) == ["b[1].png"]


def test_list_gives_an_error_frame_for_what_is_missing(folder: Path) -> None:
    (folder / "list.txt").write_text("b.png\ngone.png\ndeep/c.png\n")
    frames = list(open_source(folder / "list.txt"))
    assert names(frames) == ["b.png", "gone.png", "c.png"]
    assert frames[1].image is None
    assert frames[1].error is not None
    assert "missing" in frames[1].error


def test_corrupt_image_is_an_error_frame_and_the_rest_follows(folder: Path) -> None:
    (folder / "a.JPG").write_bytes(b"broken")
    frames = list(open_source(folder))
    assert frames[0].image is None
    assert "cannot be decoded" in str(frames[0].error)
    assert frames[1].image is not None


def test_video_gives_numbered_frames(tmp_path: Path) -> None:
    write_video(tmp_path / "v.avi", 4)
    frames = list(open_source(tmp_path / "v.avi"))
    assert [frame.frame for frame in frames] == [0, 1, 2, 3]
    assert all(frame.is_video and frame.fps == 5.0 and frame.index == 0 for frame in frames)
    assert frames[3].image is not None
    assert abs(int(frames[3].image.mean()) - 120) < 5


def test_broken_video_is_an_error_frame(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(b"broken")
    [frame] = open_source(tmp_path / "v.mp4")
    assert frame.image is None
    assert frame.is_video
    assert "no frame" in str(frame.error)


@pytest.mark.parametrize("damaged", [range(1), range(8, 9), range(8, 14), range(19, 20)])
def test_a_video_goes_on_after_frames_that_cannot_be_decoded(tmp_path: Path, damaged: range) -> None:
    write_video(tmp_path / "v.avi", 20)
    damage_frames(tmp_path / "v.avi", damaged)
    *good, last = open_source(tmp_path / "v.avi")
    assert [frame.frame for frame in good] == [number for number in range(20) if number not in damaged]
    assert (last.image, last.frame, last.lost) == (None, damaged.start, len(damaged))
    assert f"{len(damaged)} of 20 frames cannot be decoded, the first is frame {damaged.start}" in str(last.error)


def test_a_video_that_was_cut_off_tells_how_much_is_missing(tmp_path: Path) -> None:
    write_video(tmp_path / "v.avi", 20)
    content = (tmp_path / "v.avi").read_bytes()
    (tmp_path / "v.avi").write_bytes(content[: (content.index(b"movi") + content.index(b"idx1")) // 2])
    *good, last = open_source(tmp_path / "v.avi")
    assert 0 < len(good) < 20
    assert last.lost == 20 - len(good)
    assert f"{last.lost} of 20 frames" in str(last.error)


@pytest.mark.parametrize(
    ("pattern", "total", "read", "lost"),
    [
        ("xxx", 3, [0, 1, 2], 0),
        ("x.x!x", 5, [0, 2, 4], 2),
        ("..x", 3, [2], 2),
        ("xx", 9, [0, 1], 7),
        ("xxxx", 2, [0, 1, 2, 3], 0),  # the container tells too few
        ("x.xxx", 3, [0, 2, 3, 4], 1),
        ("x..x", 0, [0, 3], 2),  # the container does not tell
        ("xx", -4.6e16, [0, 1], 0),
        ("xx", 1e12, [0, 1], 10**12 - 2),
        ("", 5, [], 1),
    ],
)
def test_frames_that_fail_are_counted(
    pattern: str, total: float, read: list[int], lost: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_video(monkeypatch, pattern=pattern, total=total)
    (tmp_path / "v.mkv").touch()
    frames = list(open_source(tmp_path / "v.mkv"))
    assert [frame.frame for frame in frames if frame.image is not None] == read
    assert sum(frame.lost for frame in frames if frame.image is None) == lost


def test_a_clock_rate_is_no_frame_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_video(monkeypatch, pattern="xx", total=9000, fps=1000.0)
    (tmp_path / "v.webm").touch()
    frames = list(open_source(tmp_path / "v.webm"))
    assert [frame.fps for frame in frames] == [None, None]
    assert all(frame.image is not None for frame in frames)


def test_a_video_of_too_many_pixels_is_an_error_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_video(monkeypatch, size=(32000.0, 32000.0))
    (tmp_path / "v.mp4").touch()
    [frame] = open_source(tmp_path / "v.mp4")
    assert "32000x32000: expected at most" in str(frame.error)


@pytest.mark.parametrize(
    "name", ["clip.ts", "CLIP.MTS", "http:clip.avi", "cl\udcffip.avi", "100%.avi", "clip_%03d.avi"]
)
def test_videos_of_any_name_are_read(name: str, tmp_path: Path) -> None:
    write_video(tmp_path / "v.avi", 2)
    (tmp_path / "v.avi").rename(tmp_path / name)
    assert [frame.path for frame in open_source(tmp_path)] == [str(tmp_path / name)] * 2
    assert len(list(open_source(str(tmp_path / name)))) == 2


def test_names_that_are_not_utf8_are_read(tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    Path(name).write_bytes(cv2.imencode(".png", paint(20, 30, []))[1].tobytes())
    [frame] = open_source(tmp_path)
    assert frame.image is not None
    assert frame.path == name


def test_files_that_cannot_be_read_are_error_frames(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("gone.mp4\npipe.mp4\nfolder.mp4\nfolder.png\n" + "x" * 300 + ".png\n")
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "folder.png").mkdir()
    errors = [str(frame.error) for frame in open_source(tmp_path / "list.txt")]
    expected = ["video does not exist", "video is a pipe", "video is a folder", "got a folder", "File name too long"]
    for error, text in zip(errors, expected, strict=True):
        assert text in error


def test_permissions_are_error_frames_or_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "v.avi", 1)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", refuse)
        [frame] = open_source(tmp_path / "v.avi")
    assert str(frame.error).endswith("v.avi: video cannot be read: Permission denied")
    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(DataError, match=r"folder cannot be read .Permission denied"):
        open_source(tmp_path)


def test_a_list_may_hold_addresses_and_webcams(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_video(monkeypatch, pattern="x", total=0)
    (folder / "5").write_bytes((folder / "b.png").read_bytes())
    (folder / "list.txt").write_text("rtsp://user:secret@camera/live\nb.png\n0\nhttps://host/a.mp4\n5\n")
    frames = list(open_source(folder / "list.txt"))
    paths = ["rtsp://camera/live", str(folder / "b.png"), "0", "https://host/a.mp4", str(folder / "5")]
    assert [frame.path for frame in frames] == paths
    assert cv2.VideoCapture.opened == [b"rtsp://user:secret@camera/live", 0, b"https://host/a.mp4"]


def test_one_address_twice_is_opened_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_video(monkeypatch, pattern="xx", total=0)
    assert [frame.index for frame in open_source(["rtsp://camera"] * 2)] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("rtsp://user:secret@camera:554/live", "rtsp://camera:554/live"),
        ("RTSP://user:sec@ret@camera/live", "RTSP://camera/live"),
        ("rtsp://user:sec/ret@camera/live", "rtsp://camera/live"),
        ("rtsp://user:1/secret@camera/live", "rtsp://camera/live"),
        ("rtsp://user:sec?ret#@camera/live", "rtsp://camera/live"),
        ("srt://secret@[::1]:9/live", "srt://[::1]:9/live"),
        ("http://camera/live?user=a&password=secret&channel=1", "http://camera/live?user=a&password=***&channel=1"),
        ("http://camera/live.m3u8?access_token=secret#x", "http://camera/live.m3u8?access_token=***#x"),
        ("rtsp://camera/user=a_password=secret_channel=1.sdp", "rtsp://camera/user=a_password=***"),
        ("http://host/@name/live", "http://host/@name/live"),
    ],
)
def test_passwords_are_not_shown(address: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert without_password(address) == shown
    fake_video(monkeypatch, pattern="x", total=0)
    [frame] = open_source(address)
    assert frame.path == shown
    fake_video(monkeypatch, pattern="", total=0)
    [frame] = open_source(address)
    assert frame.error == f"{shown}: no frame can be decoded"
    fake_video(monkeypatch, isOpened=lambda self: False)
    with pytest.raises(DataError) as error:
        open_source(address)
    assert str(error.value) == f"source: stream {shown} cannot be opened"


def test_an_address_that_nobody_serves_prints_no_password(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"stream rtsp://127\.0\.0\.1:9/live cannot be opened"):
        open_source("rtsp://user:secret@127.0.0.1:9/live")
    assert "secret" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("source", "got"),
    [
        (None, "NoneType"),
        (1.5, "float"),
        (True, "bool"),
        (b"a.png", "bytes"),
        ([b"a.png"], "bytes"),
        (np.full((4, 4, 3), 77, np.uint8), "ndarray"),
        ([[1, 2]], "list"),
        ({"a": 1}.items(), "tuple"),
    ],
)
def test_what_is_no_source_is_named_by_its_type(source: object, got: str) -> None:
    with pytest.raises(DataError) as error:
        open_source(source)  # type: ignore[arg-type]
    assert str(error.value) == f"source: expected paths, addresses or numbers of webcams, got {got}"


@pytest.mark.parametrize(
    "source", [[], "", [""], "rtsp://\ud800", "\ud800.png", "a\0.png", "rtsp://a\0", "x" * 300, "9" * 300]
)
def test_what_names_nothing_is_one_short_line(source: object) -> None:
    with pytest.raises(DataError) as error:
        open_source(source)  # type: ignore[arg-type]
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)


def test_a_number_is_a_webcam(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_video(monkeypatch, pattern="x", total=0)
    assert [frame.path for frame in open_source(0)] == ["0"]
    assert cv2.VideoCapture.opened == [0]


def test_files_of_several_sources_are_numbered_consecutively(folder: Path) -> None:
    frames = list(open_source([folder / "b.png", str(folder / "deep")]))
    assert names(frames) == ["b.png", "c.png"]
    assert [frame.index for frame in frames] == [0, 1]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{0}/nowhere.png", "does not exist"),
        ("{0}/empty", "no image or video found in .*empty"),
        ("{0}/*.bmp", "no image or video found"),
        ("77", "webcam 77 cannot be opened"),
        ("7" * 5000, "expected a path of at most"),
        ("7" * 30, "777 does not exist"),
        ("{0}/a\0b.png", "NUL byte"),
        ("{0}/a\0*.png", "NUL byte"),
        ("{0}/" + "x" * 300, "expected a path of at most"),
        ("~nobody-of-this-name/x.png", "expected a path.*home"),
        ("{0}/gone", "is a broken link"),
        ("{0}/ring", "cannot be read: Too many levels"),
        ("{0}/pipe.txt", "is a pipe"),
        ("/dev/zero", "is a device"),
    ],
)
def test_nothing_to_read_is_an_error_at_the_call(folder: Path, source: str, message: str) -> None:
    (folder / "empty").mkdir()
    (folder / "gone").symlink_to("nowhere")
    (folder / "ring").symlink_to("ring")
    os.mkfifo(folder / "pipe.txt")
    with pytest.raises(DataError, match=message):
        open_source(source.format(folder))


def test_hidden_files_are_left_out_and_the_rest_is_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    (folder / "._b.png").write_bytes((folder / "b.png").read_bytes())
    (folder / "c.jfif").write_bytes((folder / "b.png").read_bytes())
    (folder / "gone.png").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.png")
    for source in (folder, folder / "*"):
        caplog.clear()
        assert names(open_source(source)) == ["a.JPG", "b.png"]
        assert "not images or videos, ignored: 1 .jfif, 1 .md" in caplog.text
        assert f"{folder}/gone.png: skipped: broken link" in caplog.text
        assert f"{folder}/pipe.png: skipped: not a regular file" in caplog.text


def test_a_glob_over_loops_of_links_ends(folder: Path) -> None:
    for name in ("one", "two", "three"):
        (folder / name).symlink_to(".")
        (folder / "deep" / name).symlink_to("..")
    assert names(open_source(f"{folder}/**/*.png")) == ["b.png", "c.png"]


def test_a_home_folder_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert names(open_source(["~/b.png", "~/d*/*.png"])) == ["b.png", "c.png"]
