"""What docs/extending/backend.md says, done exactly so."""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import yolov9_fast as yf
from tests.extending.pages import code_blocks, write_files
from tests.ops.feature_maps import assert_as_exact_as_eager, feature_map
from yolov9_fast import ops
from yolov9_fast.info import environment_report
from yolov9_fast.ops._operator import operators

PAGE = "backend.md"


@pytest.fixture
def fused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The imported module of the page; its backend is removed at the end."""
    write_files(PAGE, tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = ops.list_backends(), {op: dict(operator.implementations) for op, operator in operators.items()}
    yield importlib.import_module("fused")
    ops.unregister_backend("fused")
    after = ops.list_backends(), {op: dict(operator.implementations) for op, operator in operators.items()}
    assert after == before
    assert yf.get_backend() == "auto"


def backend_of(op: str, *args: Any) -> str:
    """The backend that runs these arguments."""
    call = operators[op].select(*args)
    return next(name for name, one in operators[op].implementations.items() if one.call is call)


def test_the_second_block_registers_it_first(fused: Any, capsys: pytest.CaptureFixture[str]) -> None:
    exec(code_blocks(PAGE, "python")[1], {})
    printed = capsys.readouterr().out.strip()
    assert f"print(ops.list_backends())  # {printed}" in code_blocks(PAGE, "python")[1]


def test_results_and_gradients_are_as_exact_as_the_reference(fused: Any) -> None:
    fused.register("aot_eager")
    assert_as_exact_as_eager("fused", yf.ops.adown_pool, [feature_map(2, 6, 7, 8)])
    boxes = (50 * torch.rand(8, 4, generator=torch.Generator().manual_seed(0))).requires_grad_()
    assert_as_exact_as_eager("fused", lambda a: yf.ops.box_iou(a, a.detach()), [boxes])


def test_auto_prefers_it_and_takes_the_next_where_it_refuses(fused: Any) -> None:
    fused.register("eager")
    x = torch.randn(1, 4, 6, 6)
    assert backend_of("adown_pool", x, True) == "fused"
    assert backend_of("adown_pool", x.double(), True) in ("cpu", "eager")
    torch.testing.assert_close(yf.ops.adown_pool(x.double()), ops.reference("adown_pool")(x.double()))


def test_set_by_name_it_raises_with_its_reason(fused: Any) -> None:
    fused.register("eager")
    yf.set_backend("fused")
    with pytest.raises(ops.BackendUnavailable, match=r"adown_pool: backend 'fused' is set.*it takes float32 only"):
        yf.ops.adown_pool(torch.randn(1, 4, 6, 6).double())
    with pytest.raises(ops.BackendUnavailable, match=r"spp: backend 'fused' is set.*no such implementation"):
        yf.ops.spp(torch.randn(1, 4, 6, 6))


def test_on_a_machine_where_it_cannot_run(fused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda program: None)
    fused.register("eager")
    x = torch.randn(1, 4, 6, 6)
    assert backend_of("adown_pool", x, True) != "fused"
    with yf.backend("fused"), pytest.raises(ops.BackendUnavailable, match=r"torch\.compile needs a C\+\+ compiler"):
        yf.ops.adown_pool(x)
    assert "  fused   no   torch.compile needs a C++ compiler" in environment_report()


def test_the_command_lists_it_and_the_environment_sets_it(tmp_path: Path) -> None:
    write_files(PAGE, tmp_path)
    [block] = code_blocks(PAGE, "bash")
    command = [sys.executable, *shlex.split(block)[1:]]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**os.environ, "PYTHONPATH": path, "YOLOV9_FAST_BACKEND_BOX_IOU": "fused"}
    done = subprocess.run(
        command, cwd=Path.cwd(), env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    lines = done.stdout.splitlines()
    index = next(i for i, line in enumerate(lines) if line.strip().startswith("box_iou: "))
    assert lines[index].endswith("backend fused")
    assert any(line.split() == ["fused", "yes"] for line in lines[index : index + 6])


def test_built_in_backends_stay() -> None:
    with pytest.raises(ValueError, match="name: expected a registered backend, got 'cpu'"):
        ops.unregister_backend("cpu")
