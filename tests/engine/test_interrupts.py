"""Ctrl-C during training: one that Python drops still ends the run."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import tqdm

from yolov9_fast.engine.callbacks import Callback, EpochResult
from yolov9_fast.engine.config import TrainConfig
from yolov9_fast.engine.interrupts import CommandSignals, InterruptMonitor, progress_bar
from yolov9_fast.engine.trainer import Trainer


@pytest.fixture(autouse=True)
def pythons_own_handler() -> Iterator[None]:
    """A shell's background process starts with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class InterruptedWhenDestroyed:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):  # The handler runs between two instructions of this method.
            pass


def drop_an_interrupt() -> None:
    """As `del` of an object whose destructor is interrupted: Python prints it and continues."""
    thing = InterruptedWhenDestroyed()
    del thing


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_dropped_interrupt_is_raised_at_the_next_check() -> None:
    with InterruptMonitor() as interrupt:
        interrupt.check()
        drop_an_interrupt()
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_raises_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), InterruptMonitor():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_handlers_and_other_threads_are_not_changed() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with InterruptMonitor():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    errors: list[BaseException] = []

    def enter() -> None:
        try:
            with InterruptMonitor():
                pass
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert not errors


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_training_ends_although_the_interrupt_was_dropped(tiny_config: Callable[..., TrainConfig]) -> None:
    class Interrupted(Callback):
        def on_epoch_end(self, trainer: Trainer, result: EpochResult) -> None:
            if result.epoch == 1:
                drop_an_interrupt()

    trainer = Trainer(tiny_config(epochs=4), callbacks=[Interrupted()])
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert trainer.state.epoch == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_of_a_command_raises_and_later_ones_do_not(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with CommandSignals(process_ends=False) as signals:
        assert signals.received is None
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        for _ in range(20):
            os.kill(os.getpid(), number)
        assert signals.received is number
    assert signal.getsignal(number) is before


def test_a_signal_that_the_process_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with CommandSignals(process_ends=True) as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received is None
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_after_the_last_command_the_signals_are_ignored() -> None:
    terminated = signal.getsignal(signal.SIGTERM)
    try:
        with CommandSignals(process_ends=True):
            pass
        assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, terminated)


def test_a_signal_that_python_dropped_is_raised_again(capsys: pytest.CaptureFixture[str]) -> None:
    with CommandSignals(process_ends=False) as signals:
        drop_an_interrupt()
        with pytest.raises(KeyboardInterrupt):
            time.sleep(10)
        assert signals.received is signal.SIGINT
    assert capsys.readouterr().err == ""


def test_signals_that_follow_a_dropped_one_are_ignored_until_it_is_raised_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start = threading.Timer.start

    def interrupted(timer: threading.Timer) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        start(timer)

    monkeypatch.setattr(threading.Timer, "start", interrupted)
    with CommandSignals(process_ends=False) as signals:
        drop_an_interrupt()
        with pytest.raises(KeyboardInterrupt):
            time.sleep(5)
        assert signals.received is signal.SIGINT
    assert capsys.readouterr().err == ""


def test_a_signal_while_a_progress_bar_is_made_comes_when_it_can_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    class Bar(tqdm.tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: object, **options: object) -> None:
            made.append("begun")
            os.kill(os.getpid(), signal.SIGINT)
            super().__init__(*args, **options)  # type: ignore[call-overload]
            made.append("made")

        def close(self) -> None:
            made.append("closed")
            super().close()

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    with pytest.raises(KeyboardInterrupt), progress_bar([1, 2], "title", shown=True):
        made.append("used")
    assert made[:3] == ["begun", "made", "closed"]
    assert "used" not in made


def test_a_progress_bar_is_closed_where_its_block_ends_early(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), progress_bar([1, 2], "title", shown=True) as bar:
        next(iter(bar))
        raise KeyboardInterrupt
    assert capsys.readouterr().err.endswith("\r")
