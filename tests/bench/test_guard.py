"""The guard: this tree's counts are the file's, a planted copy is found, and only `--update` changes the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from yolov9_fast.bench import guard, instructions
from yolov9_fast.bench.counting import count, python_calls, saved_bytes

import yolov9_fast as yf
from yolov9_fast.cli.main import main
from yolov9_fast.models.model import DetectionModel
from yolov9_fast.nn import Conv

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def own_counts() -> dict[str, Any]:
    """This tree's counts."""
    return guard.counts()


def test_a_training_step_does_what_the_file_says(own_counts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "counts", lambda: own_counts)
    found = guard.check()
    if found is None:
        pytest.skip(f"no counts for {guard.environment_key()}; `{guard.UPDATE}` writes them")
    assert not found, "\n".join([*(one.text() for one in found), f"on purpose? then: {guard.UPDATE}"])


@pytest.fixture
def own_file(tmp_path: Path, own_counts: dict[str, Any]) -> Path:
    """A file with this tree's counts."""
    path = tmp_path / "counts.json"
    path.write_text(json.dumps({guard.environment_key(): own_counts}))
    return path


@pytest.mark.slow
def test_a_planted_copy_is_found_and_named(own_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = DetectionModel.raw

    def copying(self: DetectionModel, images: Tensor, **options: Any) -> Any:
        return raw(self, images.clone(), **options)

    monkeypatch.setattr(DetectionModel, "raw", copying)
    found = guard.check(own_file)
    assert found is not None
    texts = [one.text() for one in found]
    for side in guard.SIDES:
        assert any(text.startswith(f"{side} copies:") and text.endswith("(+1)") for text in texts), texts
        assert any(text.startswith(f"{side} aten::copy_:") and text.endswith("(+1)") for text in texts), texts
        assert any(text.startswith(f"{side} allocations:") for text in texts)


def test_other_environments_keep_their_entries(
    own_file: Path, own_counts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "counts", lambda: own_counts)
    monkeypatch.setattr(instructions, "count_all", lambda *_: "not counted here")
    content = json.loads(own_file.read_text())
    own_file.write_text(json.dumps(content | {"torch 1.0, compiled": {"eager": {"kernels": 1}}}))
    guard.update(own_file)
    assert json.loads(own_file.read_text())["torch 1.0, compiled"] == {"eager": {"kernels": 1}}
    monkeypatch.setattr(guard, "environment_key", lambda: "torch 99")
    assert guard.check(own_file) is None, "nothing is expected of a version that has no entry"


def test_kernels_copies_and_bytes_are_counted() -> None:
    x = torch.ones(1000)

    def work() -> Tensor:
        y = x + x  # one kernel, 4000 bytes
        return y.view(10, 100).t().contiguous()  # one copy, 4000 bytes; views are none

    work()
    found = count(work, CPU)
    assert (found.kernels, found.copies, found.allocations) == (2, 1, 2)
    assert found.allocated_bytes == found.peak_bytes == 8000
    assert found.by_kernel == {"aten::add": 1, "aten::copy_": 1}


def test_saved_bytes_are_those_of_activations_once() -> None:
    layer = nn.Linear(10, 10)
    x = torch.randn(5, 10)

    def forward() -> Tensor:
        y = torch.sigmoid(layer(x))  # its output is saved, and once more below
        return y * y

    assert saved_bytes(forward) == 5 * 10 * 4 * 2, "the input and sigmoid's output, not the weight"


def test_python_calls_are_those_of_the_package() -> None:
    conv = Conv(3, 4).eval()

    def own(calls: int) -> int:
        with yf.backend("eager"):
            return python_calls(lambda: [conv(torch.zeros(1, 3, 2, 2)) for _ in range(calls)])

    assert python_calls(lambda: nn.Linear(2, 2)(torch.zeros(1, 2))) == 0
    assert own(5) - own(1) == 4 * (own(2) - own(1)) > 0


def test_fewer_python_calls_are_no_finding() -> None:
    expected = {"fused": {"python_calls of yolov9-t": 100}}
    assert not guard.differences(expected, {"fused": {"python_calls of yolov9-t": 99}})
    (finding,) = guard.differences(expected, {"fused": {"python_calls of yolov9-t": 102}})
    assert finding.text() == "fused python_calls of yolov9-t: 102, expected 100 (+2)"


def test_instructions_are_the_same_every_time_and_more_work_is_seen(tmp_path: Path) -> None:
    found = instructions.count_all()
    if isinstance(found, str):
        pytest.skip(found)
    assert instructions.count_all() == found
    (tmp_path / "common").mkdir()
    for name in ("box_iou.h", "host_device.h"):
        text = (instructions.HEADERS / "common" / name).read_text()
        slow = text.replace("const float either =", "volatile float extra = a_area + b_area;\n  const float either =")
        (tmp_path / "common" / name).write_text(slow)
    slower = instructions.count_all(tmp_path)
    assert not isinstance(slower, str)
    assert slower[1]["box_iou"] > found[1]["box_iou"]


def test_the_command_fails_on_a_difference(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(guard, "check", lambda: guard.differences({"eager": {"copies": 1}}, {"eager": {"copies": 3}}))
    assert main(["bench", "guard"]) == 1
    assert "eager copies: 3, expected 1 (+2)" in capsys.readouterr().out
