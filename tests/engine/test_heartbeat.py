"""Signs of life between processes: one that is silent is named, one that leaves is not."""

from __future__ import annotations

import threading

import pytest
import torch.distributed as dist

from yolov9_fast.engine.distributed import clear_endings
from yolov9_fast.engine.heartbeat import Heartbeat
from yolov9_fast.errors import DataError, ProcessError


class Listener:
    """Keeps the message of a heartbeat instead of ending the process."""

    def __init__(self) -> None:
        self.message: str | None = None
        self.heard = threading.Event()

    def __call__(self, message: str) -> None:
        self.message = message
        self.heard.set()


@pytest.fixture(autouse=True)
def one_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLOV9_FAST_MAX_SILENT_SECONDS", "1")


def test_the_first_living_process_names_a_silent_one() -> None:
    store, listeners = dist.HashStore(), [Listener() for _ in range(3)]  # type: ignore[attr-defined]
    store.set("name/1", "pid 77 on host")
    beats = [Heartbeat(rank, 3, store, give_up=listeners[rank]) for rank in (0, 2)]
    assert all(listeners[rank].heard.wait(10) for rank in (0, 2))
    assert listeners[0].message == (
        "process 1 (pid 77 on host) has been silent for 1 s: it is stopped, or its machine cannot be reached; "
        "continue the run with --resume"
    )
    assert listeners[2].message == ""
    for beat in beats:
        beat.stop()


def test_processes_that_live_or_have_left_are_not_silent() -> None:
    store, listener = dist.HashStore(), Listener()  # type: ignore[attr-defined]
    first, second, third = (Heartbeat(rank, 3, store, give_up=listener) for rank in range(3))
    third.stop()
    assert not listener.heard.wait(2)
    first.stop()
    second.stop()


def test_a_store_that_does_not_answer_names_its_process() -> None:
    class Stopped:
        def __getattr__(self, name: str) -> object:
            threading.Event().wait(20)
            raise RuntimeError

    listener = Listener()
    beat = Heartbeat(1, 2, Stopped(), store_host=0, give_up=listener)
    assert listener.heard.wait(10)
    assert (listener.message or "").startswith("process 0 has been silent for 1 s")
    beat._ended.set()


def test_a_lost_connection_is_one_line_with_advice() -> None:
    gloo = RuntimeError("[/a/third_party/gloo/gloo/pair.cc:553] Connection closed by peer [1.2.3.4]:5. Typically …")
    with pytest.raises(ProcessError) as caught, clear_endings("do this"):
        raise gloo
    assert str(caught.value) == (
        "another process has ended or cannot be reached (Connection closed by peer [1.2.3.4]:5); do this"
    )
    with pytest.raises(ProcessError, match=r"cannot be reached \(NCCL\); do this"), clear_endings("do this"):
        raise dist.DistBackendError("NCCL")
    with pytest.raises(RuntimeError, match="mine"), clear_endings("do this"):
        raise RuntimeError("mine")
    with pytest.raises(DataError, match=r"^bad; do this$"), clear_endings("do this"):
        raise DataError("bad")
    with pytest.raises(KeyboardInterrupt, match="do this"), clear_endings(), clear_endings(lambda: "do this"):
        raise KeyboardInterrupt
