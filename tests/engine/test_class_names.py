"""Class names of weights and of data: the same ones in another order, others, none."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from yolov9_fast.data import load_data_config
from yolov9_fast.engine.config import TrainConfig
from yolov9_fast.engine.evaluation import EvaluationOptions, evaluate
from yolov9_fast.engine.trainer import Trainer
from yolov9_fast.engine.validator import ValidationResult, open_evaluation_set, validate
from yolov9_fast.losses import DetectionLoss
from yolov9_fast.models import DetectionModel, create_model, fuse, load_checkpoint, save_weights
from yolov9_fast.models.class_names import class_order

Make = Callable[..., TrainConfig]
ORDER = [3, 0, 4, 2, 1]
"""The file's class at the place of each of the data's."""


@pytest.fixture(scope="session")
def names(tiny_data: Path) -> list[str]:
    return list(load_data_config(tiny_data).names.values())


@pytest.fixture(scope="session")
def model(tiny_graph: Path, names: list[str]) -> DetectionModel:
    """Random weights whose scores lie around ½, so that there are detections of every class."""
    torch.manual_seed(1)
    model = create_model(tiny_graph, len(names), class_tower=8).eval()
    model.names = dict(enumerate(names))
    for key, value in model.state_dict().items():
        if key.endswith((".0.2.bias", ".1.2.bias", ".2.2.bias")) and value.numel() == len(names):
            value.copy_(torch.linspace(-0.1, 0.1, len(names)))
    return model


def _class_layers(model: DetectionModel) -> list[str]:
    head = f"model.{len(model.graph.layers) - 1}."
    keys = [k for k in model.state_dict() if k.startswith(head) and k.split(".")[2] in ("cv3", "cv5")]
    return [key for key in keys if key.split(".")[4] == "2"]


def _reordered(model: DetectionModel, graph: Path) -> DetectionModel:
    """The same network with its classes in another order: class c of the result is class ORDER[c] of `model`."""
    other = create_model(graph, model.num_classes, class_tower=8).eval()
    state, layers = model.state_dict(), _class_layers(model)
    other.load_state_dict({key: value[ORDER] if key in layers else value for key, value in state.items()})
    other.names = {index: model.names[old] for index, old in enumerate(ORDER)}
    return other


def _validate(model: DetectionModel, data: Path) -> ValidationResult:
    evaluation = open_evaluation_set(load_data_config(data), "val", image_size=64, batch_size=4)
    return validate(model, evaluation, criterion=DetectionLoss(model.num_classes), progress=False)


def _rows(result: ValidationResult) -> list[tuple[float, ...]]:
    return sorted((d["image_id"], d["category_id"], d["score"], *d["bbox"]) for d in result.detections)


def test_the_order_of_classes() -> None:
    names = {0: "a", 1: "b", 2: "c"}
    assert class_order(names, names) == [0, 1, 2]
    assert class_order({0: "c", 1: "a", 2: "b"}, names) == [1, 2, 0]
    assert class_order(None, names) == [0, 1, 2]
    assert class_order({0: "0", 1: "1", 2: "2"}, names) == [0, 1, 2], "indices are no names"
    assert class_order({0: "0", 1: "1", 2: "2"}, {0: "2", 1: "1", 2: "0"}) == [2, 1, 0], "unless the data has them"
    assert class_order(None, {0: "2", 1: "1", 2: "0"}) == [2, 1, 0]
    assert class_order({0: "a", 1: "b", 2: "d"}, names) is None
    assert class_order({0: "a", 1: "a", 2: "b"}, {0: "a", 1: "b", 2: "a"}) is None, "an ambiguous name"


def test_validation_matches_classes_by_name(
    model: DetectionModel, tiny_graph: Path, tiny_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = _validate(model, tiny_data)
    with caplog.at_level(logging.INFO):
        result = _validate(_reordered(model, tiny_graph), tiny_data)
    assert "the weights have the data's classes in another order" in caplog.text
    assert expected.metrics is not None
    assert result.metrics is not None
    np.testing.assert_allclose(_rows(result), _rows(expected), rtol=1e-4, atol=1e-4)
    assert len({row[1] for row in _rows(result)}) == model.num_classes
    assert np.array_equal(result.confusion.matrix, expected.confusion.matrix)
    assert result.metrics.table() == expected.metrics.table()
    assert result.loss == pytest.approx(expected.loss, rel=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_val_writes_the_results_of_the_data_s_classes(
    model: DetectionModel, tiny_graph: Path, tiny_data: Path, tmp_path: Path, fused: bool
) -> None:
    folders = []
    for name, weights in (("a", model), ("b", _reordered(model, tiny_graph))):
        path = save_weights(fuse(weights) if fused else weights, tmp_path / f"{name}.safetensors")
        options = EvaluationOptions(
            path, tiny_data, imgsz=64, device="cpu", workers=0, plots=False, project=tmp_path, name=name
        )
        folders.append(evaluate(options)[1])
    found = [json.loads((folder / "predictions.json").read_text()) for folder in folders]
    rows = [sorted((d["category_id"], d["image_id"], d["score"], *d["bbox"]) for d in part) for part in found]
    assert len({row[0] for row in rows[0]}) == model.num_classes
    np.testing.assert_allclose(rows[0], rows[1], rtol=1e-3, atol=1e-3)
    tables = [(folder / "per_class.txt").read_text() for folder in folders]
    assert tables[0] == tables[1]


def test_other_names_are_a_warning_and_taken_by_index(
    model: DetectionModel, tiny_graph: Path, tiny_data: Path, names: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    expected = _validate(model, tiny_data)
    other = _reordered(model, tiny_graph)
    other.load_state_dict(model.state_dict())
    other.names = {**model.names, 1: "other"}
    with caplog.at_level(logging.WARNING):
        result = _validate(other, tiny_data)
    assert (
        f"val: class 1 is 'other' in the weights and {names[1]!r} in the data (1 of 5 names differ); "
        "the weights' classes are taken by index"
    ) in caplog.text
    assert _rows(result) == _rows(expected)
    caplog.clear()
    other.names = {index: str(index) for index in range(len(names))}  # weights without names
    assert _rows(_validate(other, tiny_data)) == _rows(expected)
    assert not caplog.text


def test_fine_tuning_on_the_same_classes_in_another_order_moves_the_class_branch(
    tiny_config: Make, model: DetectionModel, tiny_graph: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = save_weights(_reordered(model, tiny_graph), tmp_path / "w.safetensors")
    with caplog.at_level(logging.INFO):
        trainer = Trainer(tiny_config(weights=str(weights), class_tower=None))
    assert "has the same classes in another order: they are matched by name" in caplog.text
    expected = model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in trainer.model.state_dict().items())
    trainer = Trainer(tiny_config(weights=str(weights), class_tower=None, classes_by_index=True))
    expected = load_checkpoint(weights).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in trainer.model.state_dict().items())


def test_fine_tuning_on_other_classes_starts_the_class_branch_anew(
    tiny_config: Make,
    model: DetectionModel,
    tiny_data: Path,
    names: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    weights = save_weights(model, tmp_path / "w.safetensors")
    shutil.copytree(tiny_data.parent, tmp_path / "own")
    data = tmp_path / "own" / tiny_data.name
    data.write_text(yaml.safe_dump({**yaml.safe_load(data.read_text()), "names": [*names[:-1], "other"]}))
    options = {"data": str(data), "class_tower": None}
    with caplog.at_level(logging.WARNING):
        started = Trainer(tiny_config(**options, weights=str(weights))).model
    assert f"class 4 is {names[4]!r} in the weights and 'other' in the data (1 of 5 names differ)" in caplog.text
    assert "--classes-by-index" in caplog.text
    layers, source = _class_layers(model), model.state_dict()
    new = Trainer(tiny_config(data=str(data))).model.state_dict()
    for key, value in started.state_dict().items():
        assert torch.equal(value, new[key] if key in layers else source[key]), key
    caplog.clear()
    kept = Trainer(tiny_config(**options, weights=str(weights), classes_by_index=True)).model
    assert all(torch.equal(value, source[key]) for key, value in kept.state_dict().items())
    assert not caplog.text
    assert list(kept.names.values()) == [*names[:-1], "other"]


def test_weights_without_names_are_loaded_by_index(
    tiny_config: Make, model: DetectionModel, tiny_graph: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unnamed = create_model(tiny_graph, model.num_classes, class_tower=8)
    unnamed.load_state_dict(model.state_dict())
    weights = save_weights(unnamed, tmp_path / "w.safetensors")
    with caplog.at_level(logging.WARNING):
        trainer = Trainer(tiny_config(weights=str(weights), class_tower=None))
    assert not caplog.text
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in trainer.model.state_dict().items())
