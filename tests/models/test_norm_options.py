"""eps and momentum of every BatchNorm are those of the file, through reading, writing, deploying and transfer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.models.foreign_files import ULTRALYTICS_PATHS, WKY_PATHS, image, save_pickled_module, small_model
from yolov9_fast.errors import CheckpointError
from yolov9_fast.models import convert, create_model, fuse, load_checkpoint, load_pretrained, save_weights, to_deploy
from yolov9_fast.models.checkpoint import read_checkpoint
from yolov9_fast.models.model import DetectionModel
from yolov9_fast.models.module_options import norm_options


def changed(name: str = "gelan-t") -> DetectionModel:
    """A network of torch's own eps and momentum, two of its BatchNorms different from the rest."""
    model = small_model(name)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.eps, norm.momentum = 1e-5, 0.1
    norms[0].eps, norms[0].momentum = 1e-2, None
    norms[7].eps = 0.5
    return model


def same_outputs(a: DetectionModel, b: DetectionModel) -> bool:
    with torch.no_grad():
        return torch.equal(a.eval()(image()), b.eval()(image()))


@pytest.mark.parametrize("paths", [WKY_PATHS, ULTRALYTICS_PATHS])
def test_a_pickled_network_keeps_them(paths: dict[Any, str], tmp_path: Path) -> None:
    source = changed()
    save_pickled_module(tmp_path / "x.pt", source, paths)
    model = load_checkpoint(tmp_path / "x.pt")
    assert norm_options(model) == norm_options(source)
    source.load_state_dict(model.state_dict())  # the file holds half precision
    assert same_outputs(model, source)


def test_our_own_file_keeps_them_and_says_so_by_its_version(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    for model, version in ((changed(), 2), (small_model("gelan-t"), 1)):
        save_weights(model, tmp_path / "x.safetensors")
        with safetensors.safe_open(tmp_path / "x.safetensors", framework="pt") as file:
            assert json.loads(file.metadata()["yolov9_fast"])["format_version"] == version
        loaded = load_checkpoint(tmp_path / "x.safetensors")
        assert norm_options(loaded) == norm_options(model)
        assert same_outputs(loaded, model)


def test_conversion_deployment_and_folding_keep_the_function(tmp_path: Path) -> None:
    source = changed("yolov9-t")
    deployed = to_deploy(source)
    assert same_outputs(deployed, source)
    assert norm_options(deployed)["model.0.bn"] == (1e-2, None)
    save_weights(source, tmp_path / "x.safetensors")
    converted = convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", deploy=True, fuse=True)
    assert same_outputs(converted, fuse(deployed))


def test_weights_to_start_from_bring_them(tmp_path: Path) -> None:
    source = changed()
    save_pickled_module(tmp_path / "x.pt", source, WKY_PATHS)
    model = create_model("yolov9-t", 3)
    load_pretrained(model, tmp_path / "x.pt")
    norms = norm_options(model)
    assert norms["model.0.bn"] == (1e-2, None)
    assert set(norms.values()) >= {(1e-5, 0.1), (1e-3, 0.03)}  # the auxiliary branch keeps its own


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ([float("inf"), 0.1], "eps"),
        (["x", 0.1], "eps"),
        ([1e-3, -1], "momentum"),
        ([1e-3], "expected eps and momentum"),
    ],
)
def test_what_is_no_option_is_an_error(pair: list[Any], said: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    save_weights(changed(), tmp_path / "x.safetensors")
    with safetensors.safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()["yolov9_fast"])
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    header["batch_norm"]["model.0.bn"] = pair
    safetensors.save_file(state, tmp_path / "x.safetensors", metadata={"yolov9_fast": json.dumps(header)})
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda unit: setattr(unit, "act", nn.ReLU()), r"model\.0\.act is ReLU, expected SiLU"),
        (lambda unit: setattr(unit.conv, "padding", (2, 2)), r"model\.0\.conv has padding \(2, 2\), expected \(1, 1\)"),
        (
            lambda unit: setattr(unit.bn, "eps", "small"),
            r"model\.0\.bn: eps: expected a number in \[0, 1\], got 'small'",
        ),
    ],
)
def test_a_pickled_network_that_computes_something_else_is_refused(change: Any, said: str, tmp_path: Path) -> None:
    source = small_model("gelan-t")
    change(source.model[0])
    save_pickled_module(tmp_path / "x.pt", source, WKY_PATHS)
    with pytest.raises(CheckpointError, match=rf"x\.pt.*{said}"):
        load_checkpoint(tmp_path / "x.pt")


def test_a_state_dict_of_another_project_has_the_published_ones(tmp_path: Path) -> None:
    torch.save(changed().state_dict(), tmp_path / "x.pt")
    content = read_checkpoint(tmp_path / "x.pt")
    assert content.norms == {}
    assert set(norm_options(content.build()).values()) == {(1e-3, 0.03)}
