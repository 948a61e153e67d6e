"""The emulated arithmetic keeps the documented bounds; the kernels use nothing else and are exact enough with it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from yolov9_fast.kernels import conv1x1, replay
from yolov9_fast.kernels.launch import recording, views

from tests import ptx
from tests.ops.feature_maps import float32_precision
from yolov9_fast.ops import _library as library

ROOT = Path(__file__).resolve().parents[2]
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET is not 1")


def samples() -> np.ndarray:
    """Magnitudes from 1e-30 to 1e30 of both signs, in float64."""
    draw = np.random.default_rng(0)
    return draw.choice([-1.0, 1.0], 20_000) * 10 ** draw.uniform(-30, 30, 20_000)


@pytest.mark.parametrize("name", ptx.BOUNDS)
def test_answers_reach_the_documented_bound_and_do_not_pass_it(name: str) -> None:
    exact, bound = samples(), ptx.BOUNDS[name]
    ulp = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    allowed = bound.ulps * ulp + bound.relative * np.abs(exact)
    errors = {}
    for answer in ptx.ANSWERS:
        errors[answer] = (ptx.approximate(exact, bound, answer) - exact) * np.sign(exact) / allowed
        assert np.abs(errors[answer]).max() <= 1.0 + 2.0**-10  # the spacing at a power of two is that above it
    assert errors["short"].max() < 0.0 < errors["long"].min()
    assert errors["short"].min() < -0.9
    assert errors["long"].max() > 0.9
    assert errors["scattered"].min() < -0.9
    assert errors["scattered"].max() > 0.9
    assert abs(errors["scattered"].mean()) < 0.1


@pytest.mark.parametrize("answer", ptx.ANSWERS)
def test_zeros_infinities_and_nan_are_exact_and_subnormals_flushed_where_the_name_says_so(answer: str) -> None:
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan])
    for bound in ptx.BOUNDS.values():
        np.testing.assert_array_equal(ptx.approximate(special, bound, answer), special.astype(np.float32))
        assert ptx.approximate(np.array([1e39]), bound, answer) == np.inf
        tiny = ptx.approximate(np.array([1e-40]), bound, answer)
        assert (tiny == 0) == bound.flushes
    assert np.signbit(ptx.flushed(np.float32([-1e-40])))
    assert ptx.flushed(np.float32([2.0**-126])) == np.float32(2.0**-126)


def test_tf32_rounds_to_ten_bits_and_ties_away_from_zero() -> None:
    step = 2.0**-10
    values = np.float32([1 + step / 2, -1 - step / 2, 1 + step / 2 - 2.0**-23, 1 + 3 * step / 4, np.inf, -np.inf, 3.0])
    expected = np.float32([1 + step, -1 - step, 1.0, 1 + step, np.inf, -np.inf, 3.0])
    np.testing.assert_array_equal(ptx.rounded_to_tf32(values), expected)
    assert np.isnan(ptx.rounded_to_tf32(np.uint32([0x7FFFFFFF]).view(np.float32)))
    np.testing.assert_array_equal(ptx.cut_to_tf32(values)[:4], np.float32([1.0, -1.0, 1.0, 1.0]))


def product_of(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    out = torch.empty(1, weight.shape[0], *x.shape[2:])
    conv1x1.conv1x1_forward([x], weight, None, out)
    return out


@interpreted
@pytest.mark.parametrize("answer", ptx.ANSWERS)
@pytest.mark.parametrize("setting", ["tf32", "ieee"])
def test_a_product_errs_as_its_setting_allows(setting: str, answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the convolution of inputs that are rounded to TF32: twice its error at most, and no drift to zero."""
    monkeypatch.setattr(conv1x1, "_in_tf32", lambda view: setting == "tf32")  # as on a GPU
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.rand(1, 96, 5, 5, generator=generator) + 1, torch.rand(8, 96, 1, 1, generator=generator) + 1
    exact = torch.nn.functional.conv2d(x.double(), weight.double())
    rounded = [torch.from_numpy(ptx.rounded_to_tf32(t.numpy())).double() for t in (x, weight)]
    theirs = (torch.nn.functional.conv2d(*rounded) - exact).square().mean().sqrt()
    with ptx.arithmetic(answer), replay.paused():
        ours = product_of(x, weight).double() - exact
    allowed = 2 * theirs + 4e-6 * exact.abs().max() if setting == "tf32" else 4e-6 * exact.abs().max()
    assert ours.square().mean().sqrt() <= allowed


@pytest.mark.parametrize("setting", ["tf32", "ieee"])
def test_a_gpu_rounds_factors_as_torch_is_set_to_and_the_cpu_never(setting: str) -> None:
    weight = torch.empty(8, 16, 1, 1, device="meta")
    x = torch.empty(1, 16, 4, 4, device="meta").contiguous(memory_format=torch.channels_last)
    with float32_precision(setting), recording(90) as seen:
        conv1x1.conv1x1_forward([x], weight, None, torch.empty(1, 8, 4, 4, device="meta"))
        assert not conv1x1._in_tf32(views(torch.empty(1, 16, 4, 4))[0])
    assert [dict(launch.constants)["PRECISION"] for launch in seen] == [setting]


