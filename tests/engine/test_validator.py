"""Evaluation of a split: every table, matrix and file names the same class, whatever the order of the categories."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tests.data.drawing import add_image, paint, write_config
from yolov9_fast.data import load_data_config
from yolov9_fast.engine import validator
from yolov9_fast.engine.config import TrainConfig
from yolov9_fast.engine.distributed import ProcessGroup
from yolov9_fast.engine.host_copy import HostCopy
from yolov9_fast.engine.report import save_evaluation
from yolov9_fast.engine.training_data import open_training_data
from yolov9_fast.engine.validator import ValidationResult, open_evaluation_set, validate
from yolov9_fast.losses import DetectionLoss
from yolov9_fast.models import DetectionModel, create_model

OBJECTS = {"a": 3, "b": 2, "c": 1}
IDS = {"a": 30, "b": 10, "c": 20}


@pytest.fixture(scope="module")
def model(tiny_graph: Path) -> DetectionModel:
    torch.manual_seed(0)
    return create_model(str(tiny_graph), 3, class_tower=8)


def data_file(root: Path, names: list[str], **changes: object) -> Path:
    (root / "pics").mkdir(exist_ok=True)
    annotations = []
    for number in range(1, 4):
        cv2.imwrite(str(root / "pics" / f"{number}.png"), paint(64, 64, [(0, 5, 5, 30, 30)]))
        for name, count in OBJECTS.items():
            if number <= count:
                bbox = [10 * number, 5, 20, 20]
                entry = {"id": len(annotations) + 1, "image_id": number, "category_id": IDS[name], "bbox": bbox}
                annotations.append(entry | changes)
    content = {
        "images": [{"id": number, "file_name": f"{number}.png"} for number in range(1, 4)],
        "annotations": annotations,
        "categories": [{"id": IDS[name], "name": name} for name in IDS],
    }
    (root / "a.json").write_text(json.dumps(content))
    return write_config(root, names=names, train="pics", val={"images": "pics", "annotations": "a.json"})


def evaluated(file: Path, model: DetectionModel) -> ValidationResult:
    evaluation = open_evaluation_set(load_data_config(file), "val", image_size=64, batch_size=4)
    return validate(model, evaluation, max_det=20, criterion=DetectionLoss(3), progress=False)


@pytest.mark.parametrize("names", [["a", "b", "c"], ["c", "a", "b"], ["b", "c", "a"]])
def test_every_class_has_its_own_name_in_any_order(
    tmp_path: Path, model: DetectionModel, device: str, names: list[str]
) -> None:
    model.to(device)
    result = evaluated(data_file(tmp_path, names), model)
    assert result.metrics is not None
    assert {c.name: c.objects for c in result.metrics.per_class} == OBJECTS
    assert [c.class_index for c in result.metrics.per_class] == [0, 1, 2]
    assert result.metrics.curves.names == tuple(names)
    assert result.confusion.matrix.sum(axis=0)[:3].tolist() == [OBJECTS[name] for name in names]
    best = {name: max(d["score"] for d in result.detections if d["category_id"] == IDS[name]) for name in names}
    # Class 0 of the network is the first name: its best score belongs to the category of that name.
    reference = evaluated(data_file(tmp_path, ["a", "b", "c"]), model)
    scores = [max(d["score"] for d in reference.detections if d["category_id"] == IDS[name]) for name in "abc"]
    assert [best[name] for name in names] == scores
    save_evaluation(result, dict(enumerate(names)), tmp_path / "out", plots=False)
    rows = [line.split() for line in (tmp_path / "out" / "per_class.txt").read_text().splitlines()[3:6]]
    assert [(row[0], int(row[2])) for row in rows] == [(name, OBJECTS[name]) for name in names]


def test_ignored_objects_are_none_in_loss_confusion_and_ap(tmp_path: Path, model: DetectionModel, device: str) -> None:
    model.to(device)
    results = [
        evaluated(data_file(tmp_path, ["a", "b", "c"], **change), model) for change in ({"ignore": 1}, {"iscrowd": 1})
    ]
    for result in results:
        assert result.metrics is not None
        assert [c.objects for c in result.metrics.per_class] == [0, 0, 0]
        assert np.isnan(result.metrics.ap)
        assert result.confusion.matrix[:, :3].sum() == 0
        assert result.loss is not None
        assert result.loss["box"] == 0
    assert results[0].loss == results[1].loss


def test_detections_name_the_file_of_their_image(tmp_path: Path, model: DetectionModel, device: str) -> None:
    model.to(device)
    for folder in ("left", "right"):
        add_image(tmp_path, "x.png", paint(64, 64, [(0, 5, 5, 30, 30)]), "0 0.3 0.3 0.4 0.4", f"val/{folder}")
    result = evaluated(write_config(tmp_path, val="images/val", train="images/val"), model)
    save_evaluation(result, {}, tmp_path / "out", plots=False)
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())
    files = {(row["image_id"], row["file_name"]) for row in rows}
    assert files == {(1, "images/val/left/x.png"), (2, "images/val/right/x.png")}
    rows = evaluated(data_file(tmp_path, ["a", "b", "c"]), model).detections
    assert {row["file_name"] for row in rows} == {"1.png", "2.png", "3.png"}


def test_a_batch_is_waited_for_once_while_the_next_is_computed(
    tmp_path: Path, model: DetectionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    class Recorded(HostCopy):
        def __init__(self, *tensors: torch.Tensor) -> None:
            super().__init__(*tensors)
            self.number = sum(event.startswith("begun") for event in events)
            events.append(f"begun {self.number}")

        def wait(self) -> list[torch.Tensor]:
            events.append(f"read {self.number}")
            return super().wait()

    monkeypatch.setattr(validator, "HostCopy", Recorded)
    evaluation = open_evaluation_set(
        load_data_config(data_file(tmp_path, ["a", "b", "c"])), "val", image_size=64, batch_size=1
    )
    validate(model, evaluation, max_det=20, criterion=DetectionLoss(3), progress=False)
    assert events == ["begun 0", "begun 1", "read 0", "begun 2", "read 1", "read 2"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batches_are_page_locked_for_a_run_on_a_gpu_only(
    tiny_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    data = open_training_data(tiny_config(), ProcessGroup(0, 1, torch.device(device)))
    for loader in (data.loader, data.evaluation.loader):
        assert loader._loader is not None
        assert loader._loader.pin_memory is (device == "cuda")
