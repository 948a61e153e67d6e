"""Sources to predict on: every kind gives frames; an unreadable file is a frame with an error."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.data.drawing import paint
from yolov9_fast.data import open_source
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
        writer.write(np.full((48, 64, 3), 40 * number, np.uint8))
    writer.release()


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
