"""What the launchers choose compiles for sm_80, sm_90 and sm_100, spills nothing, accesses 16 bytes at once."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from yolov9_fast.kernels import aot, cases  # noqa: E402
from yolov9_fast.kernels.launch import kernels, recording  # noqa: E402

CHILD = """
import sys, torch
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
"""


def test_representative_variants_compile_for_every_architecture_without_a_fault() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    built = [line for line in done.stdout.splitlines() if "sm_" in line]
    for architecture in aot.ARCHITECTURES:
        assert {line.split()[0] for line in built if f" sm_{architecture} " in line} == set(kernels)
    assert not [line for line in built if "FAULT" in line]


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
    assert (
        aot.Build(launch, 80, 32, 0, 200_000, 4, 0).faults()
        and not aot.Build(launch, 90, 32, 0, 200_000, 4, 0).faults()
    )
    assert "1 float64 instructions" in aot.Build(launch, 90, 32, 0, 0, 4, 1).faults()


def test_recording_runs_nothing() -> None:
    from yolov9_fast.kernels import bn_silu

    x = torch.randn(1, 8, 4, 4)
    out = torch.full_like(x, 7.0)
    with recording(90) as seen:
        bn_silu.bn_silu_apply(x, None, None, torch.zeros(8), torch.ones(8), None, out, True)
    assert [launch.kernel for launch in seen] == ["bn_silu_apply_kernel"] and (out == 7.0).all()
