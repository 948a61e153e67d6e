"""A backend that a GPU cannot run is found out by one launch, is passed over by "auto", and says why by name."""

from __future__ import annotations

import ast
import errno
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from tests import fake_cuda
from yolov9_fast.ops import _library, _operator, _probe, _supports

GPU = torch.device("cuda", 1)
NO_IMAGE = "CUDA error: no kernel image is available for execution on the device"


class Gpus:
    """What the tests say of the GPUs, and what was done with them."""

    def __init__(self) -> None:
        self.touched: set[int] = set()
        self.launches: list[str] = []
        self.capturing = self.forked = False


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpus]:
    """Two GPUs of capability 7.5 on which every launch gives the right result; nothing is known of them."""
    state = Gpus()

    @contextmanager
    def device(which: torch.device | int) -> Iterator[None]:
        state.touched.add(torch.device("cuda", which).index if isinstance(which, int) else which.index)
        yield

    def capability(which: torch.device | None = None) -> tuple[int, int]:
        state.touched.add(-1 if which is None else which.index)
        return 7, 5

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: state.forked)
    monkeypatch.setattr(_probe, "_known", {})
    monkeypatch.setattr(_probe, "_told", set())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for backend in _probe.LAUNCHES:
        launch(monkeypatch, state, backend, lambda: True)
    return state


def launch(monkeypatch: pytest.MonkeyPatch, state: Gpus, backend: str, result: Callable[[], bool]) -> None:
    def launched(device: torch.device) -> bool:
        state.launches.append(f"{backend} {device.index}")
        return result()

    monkeypatch.setitem(_probe.LAUNCHES, backend, launched)


def raising(error: Exception) -> Callable[[], bool]:
    def result() -> bool:
        raise error

    return result


def on_gpu(dtype: torch.dtype = torch.float32, index: int = 1) -> Any:
    """What `supports` reads of a tensor on a GPU."""
    return SimpleNamespace(device=torch.device("cuda", index), dtype=dtype)


def triton_error(name: str, *args: Any) -> Exception:
    errors = pytest.importorskip("triton.compiler.errors" if name == "CompilationError" else "triton.runtime.errors")
    error: Exception = getattr(errors, name)(*args)
    return error


FAILURES: list[tuple[str, str, Callable[[], Exception], str]] = [
    ("cuda", "no code for this GPU", lambda: RuntimeError(f"{NO_IMAGE}\nCUDA kernel errors might be asynchronous"), ""),
    (
        "cuda",
        "a driver older than the runtime",
        lambda: RuntimeError("box_iou: CUDA driver version is insufficient for CUDA runtime version"),
        "RuntimeError: box_iou: CUDA driver version is insufficient for CUDA runtime version: update the NVIDIA driver",
    ),
    (
        "triton",
        "no host compiler",
        lambda: RuntimeError("Failed to find C compiler. Please specify via CC environment variable or set ..."),
        "triton finds no C compiler for its launcher: install gcc or clang, or set CC",
    ),
    (
        "triton",
        "a host compiler that fails",
        lambda: subprocess.CalledProcessError(1, ["/usr/bin/gcc", "/tmp/main.c", "-O3"]),
        "gcc returned 1",
    ),
    (
        "triton",
        "a kernel that triton cannot compile",
        lambda: triton_error(
            "CompilationError", "def f():\n  tl.dot()", ast.parse("f()").body[0], "no tl.dot on this GPU"
        ),
        "CompilationError: no tl.dot on this GPU",
    ),
    (
        "triton",
        "a ptxas that fails",
        lambda: triton_error(
            "PTXASError",
            "`ptxas` failed with error code 1\n`ptxas` stderr:\nptxas fatal   : Unsupported .version 9.0\n",
        ),
        "PTXASError: PTXAS error: `ptxas` failed with error code 1 ptxas fatal   : Unsupported .version 9.0",
    ),
    (
        "triton",
        "no ptxas",
        lambda: FileNotFoundError(errno.ENOENT, "No such file or directory", "/opt/ptxas"),
        "FileNotFoundError: No such file or directory",
    ),
    (
        "triton",
        "no driver library",
        lambda: AssertionError("libcuda.so cannot found!\nPossible files are located at []."),
        "AssertionError: libcuda.so cannot found!",
    ),
    ("triton", "a triton that cannot be imported", lambda: ImportError("GLIBC_2.34 not found"), "ImportError: GLIBC"),
]


