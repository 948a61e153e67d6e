"""Files of predictions: names, text, JSON, videos."""

from __future__ import annotations

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from yolov9_fast.data import Frame, open_source
from yolov9_fast.engine.prediction_files import PredictionFiles, label_text
from yolov9_fast.engine.predictor import Prediction
from yolov9_fast.errors import UserError

NAMES = {0: "cat", 1: "dog"}
BOX = np.array([[10, 5, 30, 15, 0.9, 1]], np.float32)


def put(files: PredictionFiles, path: str, index: int = 0, frame: int = 0, **options: object) -> None:
    image = np.zeros((20, 40, 3), np.uint8)
    read = Frame(image, path, index, frame, **options)  # type: ignore[arg-type]
    files.write(read, Prediction(path, BOX, NAMES, (20, 40), 0.0, frame))


def test_images_keep_their_names_and_show_their_boxes(tmp_path: Path) -> None:
    files = PredictionFiles(tmp_path)
    put(files, "somewhere/cat.PNG")
    files.close()
    assert [path.name for path in tmp_path.iterdir()] == ["cat.PNG"]
    picture = cv2.imread(str(tmp_path / "cat.PNG"))
    assert picture.shape == (20, 40, 3)
    assert picture[15, 20].any()


def test_equal_stems_get_numbers_in_images_and_text(tmp_path: Path) -> None:
    files = PredictionFiles(tmp_path, text=True)
    for index, path in enumerate(("a/cat.jpg", "b/cat.jpg", "a/Cat.png", "a/dog.jpg")):
        put(files, path, index)
    files.close()
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["Cat-3.png", "cat-2.jpg", "cat.jpg", "dog.jpg"]
    stems = sorted(path.stem for path in (tmp_path / "labels").iterdir())
    assert stems == ["Cat-3", "cat", "cat-2", "dog"]


@pytest.mark.parametrize("video_first", [False, True])
def test_no_picture_takes_the_name_of_a_video_frame(video_first: bool, tmp_path: Path) -> None:
    files = PredictionFiles(tmp_path, text=True)
    sources = [
        ("b/Clip_000000.jpg", False),
        ("a/clip.avi", True),
        ("clip_1234567.png", False),
        ("clip_00001.png", False),
    ]
    for index, (path, is_video) in enumerate(sources[1:2] + sources[:1] + sources[2:] if video_first else sources):
        put(files, path, index, is_video=is_video)
    files.close()
    written = [path.name.lower() for path in (tmp_path / "labels").iterdir()]
    assert len(set(written)) == len(sources)
    assert {"clip_000000.txt", "clip_00001.txt"} < set(written)
    assert len(list(tmp_path.glob("*.*"))) == len(sources)


def test_many_files_of_one_name_get_numbers(tmp_path: Path) -> None:
    files = PredictionFiles(tmp_path, images=False)
    stems = [files._stem(Frame(None, path, index)) for index, path in enumerate(["a-2.png", *["x/a.png"] * 3000])]
    assert stems[:4] == ["a-2", "a", "a-3", "a-4"]
    assert len(set(stems)) == 3001


@pytest.mark.parametrize(
    ("path", "is_video"), [("n" * 251 + ".jpg", False), ("ä" * 125 + ".jp2", False), ("n" * 252 + ".ts", True)]
)
def test_the_longest_names_are_written(path: str, is_video: bool, tmp_path: Path) -> None:
    files = PredictionFiles(tmp_path, text=True, json=True)
    for index in range(2):
        put(files, f"{index}/{path}", index, is_video=is_video)
    files.close()
    pictures = [file for file in tmp_path.iterdir() if file.suffix not in (".json", "")]
    assert len(pictures) == len(list((tmp_path / "labels").iterdir())) == 2
    assert all(file.name.startswith(path[0] * 100) for file in pictures)


