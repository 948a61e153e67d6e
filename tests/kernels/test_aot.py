"""What the launchers choose compiles for sm_80, sm_90 and sm_100, spills nothing, accesses 16 bytes at once."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from yolov9_fast.kernels import aot, bn_silu, cases, config
from yolov9_fast.kernels.launch import kernels, recording

CHILD = """
import dataclasses, sys, torch
from yolov9_fast.kernels import aot, cases
for architecture in aot.ARCHITECTURES:
    wanted = aot.launches(architecture, cases.TYPICAL, [torch.bfloat16], [torch.channels_last]).values()
    chosen = {}
    for launch in wanted:
        chosen.setdefault(launch.kernel, launch)
    if architecture == 90:
        chosen |= {(launch.kernel, launch.stages, dict(launch.constants).get("VEC")): launch for launch in wanted}
        plain = aot.launches(90, [(2, 7, 9, 9)], [torch.float32], [torch.contiguous_format]).values()
        chosen |= {(launch.kernel, "plain"): launch for launch in plain}
    for line in aot.table(aot.build(launch, architecture) for launch in chosen.values()):
        print(line)
small = aot.launches(90, [(1, 64, 32, 32)], [torch.bfloat16], [torch.channels_last]).values()
launch = next(one for one in small if one.kernel == "bn_silu_single_pass_kernel")
constants = tuple((dict(launch.constants) | {"BLOCK_P": 8192}).items())
print("TOO LARGE", *aot.table([aot.build(dataclasses.replace(launch, constants=constants), 90)]), sep="\\n")
"""


@pytest.mark.slow
def test_representative_variants_compile_for_every_architecture_without_a_fault() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    listed, too_large = done.stdout.split("TOO LARGE")
    built = [line for line in listed.splitlines() if "sm_" in line]
    for architecture in aot.ARCHITECTURES:
        assert {line.split()[0] for line in built if f" sm_{architecture} " in line} == set(kernels)
    assert not [line for line in built if "FAULT" in line]
    # A program that holds more rows than bn_silu_single_pass.tile_of allows spills, and is reported.
    assert re.search(r"BLOCK_P=8192 .*FAULT: spills [1-9]\d* bytes", too_large)


@pytest.mark.skipif(
    os.environ.get("YOLOV9_FAST_TEST_ALL_KERNELS", "0") != "1",
    reason="compiles every variant for every architecture, an hour of one core: set YOLOV9_FAST_TEST_ALL_KERNELS=1",
)
def test_every_variant_compiles_for_every_architecture_without_a_fault() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "yolov9_fast", "kernels", "--all"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert not [line for line in done.stdout.splitlines() if "FAULT" in line]
    assert done.returncode == 0, done.stderr[-3000:]
    expected = sum(len(aot.everything(architecture)) for architecture in aot.ARCHITECTURES)
    assert done.stdout.splitlines()[-1] == f"{expected} variants, 0 faults"


@pytest.mark.slow
def test_the_list_holds_what_the_tuner_may_choose() -> None:
    listed = set(map(aot.key, aot.everything(90)))
    x = torch.empty((32, 64, 160, 160), dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)
    for choice in config.candidates("bn_statistics_kernel"):
        with config.forced("bn_statistics_kernel", "last/2/64/large", choice), recording(90) as seen:
            bn_silu.bn_stats(x)
        assert seen[0].warps == choice["warps"]
        assert dict(seen[0].constants)["BLOCK_P"] * 64 == choice["elements"]
        assert {aot.key(launch) for launch in seen} <= listed


@pytest.mark.parametrize(
    ("images", "side", "channels", "layout", "forward", "backward"),
    [
        (2, 32, 64, torch.channels_last, True, False),
        (1, 32, 64, torch.channels_last, True, True),
        (10, 20, 64, torch.channels_last, False, False),
        (1, 32, 63, torch.channels_last, True, False),
        (2, 32, 63, torch.channels_last, False, False),
        (1, 31, 64, torch.contiguous_format, True, False),
    ],
)
def test_a_single_pass_is_chosen_only_where_all_rows_fit_the_registers(
    images: int, side: int, channels: int, layout: torch.memory_format, forward: bool, backward: bool
) -> None:
    shape = (images, channels, side, side)
    x, dz, out = (torch.empty(shape, dtype=torch.bfloat16, device="meta", memory_format=layout) for _ in range(3))
    mean, rstd = torch.empty(channels, device="meta"), torch.empty(channels, device="meta")
    with recording(90) as seen:
        bn_silu.bn_silu_forward(x, None, None, None, None, 0.03, 1e-3, None, out, True)
        split = len(seen)
        bn_silu.bn_silu_backward(dz, x, None, None, mean, rstd, True)
    assert ("bn_silu_single_pass_kernel" in {launch.kernel for launch in seen[:split]}) == forward
    assert ("bn_silu_single_pass_backward_kernel" in {launch.kernel for launch in seen[split:]}) == backward
    if not forward:
        assert {launch.kernel for launch in seen[:split]} >= {"bn_statistics_kernel", "bn_silu_apply_kernel"}


def test_the_summary_counts_variants_and_faults() -> None:
    listed = aot.launches(90, cases.TYPICAL[:1], [torch.bfloat16], [torch.channels_last]).values()
    launch = next(one for one in listed if one.kernel == "bn_silu_apply_kernel")
    builds = [aot.Build(launch, 90, 40, 0, 0, 4, 0), aot.Build(launch, 90, 72, 16, 128, 2, 0)]
    _header, line, total = aot.summary(builds)
    assert line.split() == ["bn_silu_apply_kernel", "2", "40-72", "16", "0-128", "2", "2", "1"]
    assert total == "2 variants, 1 faults"


@pytest.mark.slow
def test_no_launcher_leaves_the_list() -> None:
    listed = set(aot.launches(90, (*cases.TYPICAL, *cases.EVERY)))
    draw = random.Random(0)
    for _ in range(60):
        channels = draw.choice((1, 3, 5, 8, 16, 24, 32, 40, 64, 80, 96, 128, 184, 240, 256, 320, 512, 1024))
        side = draw.randint(3, 170)
        shape = (draw.choice((1, 2, 8, 16, 32)), channels, side, draw.choice((side, side + 3)))
        dtype, layout = draw.choice(cases.DTYPES), draw.choice(cases.LAYOUTS)
        for found, launch in aot.launches(90, [shape], [dtype], [layout]).items():
            assert found in listed, f"{shape} {dtype} {layout}: {launch} is not in kernels/cases.py"


def test_every_kernel_is_in_the_list() -> None:
    assert {launch.kernel for launch in aot.launches(90, cases.TYPICAL).values()} == set(kernels)


def test_a_spill_too_much_shared_memory_narrow_accesses_and_float64_are_faults() -> None:
    listed = aot.launches(90, cases.TYPICAL[:1], layouts=[torch.channels_last]).values()
    launch = next(one for one in listed if one.kernel == "bn_silu_apply_kernel")
    assert dict(launch.constants)["VEC"] > 1
    good = aot.Build(launch, 90, 32, 0, 0, 4, 0)
    assert not good.faults()
    assert "no 16-byte access" in aot.Build(launch, 90, 32, 0, 0, 0, 0).faults()
    assert "spills 8 bytes" in aot.Build(launch, 90, 32, 8, 0, 4, 0).faults()
    assert aot.Build(launch, 80, 32, 0, 200_000, 4, 0).faults()
    assert not aot.Build(launch, 90, 32, 0, 200_000, 4, 0).faults()
    assert "1 float64 instructions" in aot.Build(launch, 90, 32, 0, 0, 4, 1).faults()


def test_recording_runs_nothing() -> None:
    x = torch.randn(1, 8, 4, 4)
    out = torch.full_like(x, 7.0)
    with recording(90) as seen:
        bn_silu.bn_silu_apply(x, None, None, torch.zeros(8), torch.ones(8), None, out, True)
    assert [launch.kernel for launch in seen] == ["bn_silu_apply_kernel"]
    assert (out == 7.0).all()
