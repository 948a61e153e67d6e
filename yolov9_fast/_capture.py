"""Programs that do the same each time, recorded as CUDA graphs: one launch then repeats all that a program launches.

A program reads and writes tensors whose memory stays where it is, and nothing else: no numbers of Python that change,
no results that the host reads, no files. `Capture` calls each program plainly a few times, records it, and replays the
recording from then on; where nothing can be recorded, programs are called plainly for good.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from yolov9_fast._collection import collection_paused
from yolov9_fast._text import printable
from yolov9_fast.errors import UserError

log = logging.getLogger(__name__)
MODES = ("auto", "off")
WARM_UP = 3
"""Plain calls before a recording: libraries choose their algorithms, kernels are compiled, optimisers make state."""
Recorder = Callable[[Callable[[], Any]], tuple[Callable[[], object], Any]]
"""Records what a call of a program would do, without doing it: a function that does it, and the program's results,
which are tensors that each replay fills again."""
as_recorded: ContextVar[bool] = ContextVar("yolov9_fast_as_recorded", default=False)
"""Whether what runs is recorded, or is a warm-up that has to choose what a recording chooses."""
_T = TypeVar("_T")


def check_mode(mode: str) -> str:
    """`mode`; raises `UserError` where it is not one of `MODES`."""
    if mode not in MODES:
        raise UserError(f"capture: expected {' or '.join(MODES)}, got {printable(repr(mode), 100)}")
    return mode


class CudaGraphs:
    """A `Recorder` for one GPU: its CUDA graphs share one memory pool and were recorded on one stream.

    What several graphs keep in the pool are their results; everything else of one may be overwritten by a replay of
    another. Replays must not overlap.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def __call__(self, program: Callable[[], _T]) -> tuple[Callable[[], object], _T]:
        """Record `program`; raises what it raises, or what CUDA says of something that a graph cannot hold."""
        pool = self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Another thread, as of a loader that pins memory, may go on: only what this one does is forbidden.
        recording = torch.cuda.graph(graph, pool=pool, stream=self.side_stream(), capture_error_mode="thread_local")
        failure: BaseException | None = None
        # torch's block leaves its stream current where the end of the capture fails; the outer one does not.
        with torch.cuda.stream(self.side_stream()), collection_paused():
            try:
                with recording:
                    try:
                        results = program()
                    except BaseException as error:
                        failure = error
                        raise
            except BaseException as error:
                self._abandon(graph, pool)
                if failure is None or failure is error:
                    raise
                raise failure from None  # because of which the end failed too
        return graph.replay, results

    def side_stream(self) -> torch.cuda.Stream:
        """The stream of warm-ups and recordings, which is none that others use."""
        if self.stream is None:
            self.stream = torch.cuda.Stream(self.device)
        return self.stream

    def _abandon(self, graph: torch.cuda.CUDAGraph, pool: Any) -> None:
        """Have the allocator forget a recording that failed; its end does so, unless that failed too."""
        self._pool = None
        try:
            graph.pool()
        except RuntimeError:  # it has not ended
            index = torch.cuda.current_device() if self.device.index is None else self.device.index
            for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
                with contextlib.suppress(RuntimeError, AttributeError):  # it was done, or torch has other names
                    getattr(torch._C, name)(index, pool)
            _abandoned.append(graph)  # if not, the allocator still asks the graph which streams it records
        graph.reset()


_abandoned: list[Any] = []


@dataclass(frozen=True)
class _Recording(Generic[_T]):
    replay: Callable[[], object]
    results: _T


