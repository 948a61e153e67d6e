"""`yolov9-fast bench`: one table, eager against fused, with speed, memory and equality; a wrong result is not timed."""

from __future__ import annotations

import pytest
import torch
from yolov9_fast.bench import first
from yolov9_fast.bench.cases import PhaseClock
from yolov9_fast.bench.networks import Inference, TrainingStep, inference_model

from yolov9_fast.cli.main import main
from yolov9_fast.ops import nms

CPU = torch.device("cpu")


@pytest.mark.slow
def test_one_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--model yolov9-t --imgsz 128 --batch 2 --seconds 0.1 --device cpu"
    assert main(["bench", *words.split()]) == 0
    text = capsys.readouterr().out
    rows = {line.strip().split("  ")[0]: line for line in text.splitlines()}
    for row in ("training step, ms", "backward", "images/s", "peak memory, MB", "inference with NMS, ms"):
        assert row in rows, text
    assert "gradients, error against float64" in text
    assert rows["equal within rounding"].split()[-3:] == ["yes", "yes", "yes"]
    assert "fused runs on" in text


@pytest.mark.slow
def test_a_fused_side_with_wrong_gradients_is_not_timed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = TrainingStep.results

    def wrong(self: TrainingStep) -> dict[str, torch.Tensor]:
        found = results(self)
        if self.backend_name == "auto":
            found["gradient"] = found["gradient"] * 1.5
        return found

    monkeypatch.setattr(TrainingStep, "results", wrong)
    assert main(["bench", "--imgsz", "128", "--batch", "2", "--seconds", "0.1", "--device", "cpu"]) == 1
    text = capsys.readouterr().out
    step = next(line for line in text.splitlines() if line.startswith("training step, ms"))
    assert step.endswith("no speed")
    assert "WRONG RESULT" in text


@pytest.mark.parametrize("words", [["--imgsz", "100"], ["--batch", "0"], ["--model", "yolov9-q"]])
def test_wrong_options_are_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--imgsz", "64", *words]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_step_leaves_weights_almost_where_they_are_and_measures_all_phases() -> None:
    step = TrainingStep("yolov9-t", 64, 1, CPU)
    before = [p.clone() for p in step.model.parameters()]
    clock = PhaseClock(CPU)
    step(clock)
    assert tuple(clock.seconds) == first.PHASES
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(before, step.model.parameters(), strict=True))


def test_inference_has_about_a_thousand_candidates() -> None:
    images, _ = first.fixed_batch(320, 8)
    prediction = Inference("yolov9-t", images, CPU, "float32", "nchw", "eager").predict(first.NoClock())
    candidates = (prediction[:, 4:] > 0.001).sum().item() / 8
    assert 900 <= candidates <= 1100
    assert bool((nms(prediction).count > 0).any())
    assert inference_model("yolov9-t").is_fused
