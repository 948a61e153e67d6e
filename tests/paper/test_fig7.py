"""Neck maps and their focus on objects, and the command that trains the pair of networks for Figure 7."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from yolov9_fast.cli.main import main
from yolov9_fast.data import Sample
from yolov9_fast.data.rendered import render_dataset
from yolov9_fast.engine.trainer import Trainer
from yolov9_fast.models import create_model
from yolov9_fast.paper.fig7 import over_seeds
from yolov9_fast.paper.neck_maps import focus, neck_maps


def sample(boxes: list[list[float]], *, padded: bool = False) -> Sample:
    """A canvas of 64 × 64 with boxes (cx, cy, w, h), normalised; padded: grey above and below the middle 32 rows."""
    targets = torch.tensor([[0.0, *box] for box in boxes]).reshape(-1, 5)
    shape, pad = ((32, 64), (0, 16)) if padded else ((64, 64), (0, 0))
    return Sample(torch.zeros(3, 64, 64, dtype=torch.uint8), targets, 0, shape, (1.0, 1.0), pad)


def test_a_map_that_is_high_inside_the_boxes_only_is_focused_and_its_opposite_as_well() -> None:
    values = np.zeros((8, 8))
    values[:2, :2] = 1.0
    found = focus(values, sample([[0.125, 0.125, 0.25, 0.25]]))
    assert found is not None
    assert found.area == pytest.approx(4 / 64)
    assert found.auc == 1.0
    # Deviations: 4 cells of 60/64, 60 cells of 4/64.
    assert found.inside == pytest.approx(4 * 60**2 / (4 * 60**2 + 60 * 4**2))
    opposite = focus(-values, sample([[0.125, 0.125, 0.25, 0.25]]))
    assert opposite is not None
    assert opposite.auc == 0.0
    assert opposite.inside == pytest.approx(found.inside)


def test_a_map_that_does_not_know_the_boxes_has_a_concentration_of_one() -> None:
    noise = np.random.default_rng(0).random((200, 200))
    found = focus(noise, sample([[0.5, 0.5, 0.5, 0.5]]))
    assert found is not None
    assert found.concentration == pytest.approx(1.0, abs=0.02)
    assert found.auc == pytest.approx(0.5, abs=0.02)
    flat = focus(np.ones((8, 8)), sample([[0.5, 0.5, 0.5, 0.5]]))
    assert flat is not None
    assert flat.concentration == 1.0
    assert flat.auc == 0.5


def test_the_letterbox_does_not_count_and_a_small_box_takes_its_cell() -> None:
    values = np.zeros((8, 8))
    values[0] = 100.0  # grey bar above the image
    values[3, 5] = 1.0
    found = focus(values, sample([[5.5 / 8 + 0.01, 3.5 / 8 + 0.01, 0.001, 0.001]], padded=True))
    assert found is not None
    assert found.area == 1 / 32
    assert found.auc == 1.0


def test_images_without_a_contrast_of_objects_and_background_give_no_number() -> None:
    assert focus(np.ones((8, 8)), sample([])) is None
    assert focus(np.ones((8, 8)), sample([[0.5, 0.5, 1.0, 1.0]])) is None


@pytest.mark.parametrize("name", ["gelan-t", "yolov9-t"])
def test_neck_maps_are_the_sums_of_what_the_main_head_reads(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name, 3).eval()
    images = torch.rand(1, 3, 64, 96)
    read: list[torch.Tensor] = []
    handle = model.head.register_forward_pre_hook(lambda _, inputs: read.extend(inputs[0][-3:]))
    maps = neck_maps(model, images)
    handle.remove()
    assert [tuple(m.shape) for m in maps] == [(1, 8, 12), (1, 4, 6), (1, 2, 3)]
    for values, each in zip(maps, read, strict=True):
        torch.testing.assert_close(values, each.double().sum(1))
    assert not any(m._forward_hooks for m in model.model), "the model is left as it was"


def test_spread_over_seeds() -> None:
    rows = [
        {"network": "gelan", "level": "P3", "concentration": c, "auc": 0.5, "separation": 0.0} for c in (1.0, 2.0, 6.0)
    ]
    (one,) = over_seeds(rows)
    assert one["seeds"] == 3
    assert one["concentration"] == {"mean": 3.0, "min": 1.0, "max": 6.0}


@pytest.mark.slow
def test_the_pair_is_trained_once_and_used_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = render_dataset(tmp_path / "data", train=4, val=2, size=64)
    project, out = tmp_path / "runs", tmp_path / "fig7.png"
    words = ["paper", "fig7", "--data", str(data), "--size", "t", "--imgsz", "64", "--batch", "2", "--workers", "0"]
    words += ["--device", "cpu", "--project", str(project), "--out", str(out)]
    assert main(words) == 0
    assert "GELAN + PGI" in capsys.readouterr().out
    assert out.read_bytes().startswith(b"\x89PNG")
    first = json.loads(out.with_suffix(".json").read_text())
    assert {(r["network"], r["level"]) for r in first["rows"]} == {
        (n, level) for n in ("untrained", "gelan", "yolov9") for level in ("P3", "P4", "P5")
    }
    assert len(first["rows"]) == 9
    assert all(0 <= r["auc"] <= 1 for r in first["rows"])
    with np.load(out.with_suffix(".npz")) as arrays:
        assert arrays["gelan_P3"].shape == (8, 8)
        assert arrays["image"].shape == (3, 64, 64)

    monkeypatch.setattr(Trainer, "run", lambda self: pytest.fail("trained again"))
    picture = next((data.parent / "images" / "val").iterdir())
    assert main([words[0], words[1], str(picture), *words[2:]]) == 0
    second = json.loads(out.with_suffix(".json").read_text())
    assert second["rows"] == first["rows"]
    assert second["image"] == picture.name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "nowhere.yaml"], "nowhere.yaml: data file does not exist"),
        (["--seeds", "0"], "--seeds: expected at least 1"),
        (["nowhere.jpg", "--data", "DATA"], "nowhere.jpg: image file is missing"),
    ],
)
def test_wrong_input_is_named_before_any_training(
    tmp_path: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Trainer, "run", lambda self: pytest.fail("trained"))
    data = render_dataset(tmp_path / "data", train=2, val=1, size=64)
    words = [str(data) if word == "DATA" else word for word in words]
    project = ["--project", str(tmp_path / "runs")]
    assert main(["paper", "fig7", "--imgsz", "64", "--size", "t", *project, *words]) == 2
    assert message in capsys.readouterr().err
