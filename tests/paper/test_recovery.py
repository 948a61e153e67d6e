"""What can be read back from features: facts that hold by construction, and the command that measures the curve."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from yolov9_fast.cli.main import main
from yolov9_fast.errors import DataError, UserError
from yolov9_fast.paper import readout, recovery
from yolov9_fast.paper.pictures import crops
from yolov9_fast.paper.readout import Cell, Settings, blur_error, blurred, measure
from yolov9_fast.paper.stacks import ARCHITECTURES, NORMALISATIONS, build_stack

SMALL = Settings(seeds=1, width=28, crop=24, train=3, test=2)


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return crops([], 5, 24)


def test_the_picture_itself_is_recovered_exactly(pictures: torch.Tensor) -> None:
    found = readout.readout(pictures, pictures, 3, 1, 0.0)
    assert found.error < 1e-20
    assert found.detail_error < 1e-20


def test_any_invertible_mixture_of_the_colours_is_recovered_exactly(pictures: torch.Tensor) -> None:
    mixture = torch.tensor([[2.0, -1.0, 0.3], [0.1, 1.0, 1.0], [-5.0, 0.2, 0.4]])
    features = 1e-12 * torch.einsum("fc,nchw->nfhw", mixture.double(), pictures.double()) + 3
    assert readout.readout(features, pictures, 3, 1, 0.0).error < 1e-3, "scale and offset must not matter"


def test_a_shifted_picture_needs_a_neighbourhood(pictures: torch.Tensor) -> None:
    shifted = pictures.roll(1, 3)
    near, far = (readout.readout(shifted, pictures, 3, side, 1e-12).error for side in (3, 1))
    assert near < 1e-10 < 0.05 < far


def test_features_without_the_picture_recover_its_mean_and_no_more(pictures: torch.Tensor) -> None:
    constant = torch.ones(5, 4, 24, 24)
    assert readout.readout(constant, pictures, 3, 3, 1e-8).error == pytest.approx(1.0)
    noise = torch.randn(5, 4, 24, 24, generator=torch.Generator().manual_seed(0))
    assert 0.95 < readout.readout(noise, pictures, 3, 1, 1e-8).error < 1.1


def test_a_blur_loses_what_the_yardstick_says(pictures: torch.Tensor) -> None:
    """A readout of blurred pixels is at least as good as taking them for the pixels."""
    lost = [readout.readout(blurred(pictures, side), pictures, 3, 1, 0.0).error for side in (3, 9)]
    yardsticks = [blur_error(pictures, 3, side) for side in (3, 9)]
    assert 0 < lost[0] < lost[1] < 1
    assert all(a <= 1.1 * b for a, b in zip(lost, yardsticks, strict=True))
    assert blur_error(pictures, 3, 1) == 0


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_without_layers_every_architecture_keeps_all(pictures: torch.Tensor, normalisation: str) -> None:
    for architecture in ARCHITECTURES:
        for found in measure(Cell(architecture, 0, normalisation, 0), pictures, SMALL).values():
            assert found.error < 1e-5


def test_a_stack_of_identities_keeps_all_at_any_depth(pictures: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def identities(*arguments: Any, **options: Any) -> Any:
        stack = build(*arguments, **options)
        stack.blocks = torch.nn.Sequential(*(torch.nn.Identity() for _ in stack.blocks))
        return stack

    build = readout.build_stack
    monkeypatch.setattr(readout, "build_stack", identities)
    assert measure(Cell("plainnet", 40, "batch", 0), pictures, SMALL)[1].error < 1e-5


def test_a_plain_stack_loses_more_than_gelan_and_more_with_depth(pictures: torch.Tensor) -> None:
    def error(architecture: str, depth: int) -> float:
        return measure(Cell(architecture, depth, "initial", 0), pictures, SMALL)[3].error

    plain = [error("plainnet", depth) for depth in (0, 10, 100)]
    assert plain[0] < plain[1] < plain[2] == pytest.approx(1.0), "100 untrained layers shrink below float32"
    assert error("gelan", 10) < 0.1 * plain[1]


def test_float64_keeps_what_float32_rounds_to_zero(pictures: torch.Tensor) -> None:
    stack = build_stack("plainnet", 100, 28, normalisation="initial")
    assert not stack.features(pictures).any()
    assert bool((stack.double().features(pictures).std((0, 2, 3)) > 0).all())
    double = dataclasses.replace(SMALL, double=True)
    assert measure(Cell("plainnet", 100, "initial", 0), pictures, double)[3].error != pytest.approx(1.0)


def test_features_that_are_not_finite_are_refused(pictures: torch.Tensor) -> None:
    with pytest.raises(UserError, match="not finite"):
        readout.readout(torch.full((5, 4, 24, 24), float("nan")), pictures, 3, 1, 0.0)


def test_crops_depend_on_the_seed_and_the_files_alone(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    for name, level in (("a.png", 10), ("b.png", 250)):
        cv2.imwrite(str(tmp_path / name), torch.full((40, 60, 3), level, dtype=torch.uint8).numpy())
    taken = crops([tmp_path], 4, 24)
    assert taken.shape == (4, 3, 24, 24)
    assert [round(float(c.mean() * 255)) for c in taken] == [10, 250, 10, 250]
    assert torch.equal(crops([], 2, 24), crops([], 2, 24))
    assert not torch.equal(crops([], 2, 24), crops([], 2, 24, 1))
    with pytest.raises(DataError, match=r"is missing: .*nowhere.png"):
        crops([tmp_path / "nowhere.png"], 1, 24)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image in the folder"):
        crops([tmp_path / "empty"], 1, 24)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--crop", "8"], "at least 18 pixels"),
        (["--seeds", "0"], "seeds: expected at least 1"),
        (["--neighbourhoods", "2"], "expected odd sides"),
        (["--depths", "-3"], "depth: expected at least 0"),
        (["--out", "curve.txt"], "--out must end in .png"),
        (["nowhere.jpg"], "image file is missing"),
    ],
)
def test_wrong_options_are_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paper", "recovery", "--quick", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_command_measures_once_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["paper", "recovery", "--quick", "--normalisations", "initial", "--out", str(tmp_path / "r.png")]
    assert main([*command, "--depths", "0", "5"]) == 0
    printed = capsys.readouterr().out
    assert "GELAN" in printed
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    first = json.loads((tmp_path / "r.json").read_text())
    assert len(first["cells"]) == 10
    assert len(first["summary"]) == 20

    measured: list[Cell] = []
    original = readout.measure
    monkeypatch.setattr(readout, "measure", lambda cell, *rest: measured.append(cell) or original(cell, *rest))
    assert main([*command, "--depths", "0", "5", "6", "--architectures", "elan", "gelan"]) == 0
    assert {(cell.architecture, cell.depth) for cell in measured} == {("elan", 6), ("gelan", 6)}
    second = json.loads((tmp_path / "r.json").read_text())
    assert len(second["cells"]) == 12
    assert len(second["summary"]) == 12
    assert all(second["cells"][key] == value for key, value in first["cells"].items())

    assert main([*command, "--width", "32"]) == 2
    assert "holds an experiment with another width; choose another --out" in capsys.readouterr().err


def test_an_interrupted_measurement_keeps_what_it_has(
    tmp_path: Path, pictures: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(SMALL, architectures=("elan",), depths=(0, 3, 4), normalisations=("batch",))
    original = readout.measure

    def stop_at_the_last(cell: Cell, *rest: Any) -> Any:
        if cell.depth == 4:
            raise KeyboardInterrupt
        return original(cell, *rest)

    monkeypatch.setattr(readout, "measure", stop_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        recovery.measure_all(settings, pictures, tmp_path / "r.json")
    assert set(json.loads((tmp_path / "r.json").read_text())["cells"]) == {"elan/0/batch/0", "elan/3/batch/0"}
