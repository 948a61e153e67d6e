"""Files of other projects give networks with the same outputs; files that fit nothing say where they differ."""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.models.foreign_files import (
    ULTRALYTICS_PATHS,
    WKY_PATHS,
    deployed_state,
    image,
    mit_state_dict,
    save_pickled_module,
    small_model,
)
from yolov9_fast.errors import CheckpointError
from yolov9_fast.models.checkpoint import load_checkpoint, read_checkpoint
from yolov9_fast.models.foreign import identify, read_state_dict
from yolov9_fast.models.foreign_keys import official_keys
from yolov9_fast.models.graph import list_models
from yolov9_fast.models.model import DetectionModel, create_model
from yolov9_fast.models.reparameterize import fuse, to_deploy


def same_outputs(a: DetectionModel, b: DetectionModel, tolerance: float = 0.0) -> bool:
    with torch.no_grad():
        return float((a.eval()(image()) - b.eval()(image())).abs().max()) <= tolerance


def save(path: Path, state: Any) -> Path:
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def training() -> DetectionModel:
    return small_model("yolov9-t")


@pytest.fixture(scope="module")
def deployed() -> DetectionModel:
    return small_model("gelan-t")


def test_a_pickled_training_module_gives_the_training_graph(training: DetectionModel, tmp_path: Path) -> None:
    save_pickled_module(tmp_path / "x.pt", training, WKY_PATHS)
    assert "models.yolo" not in sys.modules
    model = load_checkpoint(tmp_path / "x.pt")
    assert (model.graph_name, model.num_classes, model.box_groups) == ("yolov9-t", 5, 4)
    assert model.names == training.names
    assert not model.training
    assert all(p.dtype == torch.float32 and p.requires_grad == ("dfl" not in n) for n, p in model.named_parameters())
    assert same_outputs(model, training)
    raw, expected = model.raw(image()), training.raw(image())
    assert raw.auxiliary is not None
    assert expected.auxiliary is not None
    assert all(torch.equal(a, b) for a, b in zip(raw.auxiliary, expected.auxiliary, strict=True))


def test_a_converted_module_gives_the_deployed_graph(deployed: DetectionModel, tmp_path: Path) -> None:
    save_pickled_module(tmp_path / "x.pt", deployed, WKY_PATHS)
    model = load_checkpoint(tmp_path / "x.pt")
    assert model.graph_name == "gelan-t"
    assert same_outputs(model, deployed)


def test_the_averaged_weights_are_preferred(deployed: DetectionModel, tmp_path: Path) -> None:
    other = small_model("gelan-t")
    with torch.no_grad():
        other.model[0].conv.weight.mul_(2)  # type: ignore[union-attr, operator]
    save_pickled_module(tmp_path / "x.pt", deployed, WKY_PATHS, ema=other)
    assert same_outputs(load_checkpoint(tmp_path / "x.pt"), other)
    assert not same_outputs(other, deployed)


def test_an_absent_average_falls_back_to_the_model(deployed: DetectionModel, tmp_path: Path) -> None:
    save_pickled_module(tmp_path / "x.pt", deployed, WKY_PATHS, ema=None)
    assert same_outputs(load_checkpoint(tmp_path / "x.pt"), deployed)


def test_an_ultralytics_module_has_dense_box_towers(tmp_path: Path) -> None:
    source = small_model("gelan-t", class_tower=80, box_groups=1)
    save_pickled_module(tmp_path / "x.pt", source, ULTRALYTICS_PATHS)
    content = read_checkpoint(tmp_path / "x.pt")
    assert (content.architecture.source, content.architecture.graph_name) == ("ultralytics", "gelan-t")
    assert (content.architecture.class_tower, content.architecture.box_groups) == (80, 1)
    assert content.metadata["class_path"] == "ultralytics.nn.tasks.DetectionModel"
    assert same_outputs(content.build(), source)


def test_a_depth_wise_class_tower_is_refused_with_the_first_key_and_the_reason(tmp_path: Path) -> None:
    state = dict(small_model("gelan-t", box_groups=1).state_dict())
    for key in [k for k in state if ".cv3.0.0." in k]:
        value = state.pop(key)
        state[key.replace(".cv3.0.0.", ".cv3.0.0.0.")] = value
    with pytest.raises(CheckpointError, match=r"x\.pt.*gelan-t.*model\.22\.cv3\.0\.0\.conv\.weight.*depth-wise"):
        load_checkpoint(save(tmp_path / "x.pt", state))


def test_a_mit_state_dict_gives_the_same_network(tmp_path: Path) -> None:
    name = "yolov9-t"
    source = small_model(name, 3)
    content = read_checkpoint(save(tmp_path / "x.pt", mit_state_dict(source)))
    assert (content.architecture.source, content.architecture.graph_name) == ("mit", name)
    assert content.state.keys() == source.state_dict().keys()
    assert all(torch.equal(content.state[k], v) for k, v in source.state_dict().items())


