"""What tests of today assert, asserted of the earlier commit through the functions that it has.

`python -m tests.earlier` runs each in a process of its own. One that finds the fault ends with an `AssertionError`.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.earlier import ROOT, TREE, environment, part, stand_ins

COUNTS = json.loads((ROOT / "bench" / "counts.json").read_text())
LAUNCHES = COUNTS["launches on a GPU, torch 2.13"]


def expect(found: Any, expected: Any, what: str) -> None:
    if found != expected:
        raise AssertionError(f"{what}: {found}, expected {expected}")


def traced(case: str) -> dict[str, Any]:
    from tests.earlier import trace

    return trace.trace(case)


# ---- traced


def gradient_of_tap() -> None:
    expect(traced("yolov9-t step bf16")["layouts"], {}, "operators with a map that is not channels_last")


def folded_units() -> None:
    case = "yolov9-s predict bf16"
    expect(traced(case)["launches"], LAUNCHES[case], f"launches, {case}")


def launches_of_a_step() -> None:
    found = traced("yolov9-t step bf16")["launches"]
    expect(found, LAUNCHES["yolov9-t step bf16"], "launches, yolov9-t step bf16")


def waits_of_validation() -> None:
    waits = traced("yolov9-t validate bf16")["waits"]
    expect(sum(waits.values()), 1, f"waits of a batch, in {waits}")


def seconds_of_phases() -> None:
    from tests.earlier import trace  # before torch

    cuda: Any = sys.modules["torch"].cuda
    events: list[Any] = []
    case = SimpleNamespace(network="gelan-t", amp="bf16", batch=2, size=64, classes=3)
    with trace.traced() as record:
        made = cuda.Event
        cuda.Event = lambda *args, **options: events.append(1) or made()
        trace.trace_step(case, record)
    if not events:
        raise AssertionError("events of the device that the trainer records in an epoch on a GPU: 0")


# ---- several processes, and the trainer


def _calls() -> Any:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Calls(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.counts: Counter[str] = Counter()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.counts[func.name().split(".")[0]] += not func.is_view or "lift" in func.name()
            return func(*args, **(kwargs or {}))

    return Calls()


def synchronised_unit() -> None:
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    vectors = torch.rand(4, 4).unbind()
    with _calls() as forward:
        part("ops.bn_silu").bn_silu(x, *vectors, training=True, momentum=0.03, eps=1e-3, group=dist.group.WORLD)
    copied = {name: n for name, n in forward.counts.items() if n and ("lift" in name or "_to_copy" in name)}
    total = sum(forward.counts.values())
    if copied or total > 10:
        raise AssertionError(
            f"a unit's forward: {total} operators, expected 10 at most; copies {copied}, expected none"
        )


def _tiny() -> Any:
    import torch

    from tests.engine.conftest import TINY_GRAPH

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tiny.yaml")
        path.write_text(TINY_GRAPH)
        torch.manual_seed(0)
        return part("models").create_model(path, 3, class_tower=8)


def _parallel_epoch() -> Counter[str]:
    """Operators of two batches, after two others."""
    import torch
    import torch.distributed as dist

    from tests.earlier.trainer import Batches, batch_of, trainer_of

    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(Path(folder, "store")), 1))
        batches = Batches(batch_of(2, 64, 3), batch_of(2, 64, 3))
        trainer = trainer_of(_tiny(), torch.device("cpu"), "off", batches, rank=1, size=2)
        trainer._train_epoch(0)
        with _calls() as calls:
            trainer._train_epoch(1)
        dist.destroy_process_group()
    counts: Counter[str] = calls.counts
    return counts


def broadcast_of_buffers() -> None:
    expect(_parallel_epoch()["c10d::broadcast_"], 0, "broadcasts in two batches of a data-parallel run")


def factor_of_processes() -> None:
    found = _parallel_epoch()["yolov9_fast::detection_loss_backward"]
    expect(found, 0, "calls of detection_loss_backward in two batches of a data-parallel run")


def skipped_update() -> None:
    import torch

    from tests.earlier.trainer import Batches, batch_of, trainer_of

    trainer = trainer_of(_tiny(), torch.device("cpu"), "fp16", Batches(batch_of(2, 64, 3)), rank=1)
    for parameter in trainer.model.parameters():
        parameter.grad = torch.full_like(parameter, math.inf)
    trainer.state.scaler.scale(torch.zeros(()))
    with _calls() as calls:
        assert not trainer._step()
    norms = sum(isinstance(m, torch.nn.BatchNorm2d) for m in trainer.model.modules())
    waits = calls.counts["aten::_local_scalar_dense"]
    expect(waits, 1, f"values that the host asks for in a skipped fp16 update, {norms} norms")


# ---- memory and devices


def targets_and_pinning() -> None:
    import torch

    targets = part("losses.targets")
    targets.sort_rows = targets.place_rows  # its name then
    from tests.losses.test_targets import CopiesToTheGpu

    rows = torch.tensor([[0, 1, 0.5, 0.5, 0.4, 0.6], [1, 0, 0.3, 0.6, 0.2, 0.2]])
    padded = targets.pad_targets(rows, 2, 3, (64, 64), torch.float32)
    with CopiesToTheGpu() as calls:
        padded.to(torch.device("cuda", 0), torch.float32)
    torch.cuda.is_available = lambda: True
    loader = part("data.loader").DetectionLoader([], [[0]], 0)._loader  # nothing tells it the device of the run
    locked = sum(locked for locked, _ in calls.copies)
    expect(
        (f"{locked} of {len(calls.copies)}", loader.pin_memory),
        ("3 of 3", False),
        "copies of targets from page-locked memory; pin_memory of a run on the CPU where there is a GPU",
    )


def _three_gpus() -> set[int]:
    """As in tests/engine/test_device_use.py: 0 and 1 of capability 7.5; which were asked."""
    import torch

    touched: set[int] = set()

    def properties(device: Any = None) -> Any:
        index = 0 if device is None else torch.device(device).index if not isinstance(device, int) else device
        touched.add(index)
        return SimpleNamespace(major=(7, 7, 9)[index], minor=5, name="a GPU", total_memory=2**34)

    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 3
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_properties = properties
    torch.cuda._check_bf16_tensor_supported = lambda device: True  # type: ignore
    return touched


def bf16_of_the_runs_gpu() -> None:
    import torch

    touched = _three_gpus()
    found = part("engine.trainer").resolve_amp("auto", torch.device("cuda", 1))
    expect((found, touched), ("off", {1}), "amp auto on cuda:1 (compute capability 7.5), and the GPUs that were asked")


def device_of_the_run() -> None:
    import torch

    _three_gpus()
    current = [0]
    torch.cuda.set_device = lambda device: current.append(torch.device(device).index)
    joined = part("engine.distributed").join_world("1")
    expect((str(joined.device), current[-1]), ("cuda:1", 1), "device of --device 1, and the current one")


# ---- Triton on a driver that launches nothing


def _driver() -> Any:
    stand_ins.host_time()
    from tests.fake_cuda import triton_driver

    return triton_driver.start()


def no_compiler_for_triton() -> None:
    with tempfile.TemporaryDirectory() as cache:
        os.environ |= {"TRITON_CACHE_DIR": cache}
        _driver()
        import torch

        os.environ["PATH"] = "/nowhere"
        os.environ.pop("CC", None)
        x = torch.ones(2, 8, 4, 4, device="cuda:1")
        zeros, ones = torch.zeros(8, device="cuda:1"), torch.ones(8, device="cuda:1")
        try:
            part("ops.bn_silu").bn_silu(x, None, None, zeros, ones, training=False, momentum=0.1, eps=0.0)
        except Exception as error:
            raise AssertionError(f"bn_silu under auto: {type(error).__name__}: {error}") from error


def python_of_a_launch() -> None:
    command = [sys.executable, "-P", "-W", "ignore", "-m", "tests.earlier.host_time", "yolov9-t", "--repeats", "0"]
    done = subprocess.run([*command, "--json"], cwd=ROOT, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found = {name: one["python calls"] for name, one in json.loads(done.stdout)["yolov9-t"].items()}
    recorded = COUNTS["the host's part on a GPU, torch 2.13, triton 3.7"]
    expect(found, {name: recorded[f"yolov9-t {name}"]["python calls"] for name in found}, "Python calls of yolov9-t")


def small_blocks() -> None:
    os.environ.pop("YOLOV9_FAST_HOST_MICROSECONDS", None)
    driver = _driver()
    import torch

    unit = part("nn").Conv(8, 8, 3).to("cuda")
    x = torch.randn(2, 8, 16, 16, device="cuda")
    unit(x).sum().backward()
    driver.reset()
    unit(x).sum().backward()
    expect(driver.count(), 0, "Triton launches of a unit on a map of 16 kB, forward and backward")


# ---- arithmetic and kernels


def factors_of_tensor_cores() -> None:
    import torch

    from tests import ptx

    torch.backends.cudnn.conv.fp32_precision = "tf32"  # type: ignore
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.rand(1, 96, 5, 5, generator=generator) + 1, torch.rand(8, 96, 1, 1, generator=generator) + 1
    exact = torch.nn.functional.conv2d(x.double(), weight.double())
    rounded = [torch.from_numpy(ptx.rounded_to_tf32(t.numpy())).double() for t in (x, weight)]
    theirs = (torch.nn.functional.conv2d(*rounded) - exact).square().mean().sqrt()
    out = torch.empty(1, 8, 5, 5)
    with ptx.arithmetic("scattered"):
        part("kernels.conv1x1").conv1x1_forward([x], weight, None, out)
    ours = out.double() - exact
    allowed = float(2 * theirs + 4e-6 * exact.abs().max())
    error = float(ours.square().mean().sqrt())
    if error > allowed:
        raise AssertionError(f"error of a product {error:.3g}, allowed {allowed:.3g}; mean {float(ours.mean()):.3g}")


def _tests(*arguments: str, **variables: str) -> None:
    """Tests of the commit; the last line is pytest's."""
    command = [sys.executable, "-P", "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=TREE, env=environment(**variables), capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    if done.returncode:
        reasons = Counter(match[1] for line in lines if (match := re.search(r":\d+: (?:\w+\.)*(\w+: .*)", line)))
        first = "; ".join(f"{n} × {reason[:160]}" for reason, n in reasons.most_common(2))
        raise AssertionError(f"{lines[-1]}; {first}" if lines else done.stderr[-1000:])


def divisions_per_channel() -> None:
    chosen = "(test_bn_silu and shape0) or (test_rep_bn_silu and shape1) or thousand_deviations"
    tests = ("tests/kernels/test_batch_norm.py", "-p", "tests.ptx.plugin", "-m", "not slow", "-k", chosen)
    _tests(*tests, TRITON_INTERPRET="1")


def tests_where_a_gpu_is() -> None:
    files = [f"tests/ops/test_{name}.py" for name in ("adown_pool", "cbfuse", "conv1x1", "spp")]
    _tests(*files, "-p", "tests.earlier.visible_gpu", "-m", "not slow and not gpu", "-k", "triton")


def products_follow_convolutions() -> None:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    torch.backends.cudnn.conv.fp32_precision = "tf32"  # type: ignore
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    operator = part("ops.conv1x1").OPERATOR
    with FakeTensorMode():
        weight = torch.empty(4, 8, 1, 1, device="cuda")
        x = torch.empty(1, 8, 4, 4, device="cuda", memory_format=torch.channels_last)
        reason = operator.implementations["cuda"].supports([x], weight, None, None)
    if "fp32_precision" not in str(reason):
        raise AssertionError(f"convolutions in TF32, products not: why the products do not run: {reason}")


def second_stage() -> None:
    import torch

    launch, turns = part("kernels.launch"), dict[str, int]()
    describe = launch.Kernel.describe

    def noted(kernel: Any, arguments: Any, constants: Any, *rest: Any) -> Any:
        if kernel.name in ("bn_finish_kernel", "column_sums_kernel"):
            partials = arguments[kernel.arguments.index("partials")]
            turns[kernel.name] = -(-partials // constants["BLOCK_G"])
        return describe(kernel, arguments, constants, *rest)

    launch.Kernel.describe = noted
    x = torch.empty((32, 64, 80, 80), dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)
    vector = torch.empty(64, device="meta")
    with launch.recording(90):
        part("kernels.bn_silu").bn_stats(x)
        part("kernels.bn_silu").bn_silu_backward_sums(x, x, vector, vector, vector, vector, True)
    expect(turns, dict.fromkeys(turns, 1), "turns of the loop over partial sums")


def strides_of_fakes() -> None:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    part("ops")
    wide = torch.randn(2, 8, 6, 7)
    layouts = {
        "contiguous": torch.randn(2, 6, 4, 5),
        "channels_last": torch.randn(2, 6, 4, 5).to(memory_format=torch.channels_last),
        "cropped": wide.to(memory_format=torch.channels_last)[:, 1:-1, 1:-1, 1:-1],
        "transposed": torch.randn(2, 6, 5, 4).transpose(2, 3),
    }
    y, vectors = torch.randn(2, 6, 4, 5), torch.rand(4, 6).unbind()
    wrong, compared = [], 0
    for layout, x in layouts.items():
        for name, given in {
            "tap_backward": (x, y[:, :2], 4),
            "bn_silu_backward": (y, x, *vectors, True),
            "cbfuse_forward": ([y], x),
            "conv1x1_weight_grad": (x, [y]),
        }.items():
            call = getattr(torch.ops.yolov9_fast, name)
            real = [one.stride() for one in torch.utils._pytree.tree_leaves(call(*given))]
            with FakeTensorMode() as mode:
                faked = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, list(given))
                fake = [one.stride() for one in torch.utils._pytree.tree_leaves(call(*faked))]
            compared += 1
            if fake != real:
                wrong.append(f"{name}, {layout}: real {real[0]}, fake {fake[0]}")
    if wrong:
        raise AssertionError(f"{len(wrong)} of {compared} differ, such as {wrong[0]}")


# ---- benchmarks, compiled code


def times_of_kernels() -> None:
    import torch

    stand_ins.stand_in("kernels.device_time", DeviceTimer=None)
    part("bench.cases")
    from tests.bench import test_device_time as simulated

    gpu = simulated.Simulation()
    measure = part("bench.measure")

    def event(enable_timing: bool = False) -> Any:
        made = gpu.event(True)
        record = made.record
        made.record = lambda stream=None: record(stream)
        return made

    torch.cuda.Event = event  # type: ignore
    torch.cuda.synchronize = lambda device=None: gpu.wait()  # type: ignore
    one = measure.Candidate(
        part("bench.cases").Runner("cuda", "nchw", lambda clock: gpu.launch(30e-6, 5e-6), dict), 0.0
    )
    measure.sample(one, False, torch.device("cuda", 0))
    clock = part("bench.cases").PhaseClock(torch.device("cuda", 0))
    gpu.waits = 0
    for phase in ("forward", "backward"):
        clock.mark(phase)
    expect(
        (f"{1e6 * one.samples[0]:.0f} µs", gpu.waits),
        ("5 µs", 0),
        "a kernel of 5 µs that takes 30 µs to launch, and waits of two phases",
    )


def reference_in_float64() -> None:
    import torch

    networks = part("bench.networks")
    made: list[tuple[str, str]] = []
    networks._loader_batches = lambda *args: (None, "")
    networks.TrainingStep = lambda name, size, batch, device, **options: (
        made.append((f"{name}, batch {batch}, {options.get('dtype')}", device.type)) or SimpleNamespace(results=dict)
    )
    settings = part("bench.cases").Settings(full=True, peers=False)
    gpu = torch.device("cuda", 0)
    for case in networks.step_cases(settings, ("bfloat16",), gpu):
        reference = case.open(gpu, settings).reference
        if reference is not None:
            reference()
    expect([where for _, where in made], ["cuda", "cuda"], f"devices of the references of {[name for name, _ in made]}")


def registers_of_assign() -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("recipe", TREE / "csrc" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    recipe = sys.modules["recipe"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    os.environ["YOLOV9_FAST_CUDA_ARCHS"] = "10.0"
    found = recipe.cuda_recipe(recipe.find_torch())
    with tempfile.TemporaryDirectory() as folder:
        command = [*found.compiler, *found.compile_flags, f"-I{TREE / 'csrc'}", "-c", str(TREE / "csrc/cuda/assign.cu")]
        log = recipe.run([*command, "-o", str(Path(folder, "assign.o"))], "assign.cu", with_messages=True)
    kernels = recipe.kernel_report("assign.cu", log)
    if not kernels:
        raise RuntimeError(f"ptxas named no kernel: {log[-500:]}")
    spills = {row["kernel"]: row["spill_stores"] for row in kernels if row["spill_stores"]}
    expect(spills, {}, "bytes that kernels of assign.cu store outside their registers, sm_100")


CHECKS: dict[str, tuple[Callable[[], None], tuple[str, ...]]] = {
    "gradient of tap": (gradient_of_tap, ("tests/fake_cuda/test_trace.py::test_training_steps",)),
    "constants of folded units": (folded_units, ("tests/fake_cuda/test_trace.py::test_prediction_and_validation",)),
    "launches of a step": (launches_of_a_step, ("tests/fake_cuda/test_trace.py::test_training_steps",)),
    "synchronised unit": (synchronised_unit, ("tests/ops/test_sync_statistics.py",)),
    "broadcast of buffers": (broadcast_of_buffers, ("tests/engine/test_step.py",)),
    "factor of processes": (factor_of_processes, ("tests/engine/test_step.py",)),
    "skipped fp16 update": (skipped_update, ("tests/engine/test_step.py",)),
    "waits of validation": (
        waits_of_validation,
        ("tests/fake_cuda/test_trace.py::test_prediction_and_validation", "tests/test_waits.py"),
    ),
    "targets and pinning": (
        targets_and_pinning,
        (
            "tests/losses/test_targets.py",
            "tests/engine/test_validator.py::test_batches_are_page_locked_for_a_run_on_a_gpu_only",
        ),
    ),
    "seconds of phases": (seconds_of_phases, ("tests/engine/test_clock.py",)),
    "no compiler for Triton": (no_compiler_for_triton, ("tests/ops/test_probe.py", "tests/fake_cuda/test_fallback.py")),
    "bf16 of the run's GPU": (bf16_of_the_runs_gpu, ("tests/engine/test_device_use.py",)),
    "device of the run": (device_of_the_run, ("tests/engine/test_device_use.py",)),
    "Python of a launch": (python_of_a_launch, ("tests/fake_cuda/test_host_time.py",)),
    "small blocks": (small_blocks, ("tests/fake_cuda/test_host_time.py", "tests/nn/test_host_time.py")),
    "factors of tensor cores": (factors_of_tensor_cores, ("tests/ptx/test_ptx.py",)),
    "divisions per channel": (divisions_per_channel, ("tests/ptx/test_ptx.py",)),
    "products and convolutions": (
        products_follow_convolutions,
        ("tests/ops/test_conv1x1.py::test_on_a_gpu_float32_rounds_as_convolutions_are_set_to",),
    ),
    "second stage": (
        second_stage,
        ("tests/kernels/test_batch_norm.py::test_a_second_stage_loads_all_partials_at_once",),
    ),
    "strides of fakes": (strides_of_fakes, ("tests/ops/test_strides.py",)),
    "tests where a GPU is": (tests_where_a_gpu_is, ("tests/test_devices.py",)),
    "times of kernels": (times_of_kernels, ("tests/bench/test_device_time.py",)),
    "reference in float64": (reference_in_float64, ("tests/bench/test_networks.py",)),
    "registers of assign": (
        registers_of_assign,
        ("tests/test_compiled_code.py::test_no_cuda_kernel_spills",),
    ),
}
"""By name: what is asserted of the earlier commit, and the tests of today that assert it."""
VARIABLES = {
    "factors of tensor cores": {"TRITON_INTERPRET": "1"},
    "strides of fakes": {"YOLOV9_FAST_SKIP_LOADING": "1"},  # the definitions
}

if __name__ == "__main__":
    CHECKS[sys.argv[1]][0]()
    print("passed", flush=True)
    os._exit(0)
