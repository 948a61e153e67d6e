"""`val`, `predict`, `convert`, `info`: what they print, write and refuse."""

from __future__ import annotations

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from yolov9_fast.cli.main import main
from yolov9_fast.engine.prediction_files import PredictionFiles
from yolov9_fast.errors import UserError


def test_val_prints_tables_and_writes_its_files(
    shapes: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["val", "--weights", str(weights), "--data", str(shapes), "--imgsz", "50", "--workers", "0"]
    assert main([*words, "--device", "cpu", "--project", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "image size 50 is not a multiple of 32: using 64" in shown
    assert "AR100" in shown
    assert "gelan-t, fused, on cpu" in shown
    names = {path.name for path in (tmp_path / "exp").iterdir()}
    assert {"predictions.json", "metrics.json", "per_class.txt", "PR_curve.png", "confusion_matrix.png"} <= names


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--split", "test"], "expected one of train, val, got 'test'"),
        (["--weights", "absent.pt"], "no such checkpoint"),
        (["--data", "absent.yaml"], "does not exist"),
        (["--conf", "7"], "conf: expected a value in [0, 1], got 7.0"),
        (["--batch", "0"], "batch: expected at least 1, got 0"),
        (["--device", "0,1"], "device: expected one device"),
    ],
)
def test_val_names_what_is_wrong(
    words: list[str], message: str, shapes: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = ["val", "--weights", str(weights), "--data", str(shapes), "--project", str(tmp_path / "runs")]
    assert main([*usual, *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_val_refuses_weights_of_other_classes(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "two.yaml").write_text("val: .\nnames: [a, b]\n")
    assert main(["val", "--weights", str(weights), "--data", str(tmp_path / "two.yaml")]) == 2
    assert "expected 2 classes as in" in capsys.readouterr().err


def test_predict_skips_and_counts_what_it_cannot_read(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    cv2.imwrite(str(images / "good.jpg"), np.full((40, 60, 3), 90, np.uint8))
    (images / "bad.jpg").write_bytes(b"no picture")
    words = ["predict", "--weights", str(weights), "--imgsz", "64", "--project", str(tmp_path), "--save-json"]
    assert main([*words, "--source", str(images), "--conf", "0"]) == 0
    shown = capsys.readouterr()
    assert "1 image, 1 unreadable and skipped" in shown.out
    assert "bad.jpg" in shown.err
    (record,) = json.loads((tmp_path / "exp" / "predictions.json").read_text())
    assert (record["width"], record["height"], Path(record["path"]).name) == (60, 40, "good.jpg")
    assert (tmp_path / "exp" / "good.jpg").is_file()

    assert main([*words, "--source", str(images / "bad.jpg")]) == 1


def test_predict_goes_on_after_what_it_cannot_read_or_write(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    names = [os.fsdecode(b"\xff\n.jpg"), "a.jpg", "n" * 245 + ".jpg", "z.jpg"]
    for name in names:
        (images / name).write_bytes(cv2.imencode(".jpg", np.full((40, 60, 3), 90, np.uint8))[1].tobytes())
    writer = cv2.VideoWriter(str(images / "v.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 5.0, (64, 48))
    for _ in range(9):
        writer.write(np.zeros((48, 64, 3), np.uint8))
    writer.release()
    film = bytearray((images / "v.avi").read_bytes())
    start = film.index(b"movi") + 12
    size = int.from_bytes(film[start - 4 : start], "little")
    film[start : start + size] = bytes(size)
    (images / "v.avi").write_bytes(film)
    write = PredictionFiles._write_image

    def write_all_but_a(files: PredictionFiles, suffix: str, stem: str, image: np.ndarray) -> None:
        if stem == "a":
            raise UserError("a.jpg: cannot be written: No space left on device")
        write(files, suffix, stem, image)

    monkeypatch.setattr(PredictionFiles, "_write_image", write_all_but_a)
    words = ["predict", "--weights", str(weights), "--imgsz", "64", "--project", str(tmp_path / "runs"), "--save-txt"]
    assert main([*words, "--source", str(images), "--vid-stride", "4"]) == 1
    shown = capsys.readouterr()
    assert "warning: not written: a.jpg: cannot be written: No space left on device\n" in shown.err
    assert "v.avi: 1 of 9 frames cannot be decoded, the first is frame 0\n" in shown.err
    assert "6 images, 1 unreadable and skipped, 1 not written; results in" in shown.out
    assert r"\udcff\n.jpg: 60x40" in shown.out
    assert len(list((tmp_path / "runs" / "exp" / "labels").iterdir())) == 6
    assert len(list((tmp_path / "runs" / "exp").glob("*.*"))) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--source", "rtsp://user:secret@127.0.0.1:9/x"],
            "error: source: stream rtsp://127.0.0.1:9/x cannot be opened",
        ),
        (["--source", "absent.jpg"], "absent.jpg does not exist"),
        (["--source", ".", "--classes", "cat"], "got 'cat'"),
        (["--source", ".", "--iou", "2"], "iou: expected a value in [0, 1]"),
        (["--source", ".", "--vid-stride", "0"], "--vid-stride: expected at least 1, got 0"),
    ],
)
def test_predict_names_what_is_wrong(
    words: list[str], message: str, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", "--weights", str(weights), "--project", str(tmp_path / "runs"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_convert_says_what_it_read_and_wrote(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "fused.safetensors"
    assert main(["convert", str(weights), str(target), "--fuse"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "gelan-t (5 classes" in first
    assert "not fused" in first
    assert str(target) in second
    assert ", fused" in second
    assert main(["convert", str(weights), str(tmp_path / "fused.pt")]) == 2


def test_info_describes_weights(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--weights", str(weights)]) == 0
    shown = capsys.readouterr().out
    assert "gelan-t (5 classes" in shown
    assert "2 triangle" in shown


def test_info_counts_a_network_as_published(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--model", "yolov9-t", "--class-tower", "80"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert any("deploy, fused" in row and "2,001,840" in row and "7.71" in row for row in rows)
    assert main(["info", "--model", "yolov7-af"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert any("deploy, fused" in row and "43,564,736" in row and "130.51" in row for row in rows)
    assert main(["info", "--model", "yolov9-q"]) == 2
    assert main(["info", "--model", "yolov9-t", "--num-classes", "0"]) == 2


def test_info_reports_the_installation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert "torch" in capsys.readouterr().out