class Capture:
    """Runs programs by key: plainly at first, then recorded and replayed.

    Use one thread and, at a time, one stream: calls from another thread than the first are plain calls.

    Args:
        name: of what is captured, for the log.
        device: of the programs' tensors. On a CPU every call is a plain call, unless `record` is given.
        mode: "auto", or "off" for plain calls alone.
        most: recordings at a time; programs of further keys are called plainly.
        warmup: plain calls of a key before its program is recorded, at least 1.
        record: makes the recordings; by default CUDA graphs.

    Raises `UserError` for another mode, `ValueError` for numbers below 1.
    """

    def __init__(
        self,
        name: str,
        device: torch.device,
        *,
        mode: str = "auto",
        most: int = 8,
        warmup: int = WARM_UP,
        record: Recorder | None = None,
    ) -> None:
        if most < 1 or warmup < 1:
            raise ValueError(f"most, warmup: expected at least 1, got {most}, {warmup}")
        self.name, self.device, self.most, self.warmup = name, device, most, warmup
        self._never: str | None = None
        self._failure: str | None = None
        if check_mode(mode) == "off":
            self._never = "it is switched off"
        elif record is None and device.type != "cuda":
            self._never = f"a {device.type.upper()} has no CUDA graphs"
        self._record = record or CudaGraphs(device)
        self._recordings: dict[Hashable, _Recording[Any]] = {}
        self._calls: dict[Hashable, int] = {}
        self._thread: int | None = None
        self._last_stream: Any = None

    @property
    def reason(self) -> str | None:
        """Why nothing is recorded, or nothing more; None while something may be."""
        return self._never or self._failure

    @property
    def recorded(self) -> tuple[Hashable, ...]:
        """The keys whose programs are replayed."""
        return tuple(self._recordings)

    def reset(self) -> None:
        """Forget all recordings and warm-ups: call it where programs or the tensors that they use were replaced.

        Results of recordings must not be read afterwards. What could not be recorded is tried again.
        """
        self._recordings.clear()
        self._calls.clear()
        self._failure = None
        if isinstance(self._record, CudaGraphs):
            self._record = CudaGraphs(self.device)

    def forget(self, key: Hashable) -> None:
        """`reset` for one key."""
        self._recordings.pop(key, None)
        self._calls.pop(key, None)

    def fixed(self, key: Hashable) -> bool:
        """Whether the next `run` of this key is recorded or replayed: what it reads must lie in memory that stays."""
        if key in self._recordings:
            return self._may_replay()
        return self._may_record() and self._calls.get(key, 0) >= self.warmup

    def run(self, key: Hashable, program: Callable[[], _T]) -> _T:
        """What `program()` does and gives.

        Args:
            key: of what the program does. A recording is replayed for every later program of its key, whatever it is.
            program: see the module; it must not depend on the caller's autocast, but may enter its own.

        Returns:
            The results of the call. Those of a recording are the same tensors each time, valid until the next `run`.
            An error of a plain call is raised; one of a recording is logged, and the program called plainly.
        """
        recording: _Recording[_T] | None = self._recordings.get(key)
        if recording is not None and self._may_replay():
            return self._replay(recording)
        if recording is not None or not self._may_record():
            return program()
        calls = self._calls.get(key, 0)
        if calls < self.warmup:
            self._calls[key] = calls + 1
            return self._warm_up(program)
        try:
            with chosen_as_recorded(self.device.type):
                recording = _Recording(*self._record(program))
        except Exception as error:  # whatever the program, torch or the driver raises
            self._failed(error)
            return program()
        self._recordings[key] = recording
        self._calls.pop(key, None)
        if len(self._recordings) == self.most:
            log.debug("%s: %d programs are captured, no more will be", self.name, self.most)
        return self._replay(recording)

    def _may_record(self) -> bool:
        return self.reason is None and len(self._recordings) < self.most and self._may_replay()

    def _may_replay(self) -> bool:
        """Not inside another recording or its warm-up, which records what this program does, nor in another thread."""
        if as_recorded.get() or (self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return False
        own = threading.get_ident()
        if self._thread is None:
            self._thread = own
        return self._thread == own

    def _warm_up(self, program: Callable[[], _T]) -> _T:
        with chosen_as_recorded(self.device.type):
            if not isinstance(self._record, CudaGraphs):
                return program()
            # As torch's notes on CUDA graphs say: on a side stream, ordered after and before the current one.
            current, side = torch.cuda.current_stream(self.device), self._record.side_stream()
            side.wait_stream(current)
            try:
                with torch.cuda.stream(side):
                    return program()
            finally:
                current.wait_stream(side)

    def _replay(self, recording: _Recording[_T]) -> _T:
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device)
            if self._last_stream is not None and self._last_stream != stream:
                stream.wait_stream(self._last_stream)  # results are in the memory that the next replay overwrites
            self._last_stream = stream
        recording.replay()
        return recording.results

    def _failed(self, error: BaseException) -> None:
        self._failure = reason_of(error)
        log.warning("%s: not captured as a CUDA graph: %s; it goes on without", self.name, self._failure)


def reason_of(error: BaseException) -> str:
    """In a line why a recording failed."""
    line = (str(error).strip().splitlines() or [""])[0]
    return printable(f"{type(error).__name__}: {line}" if line else type(error).__name__, 300)


@contextlib.contextmanager
def chosen_as_recorded(device_type: str) -> Iterator[None]:
    """Blocks choose what a recording shall hold, and autocast keeps no converted weights: a graph converts its own."""
    token = as_recorded.set(True)
    cache = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cache)
        as_recorded.reset(token)


_DICTS = itemgetter("_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TENSORS = itemgetter("_parameters", "_buffers")
_TRAINING = itemgetter("training")
_LEARNS = attrgetter("requires_grad")


class Unchanged:
    """What a recording of a module relies on: its submodules, modes, hooks, and where its tensors lie.

    Values of parameters and buffers may change in place. All is compared by C code.
    """

    def __init__(self, module: nn.Module) -> None:
        self._modules = [*module.modules()]
        self._own = [*map(vars, self._modules)]
        self._types = [*map(type, self._modules)]
        self._modes = [*map(_TRAINING, self._own)]
        self._forwards = [own.get("forward") for own in self._own]
        self._held = [*map(dict, chain.from_iterable(map(_DICTS, self._own)))]
        self._tensors = self._find()
        self._found = [tensor for tensor in self._tensors if tensor is not None]
        self._places = self._where()

    def holds(self) -> bool:
        """Whether all of it is as it was."""
        return (
            [*map(_TRAINING, self._own)] == self._modes
            and [*chain.from_iterable(map(_DICTS, self._own))] == self._held
            and [*map(id, self._find())] == [*map(id, self._tensors)]
            and self._where() == self._places
            and [*map(type, self._modules)] == self._types
            and [own.get("forward") for own in self._own] == self._forwards
        )

    def _find(self) -> list[Tensor | None]:
        return [*chain.from_iterable(map(dict.values, chain.from_iterable(map(_TENSORS, self._own))))]

    def _where(self) -> list[Any]:
        return [*map(Tensor.data_ptr, self._found), *map(_LEARNS, self._found)]
