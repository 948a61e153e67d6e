"""Feature maps of random networks: what they are, that they repeat, and the command that draws them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from yolov9_fast.cli.main import main
from yolov9_fast.paper.maps import correlation, feature_map, multiple_correlation
from yolov9_fast.paper.pictures import as_input, open_picture
from yolov9_fast.paper.stacks import build_stack


def test_a_map_is_the_sum_over_the_channels_of_a_network_of_the_seed() -> None:
    picture = open_picture(None, 32)
    one = feature_map(picture, "elan", 8, width=8, seed=3)
    stack = build_stack("elan", 8, 8, seed=3, normalisation="initial")
    assert one.values.shape == picture.shape[:2]
    np.testing.assert_allclose(one.values, stack.features(as_input(picture))[0].double().sum(0).numpy())
    again, other = (feature_map(picture, "elan", 8, width=8, seed=seed) for seed in (3, 4))
    assert np.array_equal(one.values, again.values)
    assert not np.array_equal(one.values, other.values)


def test_the_stem_alone_is_nearly_the_picture_and_a_deep_plain_network_is_nothing_of_it() -> None:
    picture = open_picture(None, 48)
    shallow, deep = (feature_map(picture, "plainnet", depth, width=8) for depth in (0, 120))
    assert shallow.colour > 0.8
    assert shallow.alive == 1
    assert (deep.colour, deep.edges, deep.spread, deep.alive) == (0, 0, 0, 0)
    assert feature_map(picture, "plainnet", 120, width=8, double=True).spread > 0


def test_a_map_at_half_the_resolution_is_compared_with_the_picture_at_half_the_resolution() -> None:
    one = feature_map(open_picture(None, 48), "gelan", 5, width=8, stem_stride=2)
    assert one.values.shape[1] == 24
    assert one.colour > 0.5


def test_correlations_do_not_depend_on_scale_and_know_linear_combinations() -> None:
    rng = np.random.default_rng(0)
    colours = rng.random((20, 30, 3))
    mixed = colours @ np.array([1.0, -2.0, 0.5])
    assert multiple_correlation(1e-200 * mixed + 1, colours.reshape(-1, 3)) == 0, "lost in the rounding of 1"
    assert multiple_correlation(1e-200 * mixed, colours.reshape(-1, 3)) == pytest.approx(1.0)
    assert multiple_correlation(rng.random((20, 30)), colours.reshape(-1, 3)) < 0.2
    assert correlation(mixed, -1e-170 * mixed) == pytest.approx(-1.0)
    assert correlation(mixed, np.ones_like(mixed)) == 0


@pytest.mark.parametrize(("target", "count"), [("fig2", 4), ("fig6", 8)])
def test_the_commands_leave_picture_maps_and_numbers(tmp_path: Path, target: str, count: int) -> None:
    depths = [] if target == "fig2" else ["--depths", "5", "10"]
    words = ["--size", "32", "--width", "8", "--normalisation", "batch", *depths]
    assert main(["paper", target, *words, "--out", str(tmp_path / "figure.svg")]) == 0
    assert "<svg" in (tmp_path / "figure.svg").read_text()
    numbers = json.loads((tmp_path / "figure.json").read_text())
    assert numbers["normalisation"] == "batch"
    assert len(numbers["maps"]) == count
    with np.load(tmp_path / "figure.npz") as arrays:
        assert set(arrays) == {f"{m['architecture']}_{m['depth']}" for m in numbers["maps"]}
        assert all(list(a.shape) == numbers["size"] for a in arrays.values())


def test_a_users_picture_is_read_at_the_size_asked_for(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    cv2.imwrite(str(tmp_path / "mine.png"), torch.randint(0, 255, (60, 90, 3), dtype=torch.uint8).numpy())
    assert open_picture(tmp_path / "mine.png", 45).shape == (30, 45, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.png"], "nowhere.png: image file is missing"),
        (["."], ". is a folder; an image file is needed"),
        (["broken.png"], "image file cannot be decoded"),
        (["--size", "4"], "at least 8 pixels"),
        (["--width", "30"], "multiple of 4"),
        (["--depths", "-1"], "depth: expected at least 0"),
        (["--out", "map.bmp"], "--out must end in .png, .svg"),
    ],
)
def test_wrong_input_is_named(
    tmp_path: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.png").write_text("no picture")
    assert main(["paper", "fig6", *words]) == 2
    assert message in capsys.readouterr().err
