"""The chooser of operators' implementations: who runs, who may not, and what is said about it."""

from __future__ import annotations

import asyncio
import contextvars
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import yolov9_fast as yf
from yolov9_fast import ops
from yolov9_fast.errors import UserError
from yolov9_fast.ops import Operator
from yolov9_fast.ops import _backend as backends
from yolov9_fast.ops._operator import operators


@pytest.fixture
def operator() -> Iterator[Operator[Any]]:
    """An operator whose cpu implementation takes small numbers only and whose cuda implementation is not compiled."""
    example = ops.register_operator("example", "says which backend ran", lambda x: "eager")
    ops.register_implementation(
        "example", "cpu", lambda x: "cpu", supports=lambda x: "x is too large" if x > 9 else None
    )
    ops.register_implementation("example", "cuda", lambda x: "cuda", why_not=lambda: "no nvcc")
    saved = dict(backends.settings)
    backends.settings.clear()
    yield example
    ops.unregister_operator("example")
    backends.settings.clear()
    backends.settings.update(saved)


def run(operator: Operator[Any], x: int = 1) -> str:
    result: str = operator(x)
    return result


def test_auto_takes_the_fastest_available(operator: Operator[Any]) -> None:
    assert run(operator) == "cpu"


def test_auto_falls_to_the_next_when_the_arguments_do_not_fit(operator: Operator[Any]) -> None:
    assert run(operator, 10) == "eager"


def test_a_backend_set_by_name_runs_although_a_faster_one_exists(operator: Operator[Any]) -> None:
    yf.set_backend("eager")
    assert run(operator) == "eager"


@pytest.mark.parametrize(
    ("name", "x", "reason"),
    [("cuda", 1, "no nvcc"), ("cpu", 10, "x is too large"), ("triton", 1, "only eager, cpu, cuda")],
)
def test_a_backend_set_by_name_that_cannot_run_raises_with_the_reason(
    operator: Operator[Any], name: str, x: int, reason: str
) -> None:
    with yf.backend(name), pytest.raises(RuntimeError, match=f"example.*{name}.*{reason}") as caught:
        run(operator, x)
    assert isinstance(caught.value, UserError)


def test_a_setting_for_one_operator_wins_over_the_one_for_all(operator: Operator[Any]) -> None:
    yf.set_backend("cuda")
    yf.set_backend("eager", "example")
    assert run(operator) == "eager"
    assert (yf.get_backend(), yf.get_backend("example"), yf.get_backend("box_iou")) == ("cuda", "eager", "cuda")


def test_none_takes_a_setting_back(operator: Operator[Any]) -> None:
    yf.set_backend("eager", "example")
    yf.set_backend(None, "example")
    assert (run(operator), yf.get_backend("example")) == ("cpu", "auto")


def test_the_with_block_ends_also_after_an_error(operator: Operator[Any]) -> None:
    yf.set_backend("cpu", "example")
    with pytest.raises(KeyError), yf.backend("eager", "example"):
        assert run(operator) == "eager"
        raise KeyError
    assert yf.get_backend("example") == "cpu"


def test_with_blocks_nest(operator: Operator[Any]) -> None:
    with yf.backend("eager"), yf.backend("cpu"):
        assert run(operator) == "cpu"
    assert yf.get_backend() == "auto"


def test_set_backend_in_a_block_holds_until_its_end(operator: Operator[Any]) -> None:
    with yf.backend("eager"):
        yf.set_backend("cpu")
        assert run(operator) == "cpu"
        yf.set_backend(None)
        assert yf.get_backend() == "auto"
        yf.set_backend("eager", "example")
    assert yf.get_backend("example") == yf.get_backend() == "auto"


def interleaved(operator: Operator[Any], first: Any, second: Any) -> list[str]:
    """Two threads that enter a block each, in turns: what the operator runs inside both, and after both."""
    steps, results = [threading.Event() for _ in range(3)], []

    def outer() -> None:
        with first:
            steps[0].set()
            steps[1].wait(10)
            results.append(run(operator))
        steps[2].set()

    def inner() -> None:
        steps[0].wait(10)
        with second:
            steps[1].set()
            steps[2].wait(10)
            results.append(run(operator))

    threads = [threading.Thread(target=target) for target in (outer, inner)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return [*results, run(operator)]


def test_a_block_holds_for_its_thread_only(operator: Operator[Any]) -> None:
    assert interleaved(operator, yf.backend("eager"), yf.backend("cpu")) == ["eager", "cpu", "cpu"]
    assert interleaved(operator, yf.backend("eager", "example"), yf.backend("auto")) == ["eager", "cpu", "cpu"]
    assert yf.get_backend() == yf.get_backend("example") == "auto"


def test_an_implementation_of_a_block_holds_for_its_thread_only(operator: Operator[Any]) -> None:
    def block(name: str) -> Any:
        return ops.implementation("example", "cpu", lambda x: name)

    before = dict(operator.implementations)
    assert interleaved(operator, block("first"), block("second")) == ["first", "second", "cpu"]
    assert operator.implementations == before


def test_a_block_may_add_an_implementation_and_set_a_backend(operator: Operator[Any]) -> None:
    with ops.implementation("example", "triton", lambda x: "triton"), yf.backend("triton"):
        assert run(operator) == "triton"
        with ops.implementation("example", "eager", lambda x: "other"), yf.backend("eager"):
            assert (run(operator), ops.reference("example")(1)) == ("other", "other")
    assert run(operator) == "cpu"
    assert operator.why_not("triton") is not None


def test_a_block_holds_for_its_asyncio_task_only(operator: Operator[Any]) -> None:
    async def task(name: str, others: int) -> list[str]:
        with yf.backend(name):
            found = []
            for _ in range(others):
                await asyncio.sleep(0)
                found.append(run(operator))
        return [*found, run(operator)]

    async def both() -> list[list[str]]:
        return await asyncio.gather(task("eager", 2), task("cpu", 4))

    assert asyncio.run(both()) == [["eager"] * 2 + ["cpu"], ["cpu"] * 5]


def test_a_new_thread_takes_the_settings_of_the_process(operator: Operator[Any]) -> None:
    with yf.backend("eager"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(run, operator).result() == "cpu"
        assert pool.submit(contextvars.copy_context().run, run, operator).result() == "eager"
    yf.set_backend("eager")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run, operator).result() == "eager"


def test_blocks_in_one_thread_do_not_change_what_layers_run_in_another() -> None:
    conv = yf.nn.Conv(4, 4, 3).train()
    x = torch.rand(2, 4, 8, 8)

    def saved(name: str, rounds: int) -> set[int]:
        """How many tensors autograd saves: the eager form and the compiled one differ."""
        kept: list[torch.Tensor] = []
        counts = set()
        for _ in range(rounds):
            with (
                yf.backend(name),
                torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
            ):
                conv(x)
            counts.add(len(kept))
            kept.clear()
        return counts

    alone = saved("eager", 1), saved("auto", 1)
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(saved, ["eager", "auto"], [100, 100]))
    assert tuple(together) == alone


