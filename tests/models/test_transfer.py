"""Weights start networks that differ from the one they were trained in, and the report says what did not fit."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.models.foreign_files import image, mit_state_dict, small_model
from yolov9_fast.errors import CheckpointError
from yolov9_fast.models.checkpoint import load_checkpoint, suggest_architecture
from yolov9_fast.models.foreign import identify
from yolov9_fast.models.model import DetectionModel, create_model
from yolov9_fast.models.reparameterize import fuse, to_deploy
from yolov9_fast.models.transfer import TransferReport, key_map, load_pretrained, transfer_weights


def close(a: DetectionModel, b: DetectionModel, tolerance: float = 2e-3) -> bool:
    with torch.no_grad():
        return bool(torch.allclose(a.eval()(image()), b.eval()(image()), rtol=tolerance, atol=tolerance))


def heads(report: TransferReport) -> set[str]:
    return {key for key, _ in report.skipped}


def test_the_same_network_is_copied_whole() -> None:
    source, model = small_model("yolov9-t", 3), create_model("yolov9-t", 3)
    report = transfer_weights(model, source.state_dict())
    assert len(report.loaded) == 1772
    assert not report.skipped
    assert not report.missing
    assert close(model, source, 0)


@pytest.mark.slow
def test_a_deployed_network_starts_the_main_branch_of_its_training_graph() -> None:
    source, model = small_model("gelan-t", 3), create_model("yolov9-t", 3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = transfer_weights(model, source.state_dict())
    assert len(report.loaded) == len(source.state_dict())
    assert not report.skipped
    assert close(model, source, 0)
    assert report.missing
    assert all(torch.equal(model.state_dict()[k], before[k]) for k in report.missing)
    assert close(to_deploy(model), source, 0)


def published_key(size: str, key: str) -> str:
    """Key in yolov9-X for a key of gelan-X, from the published conversion."""
    _, index_text, rest = key.split(".", 2)
    index, head = int(index_text), 42 if size == "e" else 22
    if index == head:
        child, tail = rest.split(".", 1)
        return f"model.{ {'t': 29, 's': 29, 'm': 38, 'c': 38, 'e': 49}[size] }.{RENAMED[child]}.{tail}"
    return f"model.{index + {'m': 1, 'c': 1, 'e': 7 * (index >= 29)}.get(size, 0)}.{rest}"


RENAMED = {"cv2": "cv4", "cv3": "cv5", "dfl": "dfl2"}


@pytest.mark.parametrize("size", ["t", "s", *(pytest.param(size, marks=pytest.mark.slow) for size in "mce")])
def test_the_keys_of_deployed_and_training_graphs_correspond_as_published(size: str) -> None:
    with torch.device("meta"):
        deployed, training = create_model(f"gelan-{size}", 3), create_model(f"yolov9-{size}", 3)
    layouts = [identify(m.state_dict()) for m in (deployed, training)]
    expected = {key: published_key(size, key) for key in deployed.state_dict()}
    assert key_map(layouts[0], training) == expected
    assert key_map(layouts[1], deployed) == {new: old for old, new in expected.items()}


def test_a_training_graph_starts_its_deployed_network() -> None:
    source, model = small_model("yolov9-t", 3), create_model("gelan-t", 3)
    report = transfer_weights(model, source.state_dict())
    assert not report.missing
    assert {reason for _, reason in report.skipped} == {"the model has no such layer"}
    assert close(model, source, 0)


def test_other_class_counts_skip_only_the_last_class_convolutions() -> None:
    source, model = small_model("gelan-s", 5), create_model("yolov9-s", 2)
    bias = model.state_dict()["model.29.cv5.0.2.bias"].clone()
    report = transfer_weights(model, source.state_dict())
    assert heads(report) == {f"model.29.cv5.{level}.2.{kind}" for level in range(3) for kind in ("weight", "bias")}
    assert {reason for _, reason in report.skipped} == {"5 classes in the file, 2 in the model"}
    assert torch.equal(model.state_dict()["model.29.cv5.0.2.bias"], bias)
    assert "skipped 6 (5 classes in the file, 2 in the model): model.29.cv5.0.2.weight" in report.summary()


def test_another_class_tower_is_skipped_with_its_statistics() -> None:
    source = small_model("gelan-t", 5, class_tower=80)
    model = create_model("gelan-t", 5, class_tower=128)
    report = transfer_weights(model, source.state_dict())
    assert all(".cv3." in key for key in heads(report))
    # On each of 3 levels: two units of a weight and five statistics, and the last weight with its bias.
    assert len(report.skipped) == 3 * (6 + 6 + 2)
    assert "class tower 80 wide in the file, 128 in the model" in report.summary()


def test_a_grouped_box_tower_fits_a_dense_one_exactly() -> None:
    source, model = small_model("gelan-t", 3), create_model("gelan-t", 3, box_groups=1)
    report = transfer_weights(model, source.state_dict())
    assert not report.skipped
    assert close(model, source, 1e-4)


def test_a_dense_box_tower_does_not_fit_a_grouped_one_and_takes_its_batch_norm_along() -> None:
    report = transfer_weights(create_model("gelan-t", 3), small_model("gelan-t", 3, box_groups=1).state_dict())
    assert {reason for _, reason in report.skipped} == {"box tower with 1 groups in the file, 4 in the model"}
    assert "model.22.cv2.0.1.bn.running_var" in heads(report)
    assert "model.22.cv2.0.0.conv.weight" in report.loaded


@pytest.mark.parametrize("training", ["gelan-t", pytest.param("yolov9-t", marks=pytest.mark.slow)])
def test_fused_weights_are_unfused_for_training(training: str) -> None:
    source, model = fuse(small_model("gelan-t", 3)), create_model(training, 3)
    report = transfer_weights(model, source.state_dict())
    assert len(report.loaded) == 1339
    assert not report.skipped
    assert not model.is_fused
    assert close(model, source)


@pytest.mark.slow
def test_unfused_weights_are_fused_for_a_fused_network() -> None:
    source, model = small_model("gelan-t", 3), fuse(create_model("gelan-t", 3))
    transfer_weights(model, source.state_dict())
    assert model.is_fused
    assert close(model, source)


def test_foreign_spellings_are_understood() -> None:
    source, model = small_model("yolov9-t", 3), create_model("yolov9-t", 3)
    transfer_weights(model, mit_state_dict(source))
    assert close(model, source, 0)


def test_a_network_of_another_size_gives_what_fits_and_says_so() -> None:
    report = transfer_weights(create_model("gelan-s", 3), small_model("gelan-t", 3).state_dict())
    assert report.loaded
    assert "other shape in gelan-t than in gelan-s" in report.summary()


def test_weights_of_no_known_network_are_an_error() -> None:
    with pytest.raises(CheckpointError, match="fits no known network"):
        transfer_weights(create_model("gelan-t", 3), {"fc.weight": torch.zeros(2)})


@pytest.mark.slow
def test_load_pretrained_reads_a_file_and_logs_the_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = fuse(small_model("gelan-t", 3, class_tower=80, box_groups=1))
    path = tmp_path / "w.npz"
    np.savez(path, **{k: v.numpy() for k, v in source.state_dict().items()})
    layout = suggest_architecture(path)
    model = create_model("yolov9-t", 7, class_tower=layout.class_tower, box_groups=layout.box_groups)
    with caplog.at_level(logging.INFO):
        report = load_pretrained(model, path)
    assert len(report.skipped) == 6
    assert str(path) in caplog.text
    assert "layers 22, 25, 28-29" in caplog.text


@pytest.mark.slow
def test_real_fused_weights_start_a_training_graph(shared: Path) -> None:
    path = shared / "data" / "weights" / "yolov9t_coco_fused.npz"
    layout = suggest_architecture(path)
    model = create_model("yolov9-t", 80, class_tower=layout.class_tower, box_groups=layout.box_groups)
    assert len(load_pretrained(model, path).loaded) == 1339
    assert close(model, load_checkpoint(path))
