"""Files of predictions: names, text, JSON, videos."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from yolov9_fast.data import Frame, open_source
from yolov9_fast.engine.prediction_files import PredictionFiles, label_text
from yolov9_fast.engine.predictor import Prediction

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
