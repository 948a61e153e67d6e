"""Inference that is recorded for each shape; without a GPU by `tests/recording.py`."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import yolov9_fast as yf
from tests.recording import record
from yolov9_fast._capture import Capture
from yolov9_fast.data import ImageRecord, LabelReport
from yolov9_fast.data.sample import Batch
from yolov9_fast.engine import inference
from yolov9_fast.engine.evaluation import EvaluationOptions
from yolov9_fast.engine.inference import Inference
from yolov9_fast.engine.predictor import Predictor
from yolov9_fast.engine.validator import EvaluationSet, validate
from yolov9_fast.errors import UserError
from yolov9_fast.losses import DetectionLoss
from yolov9_fast.models import DetectionModel, create_model


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with the recorder of the tests and one plain call."""
    monkeypatch.setattr(inference, "Capture", functools.partial(Capture, record=record, warmup=1))


@pytest.fixture
def model() -> DetectionModel:
    torch.manual_seed(0)
    return create_model("gelan-t", 3).eval()


def images_of(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_shapes_are_recorded_and_give_what_plain_calls_give(recorded: None, model: DetectionModel) -> None:
    cpu = torch.device("cpu")
    captured = Inference("here", model, cpu)
    plain = Inference("here", model, cpu, capture="off")
    shapes = [(2, 3, 64, 64), (1, 3, 32, 64)]
    for seed in range(4):
        for shape in shapes:
            images = images_of(seed, *shape)
            maps, prediction = captured(images)
            own_maps, own_prediction = plain(images)
            assert torch.equal(prediction, own_prediction)
            assert all(map(torch.equal, maps, own_maps))
    assert [key[0] for key in captured.capture.recorded] == shapes
    assert plain.capture.recorded == ()


@torch.no_grad()
def test_changes_of_the_model_are_noticed(recorded: None, model: DetectionModel) -> None:
    cpu, images = torch.device("cpu"), images_of(0, 1, 3, 32, 32)
    captured, plain = Inference("here", model, cpu), Inference("here", model, cpu, capture="off")
    for _ in range(3):
        captured(images)
    assert len(captured.capture.recorded) == 1
    first = next(model.parameters())
    first.mul_(2)  # in place: seen by the recording
    assert torch.equal(captured(images)[1], plain(images)[1])
    assert len(captured.capture.recorded) == 1
    first.data = first.data * 0.1  # elsewhere
    assert torch.equal(captured(images)[1], plain(images)[1])
    assert captured.capture.recorded == ()
    with yf.backend("cpu"):
        captured(images)
        captured(images)
    assert captured.capture.recorded[0][-1] == (("", "cpu"),)
    assert torch.equal(captured(images)[1], plain(images)[1])


def test_a_predictor_finds_the_same(recorded: None, model: DetectionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = Predictor(model, 64, conf=0.0001, device="cpu")
    plain = Predictor(model, 64, conf=0.0001, device="cpu", capture="off")
    kept = []
    for seed in range(4):
        image = images_of(seed, 48, 60, 3).numpy()
        kept.append((captured.detect(image).boxes, plain.detect(image).boxes))
    assert all(len(one) and np.array_equal(one, other) for one, other in kept)  # none changed afterwards
    captured.conf = plain.conf = 0.01  # not part of the recording
    image = images_of(9, 48, 60, 3).numpy()
    assert np.array_equal(captured.detect(image).boxes, plain.detect(image).boxes)
    recordings = captured._inference.capture.recorded
    assert [key[0] for key in recordings] == [(1, 3, 64, 64)]
    assert plain._inference.capture.recorded == ()


def evaluation_of(batches: list[Batch]) -> EvaluationSet:
    size = len(batches[0].images)
    boxes = np.array([[0, 0.5, 0.5, 0.25, 0.25]], np.float32)
    records = [ImageRecord(Path(f"{i}.jpg"), 64, 64, i, boxes) for i in range(size * len(batches))]
    names = {i: str(i) for i in range(3)}
    truth = {
        "images": [{"id": i, "width": 64, "height": 64} for i in range(len(records))],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in names.items()],
    }

    class Batches:
        dataset = SimpleNamespace(rect=False)

        def __iter__(self) -> Iterator[Batch]:
            return iter(batches)

    loader: Any = Batches()
    return EvaluationSet("val", names, records, LabelReport(), truth, list(names), loader)


def test_an_evaluation_measures_the_same(recorded: None, model: DetectionModel) -> None:
    """A batch is read while the next one is computed."""
    batches = []
    for number in range(5):
        size = 2 if number < 4 else 1  # the last one is short
        indices = [2 * number + position for position in range(size)]
        targets = torch.tensor([[i, 0, 0.5, 0.5, 0.25, 0.25] for i in range(size)], dtype=torch.float32)
        shape = [(64, 64)] * size
        images = images_of(number, size, 3, 64, 64)
        batches.append(Batch(images, targets, indices, shape, [(1.0, 1.0)] * size, [(0, 0)] * size))
    results = [
        validate(
            model, evaluation_of(batches), criterion=DetectionLoss(3), channels_last=True, progress=False, capture=mode
        )
        for mode in ("auto", "off")
    ]
    assert results[0].loss == results[1].loss
    assert results[0].detections == results[1].detections
    assert len(results[0].detections) > 100


def test_another_word_is_an_error(model: DetectionModel) -> None:
    message = "capture: expected auto or off, got 'on'"
    with pytest.raises(UserError, match=message):
        Predictor(model, 64, device="cpu", capture="on")
    with pytest.raises(UserError, match=message):
        EvaluationOptions("weights", "data", capture="on")