def test_names_and_folders_that_are_not_utf8_are_written(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff")
    files = PredictionFiles(folder, text=True, json=True)
    put(files, os.fsdecode(b"caf\xe9.png"))
    put(files, os.fsdecode(b"\xff.avi"), 1, is_video=True)
    files.close()
    names = {os.fsencode(path.name) for path in folder.rglob("*.*")}
    assert names == {b"caf\xe9.png", b"caf\xe9.txt", b"\xff.mp4", b"\xff_000000.txt", b"predictions.json"}
    assert [row["path"] for row in json.loads((folder / "predictions.json").read_text())] == [
        "caf\udce9.png",
        "\udcff.avi",
    ]


def test_a_file_that_cannot_be_written_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = PredictionFiles(tmp_path, text=True, json=True)
    (tmp_path / "a.jpg").mkdir()
    with pytest.raises(UserError, match=r"a\.jpg: cannot be written: Is a directory"):
        put(files, "a.jpg")
    with monkeypatch.context() as patch:
        patch.setattr(cv2, "imencode", lambda *_: (False, None))
        with pytest.raises(UserError, match=r"b\.jpg: the image cannot be encoded"):
            put(files, "b.jpg", 1)
    put(files, "c.jpg", 2)
    files.close()
    assert sorted(path.name for path in tmp_path.rglob("*.txt")) == ["a.txt", "b.txt", "c.txt"]
    assert len(json.loads((tmp_path / "predictions.json").read_text())) == 3


def test_a_picture_too_large_for_its_format_is_an_error(tmp_path: Path) -> None:
    files = PredictionFiles(tmp_path)
    frame = Frame(np.zeros((1, 17000, 3), np.uint8), "a.webp", 0)
    with pytest.raises(UserError, match=r"a\.webp: the image cannot be encoded"):
        files.write(frame, Prediction("a.webp", BOX[:0], NAMES, (1, 17000), 0.0))


def test_a_video_that_cannot_be_written_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2.VideoWriter, "isOpened", lambda _: False, raising=False)
    files = PredictionFiles(tmp_path, text=True)
    with pytest.raises(UserError, match=r"cannot write the video .*clip\.mp4"):
        put(files, "clip.avi", is_video=True)
    put(files, "clip.avi", frame=1, is_video=True)
    files.close()
    assert len(list((tmp_path / "labels").iterdir())) == 2
    assert not list(tmp_path.glob("*.*"))


def test_a_video_without_all_its_frames_is_an_error_and_the_json_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = PredictionFiles(tmp_path, json=True)
    put(files, "clip.avi", is_video=True)
    files._video._count += 1  # as if the disk had been full
    with pytest.raises(UserError, match=r"clip\.mp4: only 1 of 2 frames could be written"):
        files.close()
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.json"]


@pytest.mark.parametrize(
    ("address", "stem"),
    [
        ("rtsp://user:secret@camera:554/live/1", "camera_live_1"),
        ("rtsp://user:sec/ret@camera", "camera"),
        ("http://[::1:x/", "1_x"),
        ("http://?token=secret", "stream"),
        ("http://host/" + "a" * 500, "host_" + "a" * 235),
    ],
)
def test_files_of_a_stream_are_named_by_host_and_path(address: str, stem: str, tmp_path: Path) -> None:
    files = PredictionFiles(tmp_path, images=False)
    assert files._stem(Frame(None, address, 0, is_video=True)) == stem


def test_an_image_of_a_format_that_cannot_be_written_becomes_png(tmp_path: Path) -> None:
    files = PredictionFiles(tmp_path)
    put(files, "scan.jp2")
    assert (tmp_path / "scan.png").is_file()


@pytest.mark.parametrize(
    ("confidence", "row"),
    [(False, "1 0.500000 0.500000 0.500000 0.500000"), (True, "1 0.500000 0.500000 0.500000 0.500000 0.900000")],
)
def test_text_is_normalised_centre_and_size(confidence: bool, row: str) -> None:
    assert label_text(Prediction("", BOX, NAMES, (20, 40), 0.0), confidence) == row + "\n"


def test_an_image_without_objects_has_an_empty_text(tmp_path: Path) -> None:
    files = PredictionFiles(tmp_path, images=False, text=True)
    empty = Prediction("x.jpg", np.zeros((0, 6), np.float32), NAMES, (20, 40), 0.0)
    files.write(Frame(np.zeros((20, 40, 3), np.uint8), "x.jpg", 0), empty)
    assert (tmp_path / "labels" / "x.txt").read_text() == ""


def test_json_holds_every_frame_and_no_password(tmp_path: Path) -> None:
    files = PredictionFiles(tmp_path, images=False, json=True)
    for frame in range(2):
        put(files, "rtsp://user:secret@camera/live", frame=frame, is_video=True)
    files.close()
    text = (tmp_path / "predictions.json").read_text()
    assert "secret" not in text
    assert [(row["path"], row["frame"]) for row in json.loads(text)] == [("rtsp://camera/live", n) for n in range(2)]


def test_a_video_becomes_an_mp4_with_its_frames(tmp_path: Path) -> None:
    files = PredictionFiles(tmp_path, text=True, frame_step=2)
    for frame in (0, 2, 4):
        put(files, "films/clip.avi", frame=frame, is_video=True, fps=10.0)
    assert not (tmp_path / "clip.mp4").exists()  # only when it is complete
    put(files, "0", 1, is_video=True)
    files.close()
    frames = list(open_source(tmp_path / "clip.mp4"))
    assert len(frames) == 3
    assert frames[0].fps == pytest.approx(5.0)
    assert len(list(open_source(tmp_path / "webcam0.mp4"))) == 1
    assert not list(tmp_path.glob(".*"))
    assert sorted(path.name for path in (tmp_path / "labels").glob("clip*"))[-1] == "clip_000004.txt"
