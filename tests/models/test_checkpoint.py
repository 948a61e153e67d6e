"""Our own weight files come back exactly, carry their network, and are never half written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.models.foreign_files import WKY_PATHS, image, save_pickled_module, small_model
from yolov9_fast.errors import CheckpointError, UserError
from yolov9_fast.models.checkpoint import convert, load_checkpoint, read_checkpoint, save_weights, suggest_architecture
from yolov9_fast.models.graph import graph_from_dict
from yolov9_fast.models.model import DetectionModel
from yolov9_fast.models.reparameterize import fuse, to_deploy

safetensors = pytest.importorskip("safetensors")

TINY_GRAPH = {
    "name": "mine",
    "layers": [
        [-1, "Conv", [8, 3, 2]],
        [-1, "Conv", [16, 3, 2]],
        [-1, "AConv", [16]],
        [-1, "AConv", [16]],
        [-1, "AConv", [16]],
        [[2, 3, 4, 2, 3, 4], "DualDDetect", []],
    ],
}


def tiny(num_classes: int = 2) -> DetectionModel:
    return DetectionModel(graph_from_dict(TINY_GRAPH, "mine.yaml"), num_classes)


def assert_equal(a: DetectionModel, b: DetectionModel) -> None:
    assert a.graph.layers == b.graph.layers
    assert a.names == b.names
    assert a.is_fused == b.is_fused
    assert (a.graph_name, a.num_classes, a.class_tower, a.box_groups) == (
        b.graph_name,
        b.num_classes,
        b.class_tower,
        b.box_groups,
    )
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    assert all(torch.equal(left[k], v) and left[k].dtype == v.dtype for k, v in right.items())


@pytest.mark.parametrize("form", ["train", "fused", "deployed", "half", "options", "channels_last"])
def test_weights_come_back_exactly(form: str, tmp_path: Path) -> None:
    model = small_model("yolov9-t", 3)
    if form == "fused":
        model = fuse(model)
    elif form == "deployed":
        model = fuse(to_deploy(model))
    elif form == "half":
        model = model.half()
    elif form == "options":
        model = small_model("gelan-t", 3, class_tower=96, box_groups=1)
    elif form == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    found = load_checkpoint(save_weights(model, tmp_path / "w.safetensors"))
    assert_equal(found, model)
    if form not in ("half", "channels_last"):
        assert torch.equal(found(image()), model.eval()(image()))


def test_a_users_graph_travels_with_its_weights(tmp_path: Path) -> None:
    model = tiny()
    path = save_weights(model, tmp_path / "w.safetensors", metadata={"epoch": 3, "AP": 0.25})
    assert_equal(load_checkpoint(path), model)
    content = read_checkpoint(path)
    assert content.metadata == {"epoch": 3, "AP": 0.25}
    assert content.architecture.source == "yolov9_fast"
    assert suggest_architecture(path).graph_name == "mine"


def test_class_names_travel_with_the_weights(tmp_path: Path) -> None:
    model = tiny()
    model.names = {0: "Grüße", 1: "wbc"}
    assert load_checkpoint(save_weights(model, tmp_path / "w.safetensors")).names == {0: "Grüße", 1: "wbc"}


def test_a_loaded_network_trains(tmp_path: Path) -> None:
    model = load_checkpoint(save_weights(tiny(), tmp_path / "w.safetensors")).train()
    sum(m.sum() for m in model(image()).main).backward()
    assert model.model[0].conv.weight.grad is not None  # type: ignore[union-attr]


def test_other_readers_can_open_the_file(tmp_path: Path) -> None:
    model = tiny()
    path = save_weights(model, tmp_path / "w.safetensors")
    with safetensors.safe_open(path, framework="np") as file:
        assert set(file.keys()) == set(model.state_dict())
        assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.99])
def test_a_truncated_file_is_an_error(share: float, tmp_path: Path) -> None:
    path = save_weights(tiny(), tmp_path / "w.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match=r"w\.safetensors"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("not json", "cannot be read"),
        ("{}", "cannot be read"),
        ("[]", "cannot be read"),
        (json.dumps({"format_version": 99}), "format version 99"),
        (json.dumps({"format_version": 1, "graph": {"layers": [[-1, "Evil", []]]}}), "unknown block 'Evil'"),
    ],
)
def test_a_description_that_cannot_be_read_is_an_error(header: str, message: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"model.0.conv.weight": torch.zeros(1)}, tmp_path / "w.safetensors", metadata={"yolov9_fast": header})
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "w.safetensors")


def test_weights_that_do_not_fit_their_own_description_name_the_key(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = save_weights(tiny(), tmp_path / "w.safetensors")
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    state = dict(tiny(num_classes=4).state_dict())
    save_file(state, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=r"model\.5\.cv3\.0\.2\.weight has shape \[4, 16, 1, 1\]"):
        load_checkpoint(path)


def test_another_suffix_is_refused_and_a_failed_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="safetensors"):
        save_weights(tiny(), tmp_path / "w.pt")
    model = tiny()
    path = save_weights(model, tmp_path / "w.safetensors")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"w\.safetensors: .*No space left on device; the previous file is intact"):
        save_weights(tiny(), path)
    monkeypatch.undo()
    assert_equal(load_checkpoint(path), model)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("deploy", "fused"), [(False, False), (True, True)])
def test_convert_writes_what_was_asked_for(deploy: bool, fused: bool, tmp_path: Path) -> None:
    source = small_model("yolov9-t", 3)
    save_pickled_module(tmp_path / "x.pt", source, WKY_PATHS)
    convert(tmp_path / "x.pt", tmp_path / "y.safetensors", deploy=deploy, fuse=fused)
    found = load_checkpoint(tmp_path / "y.safetensors")
    assert (found.graph_name, found.is_fused) == ("gelan-t" if deploy else "yolov9-t", fused)
    assert found.names == source.names
    with torch.no_grad():
        assert torch.allclose(found(image()), source(image()), rtol=1e-3, atol=1e-3)


def test_weights_that_are_not_finite_are_loaded_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny()
    with torch.no_grad():
        model.model[1].conv.weight[0] = float("nan")  # type: ignore[union-attr, operator, index]
    load_checkpoint(save_weights(model, tmp_path / "w.safetensors"))
    assert "model.1.conv.weight holds numbers that are not finite" in caplog.text
