"""Predicted times: kernels of known calls by hand, time lines of host and device, devices from outside, the command."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from yolov9_fast.bench import networks, predict, report, roofline
from yolov9_fast.bench.cases import Settings
from yolov9_fast.bench.roofline import Call, Device, Kernel, Shape, kernels_of

from tests import fake_cuda
from yolov9_fast.cli.main import main
from yolov9_fast.errors import UserError

RECORDS = fake_cuda.ROOT / "bench" / "results" / "predicted" / "networks.json"
DEVICE = Device("test", 1e12, {"float32": 1e12, "tf32": 2e12, "bfloat16": 4e12}, least=1e-6)
VECTOR = Shape("float32", (8,), (1,))


def last(channels: int, side: int = 16, batch: int = 2, dtype: str = "bfloat16") -> Shape:
    """A channels_last map."""
    return Shape(dtype, (batch, channels, side, side), (channels * side * side, 1, channels * side, channels))


X, Y = last(8), last(32)
WEIGHT = Shape("bfloat16", (32, 8, 3, 3), (72, 1, 24, 8))
X_BYTES, Y_BYTES, WEIGHT_BYTES = 2 * 2 * 8 * 256, 2 * 2 * 32 * 256, 2 * 32 * 72
PRODUCTS = 2 * 2 * 32 * 256 * 72
OPTIONS = ((1, 1), (1, 1), (1, 1), False, (0, 0), 1)


# ---- kernels of a call


def numbers(call: Call) -> list[tuple[float, float, str]]:
    return [(kernel.moved, kernel.operations, kernel.computed_in) for kernel in kernels_of(call)]


def test_a_convolution_reads_its_map_and_weight_and_writes_its_map() -> None:
    call = Call("aten::convolution", (X, WEIGHT, None, *OPTIONS), (Y,))
    assert numbers(call) == [(X_BYTES + WEIGHT_BYTES + Y_BYTES, PRODUCTS, "bfloat16")]
    wide = Call("aten::convolution", (last(8, dtype="float32"), WEIGHT, VECTOR, *OPTIONS), (last(32, dtype="float32"),))
    assert numbers(wide)[0][1:] == (PRODUCTS, "tf32")
    assert numbers(wide)[1] == (2 * 2 * Y_BYTES, 0.0, "float32"), "the bias is a pass of its own"


def test_each_gradient_of_a_convolution_costs_as_many_products() -> None:
    call = Call("aten::convolution_backward", (Y, X, WEIGHT, None, *OPTIONS, (True, True, False)), (X, WEIGHT, None), 2)
    moved = X_BYTES + WEIGHT_BYTES + Y_BYTES
    assert numbers(call) == [(moved, PRODUCTS, "bfloat16")] * 2
    given = (Y, X, WEIGHT, None, *OPTIONS, (False, True, False))
    first = Call("aten::convolution_backward", given, (None, WEIGHT, None))
    assert len(kernels_of(first)) == 1


def test_batch_norm_needs_its_statistics_first() -> None:
    given = (X, VECTOR, VECTOR, VECTOR, VECTOR, True, 0.03, 1e-3)
    forward = Call("aten::native_batch_norm", given, (X, VECTOR, VECTOR))
    backward = Call("aten::native_batch_norm_backward", (X, X, VECTOR), (X, VECTOR, VECTOR))
    assert [moved / X_BYTES for moved, _, _ in numbers(forward)] == [1, 2]
    assert [moved / X_BYTES for moved, _, _ in numbers(backward)] == [2, 3]


def test_an_operator_on_lists_is_split_over_its_launches() -> None:
    call = Call("aten::_foreach_add_", ((VECTOR,) * 100, (VECTOR,) * 100), ((VECTOR,) * 100,), launches=3)
    assert numbers(call) == [(pytest.approx(300 * 32 / 3), 0.0, "float32")] * 3


def test_a_matrix_product_in_float32_takes_no_tf32() -> None:
    a, b, c = (Shape("float32", shape, (shape[1], 1)) for shape in ((64, 32), (32, 16), (64, 16)))
    assert numbers(Call("aten::mm", (a, b), (c,))) == [(4 * (64 * 32 + 32 * 16 + 64 * 16), 2 * 64 * 32 * 16, "float32")]


def test_a_triton_operator_has_the_kernels_that_its_launcher_launches() -> None:
    pytest.importorskip("triton")
    x, vector = last(64, 80, 32), Shape("float32", (64,), (1,))
    size = 2 * 32 * 64 * 6400
    given = (x, vector, vector, vector, vector, 0.03, 1e-3, None, x, True)
    forward = kernels_of(Call("yolov9_fast::bn_silu_forward_triton", given, (vector, vector)))
    passes = [kernel.moved / size for kernel in forward]
    assert passes == pytest.approx([1, 0, 2], abs=0.03), "statistics, their sum, the map"
    saved = (x, x, vector, vector, vector, vector, True)
    backward = kernels_of(Call("yolov9_fast::bn_silu_backward_triton", saved, (x, vector, vector)))
    assert sum(kernel.moved for kernel in backward) / size == pytest.approx(5, abs=0.05)


def test_products_of_a_triton_operator_are_those_that_it_registers() -> None:
    pytest.importorskip("triton")
    x, out, weight = last(64, 40, 4), last(32, 40, 4), Shape("bfloat16", (32, 64, 1, 1), (64, 1, 64, 64))
    kernels = kernels_of(Call("yolov9_fast::conv1x1_forward_triton", ((x,), weight, None, out), (None,)))
    assert [kernel.operations for kernel in kernels] == [2 * 4 * 32 * 1600 * 64]


# ---- times


@pytest.mark.parametrize(
    ("kernel", "seconds", "bound"),
    [
        (Kernel("a", 5e6), 5e-6, "memory"),
        (Kernel("a", 5e6, 8e6), 8e-6, "arithmetic"),
        (Kernel("a", 5e6, 24e6, "bfloat16"), 6e-6, "arithmetic"),
        (Kernel("a", 5e6, 8e6, "float16"), 8e-6, "arithmetic"),
        (Kernel("a", 5e3, 8e3), 1e-6, "launch"),
    ],
)
def test_a_kernel_takes_the_longest_of_three(kernel: Kernel, seconds: float, bound: str) -> None:
    assert DEVICE.seconds(kernel) == pytest.approx(seconds)
    assert DEVICE.bound(kernel) == bound


def test_host_and_device_run_side_by_side() -> None:
    long, short = Kernel("long", 100e6), Kernel("short", 0.0)
    fast_host = roofline.run([([long], 10e-6)] * 3, DEVICE, replay=5e-6)
    assert (fast_host.device, fast_host.host) == pytest.approx((300e-6, 30e-6))
    assert fast_host.both == pytest.approx(310e-6)
    assert fast_host.captured == pytest.approx(305e-6)
    slow_host = roofline.run([([short, short], 20e-6)] * 3, DEVICE, replay=5e-6)
    assert slow_host.both == pytest.approx(61e-6), "the last kernel begins when the host has launched it"
    assert slow_host.captured == pytest.approx(11e-6)
    assert slow_host.parts["short"].kernels == 6
    assert slow_host.parts["short"].bounds == pytest.approx({"launch": 6e-6})
    mixed = roofline.run([([long], 10e-6), ([short], 200e-6), ([short], 10e-6)], DEVICE, replay=5e-6)
    assert mixed.both == pytest.approx(221e-6)


# ---- devices from outside


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "devices", dict(roofline.devices))
    monkeypatch.setattr(predict, "devices", roofline.devices)


@pytest.mark.usefixtures("known")
def test_a_stranger_adds_a_device(tmp_path: Path) -> None:
    roofline.register_device(Device("mine", 8e12, {"float32": 75e12}))
    assert predict.device_of("mine").bandwidth == 8e12
    path = tmp_path / "b200.json"
    figures = {"float32": 75, "tf32": 1100, "bfloat16": 2250, "float16": 2250}
    path.write_text(json.dumps({"name": "B200", "bandwidth_gb_per_s": 8000, "tflop_per_s": figures, "least_us": 2}))
    found = predict.device_of(str(path))
    assert (found.name, found.bandwidth, found.operations["bfloat16"], found.least) == ("B200", 8e12, 2250e12, 2e-6)
    assert predict.device_of("B200") is found


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "expected name, bandwidth_gb_per_s and tflop_per_s"),
        ("{", "expected JSON"),
        ('{"bandwidth_gb_per_s": -1, "tflop_per_s": {"float32": 1}}', "bandwidth_gb_per_s: expected a positive number"),
        ('{"bandwidth_gb_per_s": 1, "tflop_per_s": {"float32": "x"}}', "float32: expected a positive number"),
        ('{"bandwidth_gb_per_s": 1, "tflop_per_s": {"bfloat16": 1}}', "expected a figure for float32"),
        ('{"bandwidth_gb_per_s": 1, "tflop_per_s": {"float32": 1}, "least_us": 0}', "least_us: expected a positive"),
    ],
)
def test_a_file_that_describes_no_device_is_one_line(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "device.json"
    path.write_text(content)
    assert main(["bench", "predict", "--device", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "H100", "V3"], "expected some of H100, H200, A100, L4, RTX4090, or a JSON file, got 'V3'"),
        (["--imgsz", "100"], "--imgsz: expected a positive multiple of 32, got 100"),
        (["--batch", "0"], "--batch: expected at least 1, got 0"),
        (["--network", "yolov9-q"], "yolov9-q"),
    ],
)
def test_wrong_options_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "predict", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_installation_says_that_it_has_no_tracer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(predict, "_ROOT", tmp_path)
    with pytest.raises(UserError, match="expected a source checkout"):
        predict.predict("yolov9-t")


# ---- a whole step


@functools.cache
def step() -> dict[str, Any]:
    try:
        fake_cuda.library()
    except RuntimeError as error:
        pytest.skip(str(error))
    return predict.predict("yolov9-t", batch=8)


NEEDS_TRACER = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has a CUDA device of its own"),
    pytest.mark.skipif(sys.platform != "linux", reason="the tracer runs on Linux"),
]


class TestAStep:
    pytestmark = NEEDS_TRACER

    def test_both_forms_are_predicted_on_every_device(self) -> None:
        found = step()
        assert set(found["forms"]) == {"eager", "fused"}
        for form in found["forms"].values():
            assert set(form["predicted"]) == set(found["devices"]) == set(roofline.devices)
            for one in form["predicted"].values():
                assert one["device_seconds"] < one["captured_seconds"] <= one["seconds"]
                assert one["seconds"] >= max(one["host_seconds"], one["device_seconds"])
                assert len(one["operators"]) == 10

    def test_the_fused_form_moves_less_and_keeps_less(self) -> None:
        eager, fused = step()["forms"]["eager"], step()["forms"]["fused"]
        for key in ("bytes", "saved_bytes", "launches"):
            assert fused[key] < eager[key]
        assert fused["operations"] == pytest.approx(eager["operations"], rel=0.05)
        for name in roofline.devices:
            assert fused["predicted"][name]["device_seconds"] < eager["predicted"][name]["device_seconds"]

    def test_every_table_says_that_it_is_predicted(self) -> None:
        lines = predict.text(step()).splitlines()
        heads = [lines[index - 1] for index, line in enumerate(lines) if line and set(line) == {"-"}]
        assert len(heads) == 3
        assert all("predicted" in head for head in heads)
        assert "measured" not in " ".join(heads)
        assert "falsifies" in lines[-1]


# ---- the committed records


@functools.cache
def records() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(RECORDS.read_text())
    return found


def test_the_documented_table_is_that_of_the_records() -> None:
    page = (fake_cuda.ROOT / "docs" / "benchmarks.md").read_text()
    assert report.predicted(records()) in page


def test_the_records_hold_every_network_and_what_would_falsify_them() -> None:
    cases = {(one["network"], one["what"]) for one in records()}
    assert cases == {(f"yolov9-{size}", what) for size in "tsmce" for what in ("step", "inference")}
    for one in records():
        assert one["predicted"] is True
        assert "falsifies" in one["falsified_by"]
        assert one["devices"].keys() == roofline.devices.keys()
        for form in one["forms"].values():
            assert all(times["captured_seconds"] <= times["seconds"] for times in form["predicted"].values())
    assert str(fake_cuda.ROOT) not in RECORDS.read_text()


def test_the_records_are_of_the_ceilings_in_the_table() -> None:
    for name, device in roofline.devices.items():
        recorded = records()[0]["devices"][name]
        assert recorded["bandwidth"] == pytest.approx(device.bandwidth, rel=1e-3)
        assert recorded["operations"] == pytest.approx(dict(device.operations), rel=1e-3)


def test_a_reference_in_float64_takes_seconds_on_the_slowest_gpu() -> None:
    cuda = torch.device("cuda", 0)
    products = {one["network"]: one for one in records() if one["what"] == "step"}
    slowest = min(device.operations["float64"] for device in roofline.devices.values())
    for case in networks.step_cases(Settings(full=True), ("bfloat16",), cuda):
        step = products[case.network.split("@")[0]]
        image = step["forms"]["eager"]["operations"] / step["batch"]
        assert image * networks.CHECKED_ON_A_GPU / slowest < 5
