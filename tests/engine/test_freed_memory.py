"""`keeping_freed_memory`: blocks that are freed and allocated again cost no page faults."""

from __future__ import annotations

import resource
import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest
import torch

from yolov9_fast.engine import freed_memory
from yolov9_fast.engine.callbacks import BatchResult, Callback
from yolov9_fast.engine.config import TrainConfig
from yolov9_fast.engine.freed_memory import keeping_freed_memory
from yolov9_fast.engine.trainer import Trainer, train

CPU = torch.device("cpu")
SCRIPT = """
    import resource
    import torch
    from yolov9_fast.engine.freed_memory import keeping_freed_memory

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(4):
            maps = [torch.ones(10 << 20) for _ in range(3)]  # 40 MiB each
            del maps
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize() >> 20

    faults()
    outside = faults()
    with keeping_freed_memory(torch.device("cpu")) as kept:
        faults()
        inside, most = faults(), resident()
    print(kept, outside, inside, most, resident())
"""


def numbers() -> tuple[bool, int, int, int, int]:
    """Of a new process: whether memory was kept, page faults outside and inside, MiB resident inside and after."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(SCRIPT)], capture_output=True, text=True, check=True)
    kept, *others = done.stdout.split()
    outside, inside, most, after = map(int, others)
    return kept == "True", outside, inside, most, after


pytestmark = pytest.mark.skipif(freed_memory._mallopt() is None, reason="this C library is not glibc")


def test_freed_blocks_are_used_again_and_returned_at_the_end() -> None:
    kept, outside, inside, most, after = numbers()
    assert kept
    pages = (120 << 20) // resource.getpagesize()
    assert outside > 4 * pages * 0.9  # the 4 × 120 MiB were returned to the system and are zeros again
    assert inside < pages // 50
    assert most - after > 100


@pytest.mark.parametrize(
    "variables",
    [{"MALLOC_TRIM_THRESHOLD_": "1000000"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1000000"}],
)
def test_what_the_user_has_set_stays(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(freed_memory, "_mallopt", lambda: pytest.fail("mallopt"))
    with keeping_freed_memory(CPU) as kept:
        assert not kept


def test_nothing_is_set_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freed_memory, "_mallopt", lambda: pytest.fail("mallopt"))
    with keeping_freed_memory(torch.device("cuda", 0)) as kept:
        assert not kept


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with keeping_freed_memory(CPU) as kept:
        assert not kept


def test_the_trainer_keeps_freed_memory_while_it_runs(
    tiny_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []
    within: list[list[tuple[int, int]]] = []
    monkeypatch.setattr(freed_memory, "_chosen_by_user", lambda: False)
    monkeypatch.setattr(freed_memory, "_mallopt", lambda: lambda *call: calls.append(call))

    class Within(Callback):
        def on_batch_end(self, trainer: Trainer, batch: BatchResult) -> None:
            within.append(list(calls))

    train(tiny_config(epochs=1), callbacks=[Within()])
    trim, mapped = freed_memory._TRIM_THRESHOLD, freed_memory._MMAP_MAX
    assert within
    assert all(then == [(trim, -1), (mapped, 0)] for then in within)
    assert (mapped, 65536) in calls
    assert calls[-1] == (trim, 64 << 20)
