"""A state file is read without running anything, and everything in it is checked before it replaces anything."""

from __future__ import annotations

import copy
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from tests.engine.conftest import TINY_GRAPH
from tests.models import hostile
from yolov9_fast.engine.ema import ModelEMA
from yolov9_fast.engine.loss_scale import LossScale
from yolov9_fast.engine.run_files import load_state, save_state
from yolov9_fast.engine.training_state import TrainingState
from yolov9_fast.errors import CheckpointError
from yolov9_fast.models.graph import graph_from_dict
from yolov9_fast.models.model import DetectionModel


def new_state(*, adam: bool = True) -> TrainingState:
    model = DetectionModel(graph_from_dict(yaml.safe_load(TINY_GRAPH), "tiny"), 2, class_tower=8)
    optimizer = torch.optim.AdamW(model.parameters()) if adam else torch.optim.SGD(model.parameters(), momentum=0.9)
    return TrainingState(model, ModelEMA(model), optimizer, LossScale(torch.device("cpu"), enabled=False))


@functools.cache
def trained_state() -> TrainingState:
    state = new_state()
    for norm in (m for m in state.model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eps, norm.momentum = 1e-5, 0.1
    for parameter in state.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.flat.hide_gradients()
    state.flat.write_rates()
    state.flat.update(clip=0.0, scale=state.scale, processes=1)
    state.epoch, state.iteration, state.best_fitness = 3, 40, float("nan")
    state.rows = [{"epoch": 4, "val/AP": float("nan")}]
    state.data = {"names": ["a", "b"]}
    return state


def test_a_state_comes_back_exactly_with_the_options_of_its_batch_norms(tmp_path: Path) -> None:
    state = trained_state()
    save_state(tmp_path / "state.pt", state.capture())
    other = new_state()
    other.restore(load_state(tmp_path / "state.pt"))
    other.data = state.data
    first, second = state.capture(), other.capture()
    assert json.dumps(first, default=_plain) == json.dumps(second, default=_plain)
    norms = [m for model in (other.model, other.ema.model) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-5, 0.1)}


def _plain(value: Any) -> Any:
    return value.tolist()


def set_entry(*keys: Any) -> Callable[[Any], Callable[[dict[str, Any]], None]]:
    """Changes of the entry under `keys`."""

    def of(value: Any) -> Callable[[dict[str, Any]], None]:
        def change(saved: dict[str, Any]) -> None:
            place: Any = saved
            for key in keys[:-1]:
                place = place[key]
            place[keys[-1]] = value

        return change

    return of


KEY = "model.0.conv.weight"
CHANGES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "an epoch that is text": (set_entry("epoch")("3"), "epoch: expected an integer of at least -1, got a str"),
    "an epoch of 10^30": (set_entry("epoch")(10**30), "epoch"),
    "an infinite iteration": (set_entry("iteration")(float("inf")), "iteration: expected an integer"),
    "finished that is text": (set_entry("finished")("no"), "finished: expected bool, got a str"),
    "rows that are nested": (set_entry("rows")("[" * 5000 + "]" * 5000), "rows: expected JSON"),
    "rows of text": (set_entry("rows")('[{"epoch": "x"}]'), "rows: epoch: expected a number"),
    "rows that are a number": (set_entry("rows")("1e999"), "rows: expected a list of mappings"),
    "data that are a list": (set_entry("data")("[]"), "data: expected a mapping"),
    "no average": (lambda saved: saved.pop("ema"), "ema is missing"),
    "a weight of another shape": (set_entry("model", KEY)(torch.zeros(3)), rf"model: {KEY} has shape \[3\]"),
    "a weight of another kind": (set_entry("model", KEY)(torch.zeros(8, 3, 3, 3).long()), "expected a tensor of"),
    "a weight that is a number": (set_entry("ema", KEY)(1.0), "expected a tensor"),
    "a weight too many": (set_entry("model", "x")(torch.zeros(3)), "model: x is unexpected"),
    "a learning rate that is text": (set_entry("optimizer", "param_groups", 0, "lr")("x"), "lr: expected a float"),
    "a group that is a list": (set_entry("optimizer", "param_groups", 0)([]), "expected a mapping"),
    "another parameter": (set_entry("optimizer", "param_groups", 0, "params", 0)("x"), "params"),
    "a moment of another shape": (set_entry("optimizer", "state", 0, "exp_avg")(torch.zeros(7)), r"exp_avg: expected"),
    "a moment for no parameter": (set_entry("optimizer", "state", 10**9)({}), "expected mappings for its"),
    "gradients of another shape": (set_entry("gradients", 0)(torch.zeros(2)), r"gradients\[0\] has shape \[2\]"),
    "too few gradients": (lambda saved: saved["gradients"].pop(), "gradients: expected a list of"),
    "a generator of another size": (set_entry("torch_rng")(torch.zeros(3, dtype=torch.uint8)), "torch_rng"),
    "eps that is text": (set_entry("batch_norm", "model.0.bn", 0)("x"), "model.0.bn: eps: expected"),
    "no options of BatchNorm": (set_entry("batch_norm")(None), "batch_norm: expected a mapping"),
    "a single option of BatchNorm": (set_entry("batch_norm", "model.0.bn")([1e-3]), "expected eps and momentum"),
    "a scaler of text": (set_entry("scaler", "scale")("x"), "scaler"),
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_an_entry_of_another_kind_is_an_error_and_changes_nothing(name: str, tmp_path: Path) -> None:
    change, said = CHANGES[name]
    saved = copy.deepcopy(trained_state().capture())
    change(saved)
    save_state(tmp_path / "state.pt", saved)
    state = new_state()
    before = copy.deepcopy(state.capture())
    with pytest.raises((CheckpointError, ValueError), match=said) as found:
        state.restore(load_state(tmp_path / "state.pt"))
    assert len(str(found.value)) < 500
    assert json.dumps(before, default=_plain) == json.dumps(state.capture(), default=_plain)


class Attack:
    def __reduce__(self) -> Any:
        return os.mkdir, ("attacked",)


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"version": 99},
        {"version": [[]]},
        {"version": torch.zeros(3)},
        {"version": 2},
        Attack(),
        {"version": Attack()},
    ],
)
def test_what_is_no_state_is_one_line(content: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match=r"state\.pt") as found:
        load_state(tmp_path / "state.pt")
    assert len(str(found.value)) < 500
    assert not (tmp_path / "attacked").exists()


def test_a_state_that_multiplies_is_refused(tmp_path: Path) -> None:
    path = hostile.zip_checkpoint(tmp_path / "state.pt", hostile.MULTIPLYING["encoded copies"])
    with hostile.memory_limit(400), pytest.raises(CheckpointError, match="PICKLE_STEPS"):
        load_state(path)