@pytest.mark.parametrize("name", ["yolov9-s", "yolov9-m", "yolov9-c", "gelan-m"])
def test_mit_keys_become_exactly_the_official_ones(name: str) -> None:
    with torch.device("meta"):
        source = create_model(name)
    numbers = source.state_dict()
    source.state_dict = lambda: numbers  # type: ignore[method-assign, assignment]
    renamed, spelling = official_keys(mit_state_dict(source))
    assert spelling == "mit"
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in numbers.items()}
    assert all("dfl" in k or renamed[k] is v for k, v in numbers.items())


def test_a_few_mit_keys_by_hand() -> None:
    expected = {
        "0.conv.weight": "model.1.conv.weight",
        "3.conv1.bn.bias": "model.4.cv1.bn.bias",
        "2.conv2.0.bottleneck.0.conv1.conv2.bn.weight": "model.3.cv2.0.m.0.cv1.conv2.bn.weight",
        "2.conv2.0.bottleneck.0.conv2.conv.weight": "model.3.cv2.0.m.0.cv2.conv.weight",
        "2.conv3.1.conv.weight": "model.3.cv3.1.conv.weight",
        "9.conv5.conv.weight": "model.10.cv5.conv.weight",
        "23.conv.bias": "model.23.conv.bias",
        "22.heads.1.anchor_conv.2.bias": "model.38.cv4.1.2.bias",
        "38.heads.2.class_conv.0.conv.weight": "model.38.cv3.2.0.conv.weight",
    }
    renamed, _ = official_keys({key: torch.zeros(1) for key in expected})
    assert set(expected.values()) <= renamed.keys()
    small, _ = official_keys({"3.conv.conv.weight": torch.zeros(1), "30.heads.0.class_conv.2.bias": torch.zeros(1)})
    assert {"model.3.cv1.conv.weight", "model.29.cv3.0.2.bias"} <= small.keys()


def wrapped(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key.removeprefix("model."): value for key, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: OrderedDict(s),
        lambda s: {"model": s},
        lambda s: {"state_dict": wrapped(s, "model.model."), "epoch": 3, "callbacks": {}},
        lambda s: {"state_dict": {**wrapped(s, "model.model."), **wrapped(s, "ema.module.")}},
        lambda s: {"model_state_dict": wrapped(s, "module.model.")},
        lambda s: {**wrapped(s, "module.model."), "n_averaged": torch.tensor(4)},
        lambda s: wrapped(s, "_orig_mod.model."),
        lambda s: wrapped(s, ""),
        lambda s: {"ema": {k: v.half() for k, v in s.items()}, "model": None, "optimizer": {"state": {}}},
        lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked") and "dfl" not in k},
    ],
)
def test_wrapped_state_dicts_are_unwrapped(wrap: Any, deployed: DetectionModel, tmp_path: Path) -> None:
    expected = deployed.state_dict()
    found, _ = read_state_dict(save(tmp_path / "x.ckpt", wrap(dict(expected))))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], v) for k, v in expected.items())


def test_the_averaged_copy_in_a_lightning_file_is_taken(deployed: DetectionModel, tmp_path: Path) -> None:
    state = dict(deployed.state_dict())
    worse = {k: v * 2 if v.is_floating_point() else v for k, v in state.items()}
    path = save(tmp_path / "x.ckpt", {"state_dict": {**wrapped(worse, "model.model."), **wrapped(state, "ema.model.")}})
    assert same_outputs(load_checkpoint(path), deployed)


def test_a_fused_state_dict_gives_a_fused_network(tmp_path: Path) -> None:
    name = "yolov9-t"
    source = fuse(small_model(name))
    np.savez(tmp_path / "x.npz", **{k: v.numpy() for k, v in source.state_dict().items()})
    model = load_checkpoint(tmp_path / "x.npz")
    assert model.is_fused
    assert model.graph_name == name
    assert same_outputs(model, source)