@pytest.mark.parametrize(("backend", "what", "error", "expected"), FAILURES, ids=[what for _, what, _, _ in FAILURES])
def test_a_launch_that_fails_is_a_reason(
    backend: str,
    what: str,
    error: Callable[[], Exception],
    expected: str,
    gpus: Gpus,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    launch(monkeypatch, gpus, backend, raising(error()))
    with caplog.at_level(logging.WARNING, "yolov9_fast"):
        for _ in range(3):
            reason = _probe.why_not(backend, GPU)
            assert reason is not None
            assert "\n" not in reason
            assert reason.startswith(expected)
    assert gpus.launches == [f"{backend} 1"], "one launch, then the reason is kept"
    assert [r.getMessage() for r in caplog.records] == [
        f"cuda:1: backend {backend} cannot run, 'auto' takes the next one: {reason}"
    ]
    assert gpus.touched == {1}


def test_code_for_other_gpus_only_names_the_architectures_and_the_way_out(
    gpus: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90"]
    monkeypatch.setattr(_library, "build_info", lambda: {"parts": {"cuda": {"flags": flags}}})
    launch(monkeypatch, gpus, "cuda", raising(RuntimeError(NO_IMAGE)))
    assert _probe.why_not("cuda", GPU) == (
        f"RuntimeError: {NO_IMAGE}: compiled for sm_80, sm_90, this GPU is sm_75; "
        "install again with YOLOV9_FAST_CUDA_ARCHS=7.5"
    )


def test_missing_headers_of_python_are_named(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_probe.sysconfig, "get_path", lambda name: "/nowhere")
    launch(monkeypatch, gpus, "triton", raising(subprocess.CalledProcessError(1, ["gcc", "main.c"])))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert _probe.why_not("triton", GPU) == f"gcc returned 1; Python.h is missing: install python{version}-dev"


def test_a_wrong_result_is_a_failure(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    launch(monkeypatch, gpus, "cuda", lambda: False)
    assert _probe.why_not("cuda", GPU) == "its result is wrong"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        MemoryError(),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        subprocess.CalledProcessError(-9, ["gcc"]),
    ],
    ids=lambda error: f"{type(error).__name__} {error}"[:40],
)
def test_what_passes_is_not_kept(error: Exception, gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    launch(monkeypatch, gpus, "triton", raising(error))
    before = _operator._backend.generation
    assert _probe.why_not("triton", GPU) is not None
    assert _operator._backend.generation != before, "blocks decide again"
    launch(monkeypatch, gpus, "triton", lambda: True)
    assert _probe.why_not("triton", GPU) is None
    assert len(gpus.launches) == 2


def test_nothing_is_launched_while_a_graph_is_captured(gpus: Gpus) -> None:
    gpus.capturing = True
    assert (
        _probe.why_not("triton", GPU) == "its first run must not be part of a CUDA graph: run once before the capture"
    )
    assert not gpus.launches
    gpus.capturing = False
    assert _probe.why_not("triton", GPU) is None
    gpus.capturing = True
    assert _probe.why_not("triton", GPU) is None, "known from before the capture"


def test_nothing_is_launched_in_a_forked_process(gpus: Gpus) -> None:
    gpus.forked = True
    assert _probe.why_not("triton", GPU) == "CUDA cannot be used in a forked process"
    assert not gpus.launches
    assert not gpus.touched
    gpus.forked = False
    assert _probe.why_not("triton", GPU) is None


def test_each_gpu_and_backend_is_tried_when_it_is_used(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    launch(monkeypatch, gpus, "cuda", lambda: False)
    for _ in range(2):
        assert _supports.not_for_triton("bn_silu", on_gpu()) is None
        assert _supports.not_for_compiled("cuda", on_gpu()) == "its result is wrong"
    assert gpus.launches == ["triton 1", "cuda 1"]
    assert gpus.touched == {1}
    assert _supports.not_for_triton("bn_silu", on_gpu(index=0)) is None
    assert gpus.launches == ["triton 1", "cuda 1", "triton 0"]
    assert _supports.not_for_compiled("cpu", torch.zeros(1)) is None
    assert _supports.not_for_triton("bn_silu", on_gpu(torch.float64)) == "it computes in float32, got float64"
    assert len(gpus.launches) == 3


def test_threads_share_one_launch(gpus: Gpus) -> None:
    start = threading.Barrier(8)
    found: list[str | None] = []

    def use() -> None:
        start.wait()
        found.append(_probe.why_not("triton", GPU))

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [None] * 8
    assert gpus.launches == ["triton 1"]


def test_modes_of_the_caller_do_not_reach_the_launch(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    def plain() -> bool:
        return not (
            _len_torch_dispatch_stack()
            or torch.is_autocast_enabled("cpu")
            or torch.is_inference_mode_enabled()
            or type(torch.zeros(1)) is not Tensor
        )

    launch(monkeypatch, gpus, "triton", plain)
    with FakeTensorMode(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert _probe.why_not("triton", GPU) is None


def test_the_compiler_runs_the_launch_and_traces_the_choice(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    launch(monkeypatch, gpus, "cuda", lambda: False)

    def add(x: Tensor) -> Tensor:
        triton, cuda = (_probe.why_not(backend, torch.device("cuda", x.ndim)) for backend in ("triton", "cuda"))
        return x + (1 if triton is None else 2) + (10 if cuda == "its result is wrong" else 20)

    torch._dynamo.reset()
    compiled = torch.compile(add, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)).item() == 11
    assert compiled(torch.zeros(1)).item() == 11
    assert gpus.launches == ["triton 1", "cuda 1"]


def test_the_launches_compare_with_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU: the C++ kernel in place of the CUDA one, Triton interpreted."""
    pytest.importorskip("triton")
    cpu = torch.device("cpu")
    assert _probe._launch_cuda(cpu)
    assert _probe._launch_triton(cpu)
    from yolov9_fast.kernels import bn_silu

    for value in (0.0, float("nan")):
        monkeypatch.setattr(bn_silu, "bn_silu_apply", lambda *args, value=value: args[6].fill_(value))
        assert not _probe._launch_triton(cpu)


def test_triton_on_a_gpu_is_not_interpreted(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for name in ("auto", "triton"):
        with _operator._backend.backend(name):
            assert _supports.not_for_triton("bn_silu", on_gpu()) == (
                "TRITON_INTERPRET=1 interprets its kernels, for tensors on the CPU: unset it"
            )
    assert not gpus.launches
    assert _supports.not_for_compiled("cuda", on_gpu()) is None


def test_torch_for_amd_gets_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for reason in (_operator._no_triton(), _library._load("cuda", {})):
        assert reason is not None
        assert "this torch is for AMD's (ROCm 6.4)" in reason
    code = (
        "import torch; torch.version.hip = '6.4'\n"
        "from yolov9_fast.ops._operator import operators\n"
        "for one in operators.values(): print(one.name, one.first(torch.device('cuda')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {line.split()[1] for line in done.stdout.splitlines()} == {"eager"}


SCRIPT = """
import json
from tests.fake_cuda.trace import traced
import torch
import yolov9_fast as yf
from yolov9_fast.ops import _probe

def fails(device):
    raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

def names(backend):
    with yf.backend(backend):
        images, boxes = torch.empty(2, 3, 64, 64, device="cuda"), torch.empty(2, 4, device="cuda")
        record.phase = backend
        record.launches.clear()
        model(images)
        yf.ops.box_iou(boxes, boxes)
        record.phase = ""
    return dict(record.launches[backend])

with traced() as record:
    model = yf.create_model("gelan-t", 2).train().to("cuda")
    fused = names("auto")
    _probe._known.clear()
    _probe.LAUNCHES.update(triton=fails, cuda=fails)
    found = {"fused": fused, "auto": names("auto"), "eager": names("eager")}
    try:
        names("triton")
    except yf.errors.UserError as error:
        found["triton"] = str(error)
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has a CUDA device of its own")
def test_a_network_runs_its_definition_where_nothing_can_be_launched() -> None:
    try:
        fake_cuda.library()
    except RuntimeError as error:
        pytest.skip(str(error))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT], cwd=fake_cuda.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert any(name.startswith("yolov9_fast::bn_silu") for name in found["fused"])
    assert found["auto"] == found["eager"]
    assert not any(name.startswith("yolov9_fast::") for name in found["auto"])
    assert found["triton"] == (
        "bn_silu: backend 'triton' is set and cannot run: "
        "RuntimeError: CUDA error: no kernel image is available for execution on the device"
    )
    assert done.stderr.count("cannot run, 'auto' takes the next one") == 2