def test_unknown_names_are_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"backend: expected one of auto, cpu, triton, cuda, eager\b.*, got 'gpu'"):
        yf.set_backend("gpu")
    with pytest.raises(ValueError, match=r"op: expected one of .*box_iou.*, got 'nnms'"):
        yf.get_backend("nnms")
    with pytest.raises(ValueError, match="op: expected one of"), yf.backend("eager", "nnms"):
        pass


def test_an_operator_name_is_used_once(operator: Operator[Any]) -> None:
    with pytest.raises(ValueError, match="name: expected a new operator, got 'example'"):
        ops.register_operator("example", "", len)


def in_new_python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **variables}, timeout=120
    )


def test_the_environment_sets_where_settings_begin() -> None:
    code = "import yolov9_fast as yf; print(yf.get_backend(), yf.get_backend('box_iou'))"
    done = in_new_python(code, YOLOV9_FAST_BACKEND="eager", YOLOV9_FAST_BACKEND_BOX_IOU="cpu")
    assert done.stdout.split() == ["eager", "cpu"], done.stderr


def test_a_wrong_environment_variable_is_named() -> None:
    code = "import torch, yolov9_fast as yf; b = torch.zeros(1, 4); yf.ops.box_iou(b, b)"
    done = in_new_python(code, YOLOV9_FAST_BACKEND_BOX_IOU="fast")
    assert done.returncode != 0
    assert "YOLOV9_FAST_BACKEND_BOX_IOU" in done.stderr
    assert "expected one of auto, cpu, triton, cuda, eager, got 'fast'" in done.stderr


def test_without_compiled_files_everything_runs_eagerly_and_says_so() -> None:
    code = (
        "import torch, yolov9_fast as yf\n"
        "from yolov9_fast.info import environment_report\n"
        "b = torch.tensor([[0., 0., 2., 2.]])\n"
        "print(float(yf.ops.box_iou(b, b)), float(torch.ops.yolov9_fast.box_iou(b, b)))\n"
        "print(environment_report())\n"
        "yf.set_backend('cpu'); yf.ops.box_iou(b, b)"
    )
    done = in_new_python(code, YOLOV9_FAST_SKIP_LOADING="1")
    assert done.stdout.startswith("1.0 1.0\n"), done.stderr
    assert "cpu  no   YOLOV9_FAST_SKIP_LOADING is set" in done.stdout
    assert "BackendUnavailable: box_iou: backend 'cpu' is set and cannot run: YOLOV9_FAST_SKIP" in done.stderr


def test_a_choice_is_seen_by_compiled_code() -> None:
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    compiled = torch.compile(yf.ops.box_iou, fullgraph=True, backend="eager")
    with yf.backend("eager"):
        assert compiled(boxes, boxes).item() == 1
    with yf.backend("auto"):
        assert compiled(boxes, boxes).item() == 1
    with yf.backend("triton"), pytest.raises(Exception, match="only eager, cpu, cuda"):
        compiled(boxes, boxes)


def test_compiled_code_sees_the_block_of_its_thread() -> None:
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    compiled = torch.compile(yf.ops.box_iou, fullgraph=True, backend="eager")
    with ops.implementation("box_iou", "eager", lambda a, b: a[:, :1] * 0 + 7):
        with yf.backend("eager"), ThreadPoolExecutor(1) as pool:
            assert compiled(boxes, boxes).item() == 7
            assert pool.submit(compiled, boxes, boxes).result().item() == 1
        assert compiled(boxes, boxes).item() == 1
    with yf.backend("eager"):
        assert compiled(boxes, boxes).item() == 1


def test_a_block_inside_compiled_code() -> None:
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0]])

    def both(boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with yf.backend("eager"):
            first = yf.ops.box_iou(boxes, boxes)
        return first, yf.ops.box_iou(boxes, boxes)

    graphs: list[list[str]] = []

    def look(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes if "box_iou" in str(node.target)])
        return graph

    first, second = torch.compile(both, fullgraph=True, backend=look)(boxes)
    assert (first.item(), second.item()) == (1, 1)
    compiled = operators["box_iou"].why_not("cpu") is None
    assert graphs == [["yolov9_fast.box_iou.default"] if compiled else []]
    assert yf.get_backend() == "auto"