def test_foreign_safetensors_are_read(deployed: DetectionModel, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({k: v.clone() for k, v in deployed.state_dict().items()}, tmp_path / "x.safetensors")
    assert same_outputs(load_checkpoint(tmp_path / "x.safetensors"), deployed)


@pytest.mark.parametrize("name", list_models())
def test_every_network_is_recognised_from_keys_and_shapes(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name, 7)
    layout = identify(model.state_dict())
    found = (layout.graph_name, layout.num_classes, layout.box_groups, layout.fused)
    assert found == (name, 7, model.box_groups, False)


@pytest.mark.parametrize(("tower", "classes", "groups"), [(80, 80, 4), (128, 80, 1), (64, 1, 2), (96, 1000, 1)])
def test_classes_tower_and_groups_are_read_from_the_weights(tower: int, classes: int, groups: int) -> None:
    for name in ("yolov9-t", "gelan-t"):
        with torch.device("meta"):
            state = create_model(name, classes, class_tower=tower, box_groups=groups).state_dict()
        layout = identify(state)
        assert (layout.class_tower, layout.num_classes, layout.box_groups) == (tower, classes, groups)


def test_weights_of_something_else_name_their_first_key() -> None:
    with pytest.raises(CheckpointError, match=r"first key is fc\.weight, expected one such as model\.0\.conv\.weight"):
        identify({"fc.weight": torch.zeros(2)})


def test_the_file_name_says_nothing(deployed: DetectionModel, tmp_path: Path) -> None:
    assert read_checkpoint(save(tmp_path / "yolov9-c.pt", deployed.state_dict())).architecture.graph_name == "gelan-t"


def without(state: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if k != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "model.3.cv1.conv.weight"), r"model\.3\.cv1\.conv\.weight is missing"),
        (lambda s: s | {"model.22.cv9.weight": torch.zeros(2)}, r"model\.22\.cv9\.weight is unexpected"),
        (lambda s: s | {"head.weight": torch.zeros(2)}, r"head\.weight is unexpected"),
        (
            lambda s: s | {"model.5.cv1.bn.bias": torch.zeros(7)},
            r"model\.5\.cv1\.bn\.bias has shape \[7\], expected \[96\]",
        ),
        (lambda s: s | {"model.22.cv3.0.2.weight": torch.zeros(())}, r"model\.22\.cv3\.0\.2\.weight has shape \[\]"),
    ],
)
def test_what_fits_nothing_names_file_network_and_key(
    change: Any, message: str, deployed: DetectionModel, tmp_path: Path
) -> None:
    path = save(tmp_path / "odd.pt", change(dict(deployed.state_dict())))
    with pytest.raises(CheckpointError, match=rf"odd\.pt fits no known network; nearest is gelan-t.*{message}"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "content", [{}, [], None, 5, {"epoch": 3}, {"model": None}, {"state_dict": {}}, nn.Linear(1, 1)]
)
def test_a_file_without_detection_weights_is_an_error(content: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x\.pt"):
        load_checkpoint(save(tmp_path / "x.pt", content))


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt", ".pth", ".ckpt", ".xyz"])
@pytest.mark.parametrize("content", [b"", b"PK\x05\x06" + bytes(18), b"\xff" * 100])
def test_rubbish_under_any_suffix_is_an_error(suffix: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / f"x{suffix}").write_bytes(content)
    with pytest.raises(CheckpointError, match="x"):
        load_checkpoint(tmp_path / f"x{suffix}")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / f"missing{suffix}")


def test_a_pickled_array_in_an_npz_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.array([{"k": 1}], dtype=object))
    with pytest.raises(CheckpointError, match=r"x\.npz"):
        load_checkpoint(tmp_path / "x.npz")


class Loop(nn.Module):
    """A module that holds itself; torch.save writes it without complaint."""

    def __init__(self) -> None:
        super().__init__()
        self._modules["me"] = self


def test_modules_that_hold_themselves_end_in_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="without end"):
        load_checkpoint(save(tmp_path / "x.pt", {"model": Loop()}))


def test_metadata_that_doubles_itself_is_left_out(deployed: DetectionModel, tmp_path: Path) -> None:
    bomb: list[Any] = []
    for _ in range(60):
        bomb = [bomb, bomb]
    module = nn.Module()
    module.model = nn.ModuleList(deployed.model)
    module.names = bomb
    state, _ = read_state_dict(save(tmp_path / "x.pt", {"model": module}))
    assert state.keys() == deployed.state_dict().keys()


def test_converting_by_graph_equals_dropping_the_branch(training: DetectionModel) -> None:
    expected = to_deploy(training).state_dict()
    found = deployed_state(training)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], v) for k, v in expected.items())


def test_golden_keys_are_recognised(golden_folder: Path) -> None:
    for path in sorted((golden_folder / "models").glob("*.npz")):
        with np.load(path) as archive:
            keys, shapes = archive["state_keys"].tolist(), archive["state_shapes"].tolist()
        parsed = [tuple(json.loads(f"[{str(s).strip('()[] ,')}]")) for s in shapes]
        state = {k: torch.empty(s, device="meta") for k, s in zip(keys, parsed, strict=True)}
        layout = identify(state)
        assert (layout.graph_name, layout.num_classes, layout.box_groups) == (path.stem, 80, 4)


def test_real_fused_weights_load_strictly(shared: Path) -> None:
    model = load_checkpoint(shared / "data" / "weights" / "yolov9t_coco_fused.npz")
    assert (model.graph_name, model.num_classes, model.class_tower, model.box_groups) == ("gelan-t", 80, 80, 1)
    assert model.is_fused