@interpreted
def test_outside_the_block_the_interpreter_is_as_before() -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    before = dict(vars(InterpreterBuilder))
    with ptx.arithmetic("short"):
        assert vars(InterpreterBuilder)["create_fdiv"] is not before["create_fdiv"]
    assert dict(vars(InterpreterBuilder)) == before
    with pytest.raises(ValueError, match=r"^answer: expected one of short, long, scattered, got 'wide'"):
        ptx.arithmetic("wide").__enter__()


BUILT = """
import json, re, sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from yolov9_fast.kernels import aot
from yolov9_fast.kernels.launch import kernels
chosen = {}
for shape in ((1, 64, 80, 80), (1, 256, 20, 20)):
    for launch in aot.launches(90, [shape], [torch.float32, torch.bfloat16], [torch.channels_last]).values():
        constants, dtype = dict(launch.constants), next(kind for _, kind in launch.signature if kind[0] == "*")
        if constants.get("SILU") is not False and (dtype == "*fp32" or "silu" in launch.kernel):
            chosen.setdefault((launch.kernel, dtype, constants.get("RSTD")), launch)
found = {}
for (name, dtype, _), launch in chosen.items():
    function = kernels[name].function
    attributes = {(function.arg_names.index(n),): [["tt.divisibility", 16]] for n in launch.aligned}
    source = ASTSource(function, dict(launch.signature), dict(launch.constants), attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "maxnreg": launch.registers}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    names = set(re.findall(r"^\\s*(?:@!?%p\\d+ )?([a-z]\\w*(?:[.:]+\\w+)+)", ptx, re.M))
    names |= set(re.findall(r"\\b(?:cvt\\.rna\\.tf32|ex2|sqrt|div|rsqrt|rcp|lg2|tanh)[.\\w]*", ptx))
    found.setdefault(f"{name} {dtype}", set()).update(names)
print(json.dumps({name: sorted(names) for name, names in found.items()}))
"""
APPROXIMATE = re.compile(r"\.approx\b|\.full\b")


@pytest.mark.slow
def test_every_approximate_instruction_of_a_triton_kernel_is_emulated() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", BUILT], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[str]] = json.loads(done.stdout)
    unit = "bn_silu_apply_kernel"
    # What the kernels are written for: float32 divides exactly, 16-bit maps at half the instructions.
    assert {name for name in found[f"{unit} *fp32"] if name.startswith(("div", "ex2"))} == {
        "div.rn.f32",
        "ex2.approx.f32",
    }
    used = {name for name in found[f"{unit} *bf16"] if APPROXIMATE.search(name)}
    assert used == {ptx.USED_FOR["exp"], ptx.USED_FOR["fdiv"]}
    for kernel, names in found.items():
        unknown = [name for name in names if APPROXIMATE.search(name) and name not in set(ptx.USED_FOR.values())]
        assert not unknown, f"{kernel}: {unknown} are not emulated: add them to tests/ptx"
        if any(".tf32" in name and "mma" in name for name in names):
            assert "cvt.rna.tf32.f32" in names, f"{kernel}: its products cut the low bits of their factors off"


LIBRARY_FUNCTIONS = {
    # atanf and logf of the CUDA library, within 2 and 1 units in the last place; in the CIoU and the cross entropy.
    "detection_loss": {"rcp.approx.ftz.f32"},
}
STARTS_A_DIVISION = "rcp.approx.ftz.f64"
"""The first step of a correctly rounded division of float64."""
CUDA = library.build_info().get("parts", {}).get("cuda", {})


@pytest.mark.skipif(CUDA.get("file") is None, reason=f"no CUDA part: {CUDA.get('reason')}")
def test_the_cuda_kernels_use_no_approximate_instruction_of_their_own() -> None:
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    path = Path(library.__file__).resolve().parents[1] / CUDA["file"]
    text = subprocess.run([tool, "-ptx", path], capture_output=True, text=True, check=True).stdout
    entries = re.split(r"\.entry ", text)[1:]
    assert len(entries) > 20
    for entry in entries:
        name = entry.split("(")[0]
        used = set(re.findall(r"\b\w+(?:\.\w+)*\.(?:approx|full)\b[.\w]*", entry)) - {STARTS_A_DIVISION}
        known = next((known for part, known in LIBRARY_FUNCTIONS.items() if f"{part}_cu" in name), set())
        assert used <= known, f"{name}: {used - known}"


@pytest.mark.slow
def test_the_kernels_are_exact_enough_whatever_ptx_answers() -> None:
    tests = ("tests/kernels/test_batch_norm.py", "tests/kernels/test_maps.py")
    chosen = (
        "(test_bn_silu and shape0) or (test_rep_bn_silu and shape1) or thousand_deviations or (conv1x1 and channels1)"
    )
    command = [sys.executable, "-m", "tests.ptx", *tests, "-m", "not slow", "-k", chosen, "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) >= 30
