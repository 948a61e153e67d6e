"""Ahead-of-time builds without a GPU: every variant of every kernel that the launchers choose, compiled and examined.

`python -m yolov9_fast.kernels.aot [--all] [--arch 90]` prints one table. The list is what the launchers themselves
launch for `cases`, noted instead of run, and what the tuner may make them launch; so it follows their tables.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from yolov9_fast.kernels import cases, config, tune
from yolov9_fast.kernels.launch import INTERPRETED, Launch, kernels, recording

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Shared memory of one program in bytes (CUDA C++ Programming Guide, specifications per compute capability)."""
_WIDE = re.compile(
    r"(?:ld|st)\.global[.\w:]*\.(?:v4\.(?:b32|f32|u32)|v2\.(?:b64|f64|u64))|cp\.async\.cg|cp\.async\.bulk"
)
_DOUBLE = re.compile(r"\b(?:add|sub|mul|fma|div|mad|rcp|sqrt|cvt)\.[\w.]*f64\b")


@dataclass(frozen=True)
class Build:
    """What one variant became on one architecture; memory in bytes."""

    launch: Launch
    architecture: int
    registers: int
    spilled: int
    shared: int
    wide: int
    double: int

    @property
    def must_be_wide(self) -> bool:
        """Whether 16-byte accesses are expected: a streaming kernel where addresses and strides allow them.

        Not of the single-pass kernels on contiguous maps: their rows run through all images, and the division that
        finds a row's image hides from the compiler that pixels are contiguous.
        """
        constants = dict(self.launch.constants)
        visible = constants.get("LAST") or "_single_pass_" not in self.launch.kernel
        return kernels[self.launch.kernel].streams and constants.get("VEC", 1) > 1 and bool(visible)

    def faults(self) -> list[str]:
        found = []
        if self.spilled:
            found.append(f"spills {self.spilled} bytes")
        if self.shared > SHARED_LIMIT[self.architecture]:
            found.append(f"{self.shared} bytes of shared memory, limit {SHARED_LIMIT[self.architecture]}")
        if self.must_be_wide and not self.wide:
            found.append("no 16-byte access")
        if self.double:
            found.append(f"{self.double} float64 instructions")
        return found


def launches(
    architecture: int,
    shapes: Iterable[tuple[int, int, int, int]],
    dtypes: Iterable[torch.dtype] = cases.DTYPES,
    layouts: Iterable[torch.memory_format] = cases.LAYOUTS,
) -> dict[tuple[object, ...], Launch]:
    """What the launchers launch for maps of these shapes, by `key`, in order of first appearance."""
    with recording(architecture) as seen:
        dtypes, layouts = tuple(dtypes), tuple(layouts)
        for shape in shapes:
            for dtype in dtypes:
                for layout in layouts:
                    cases.call_all(shape, dtype, layout)
    return {key(launch): launch for launch in reversed(seen)}


def tuned(architecture: int) -> dict[tuple[object, ...], Launch]:
    """What the launchers launch under every record that the tuner may write, for the maps that it times."""
    with recording(architecture) as seen:
        for dtype in tune.DTYPES:
            for shape in tune.SHAPES:
                for name, call in tune.calls(shape, dtype, "meta").items():
                    for choice in config.candidates(name):
                        with config.forced(name, tune.bucket_of(shape, dtype), choice):
                            call()
    return {key(launch): launch for launch in reversed(seen)}


def everything(architecture: int) -> list[Launch]:
    """Every variant that a launcher can choose, by kernel."""
    found = launches(architecture, (*cases.TYPICAL, *cases.EVERY)) | tuned(architecture)
    return sorted(found.values(), key=lambda launch: launch.kernel)


def key(launch: Launch) -> tuple[object, ...]:
    """What makes a variant; not which pointers happen to be aligned (the kernel relies on VEC alone)."""
    return launch.kernel, launch.signature, launch.constants, launch.warps, launch.stages, launch.registers


def build(launch: Launch, architecture: int) -> Build:
    """Compile one variant, for any GPU of this compute capability; needs none."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if INTERPRETED:
        raise RuntimeError("unset TRITON_INTERPRET to compile kernels: it was set when triton was imported")
    wrapped = kernels[launch.kernel]
    names = wrapped.function.arg_names
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned}
    source = ASTSource(wrapped.function, dict(launch.signature), dict(launch.constants), attributes)
    target = GPUTarget("cuda", architecture, 32)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "maxnreg": launch.registers}
    compiled = triton.compile(source, target=target, options=options)
    ptx = compiled.asm["ptx"]
    registers, spilled = _resources(compiled.asm["cubin"], ptx, architecture)
    return Build(
        launch,
        architecture,
        registers,
        spilled,
        compiled.metadata.shared,
        len(_WIDE.findall(ptx)),
        len(_DOUBLE.findall(ptx)),
    )


def _resources(cubin: bytes, ptx: str, architecture: int) -> tuple[int, int]:
    """Registers of a thread, and bytes that it spills: ptxas is asked for them only where there is a stack.

    A kernel of ours has nothing else to put there, so the stack is what counts if ptxas has another view.
    """
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _output([tools / "cuobjdump", "-res-usage", path])))
        if not int(found["STACK"]) + int(found["LOCAL"]):
            return int(found["REG"]), 0
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        name = re.search(r"\.target (sm_\w+)", ptx)
        assert name is not None
        ptxas = tools / ("ptxas-blackwell" if architecture >= 100 else "ptxas")
        # As Triton calls it: other options would assemble another kernel.
        options = ["-v", "-lineinfo", "--regAllocOptLevel=2"]
        text = _output([ptxas, *options, f"-arch={name.group(1)}", source, "-o", path])
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", text)))
        return int(found["REG"]), spilled or int(found["STACK"]) + int(found["LOCAL"])


def _output(command: list[str | Path]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def table(builds: Iterable[Build]) -> Iterator[str]:
    """Lines of text, one per build, as they come."""
    yield f"{'kernel':40}{'arch':>6}{'dtype':>7}{'registers':>10}{'spilled':>8}{'shared':>8}{'16-byte':>8}  constants"
    for made in builds:
        launch = made.launch
        dtype = next(kind.lstrip("*") for _, kind in launch.signature if kind.startswith("*"))
        shown = [f"{name}={value}" for name, value in launch.constants if value is not None] + [f"warps={launch.warps}"]
        line = (
            f"{launch.kernel:40}{'sm_' + str(made.architecture):>6}{dtype:>7}{made.registers:10}{made.spilled:8}"
            f"{made.shared:8}{made.wide:8}  {' '.join(shown)}"
        )
        faults = made.faults()
        yield line + (f"  FAULT: {'; '.join(faults)}" if faults else "")


def summary(builds: Iterable[Build]) -> Iterator[str]:
    """Lines of text: one a kernel, from its least to its most demanding variant, and the total.

    `16-byte`: the fewest such accesses in the code of a variant of which they are expected.
    """
    by_kernel: dict[str, list[Build]] = {}
    for made in builds:
        by_kernel.setdefault(made.launch.kernel, []).append(made)
    yield (
        f"{'kernel':40}{'variants':>9}{'registers':>11}{'spilled':>9}{'shared':>15}{'expected wide':>15}{'16-byte':>9}"
        f"{'faults':>8}"
    )
    for name, ours in by_kernel.items():
        wide = [made.wide for made in ours if made.must_be_wide]
        registers = f"{min(made.registers for made in ours)}-{max(made.registers for made in ours)}"
        shared = f"{min(made.shared for made in ours)}-{max(made.shared for made in ours)}"
        yield (
            f"{name:40}{len(ours):9}{registers:>11}{max(made.spilled for made in ours):9}{shared:>15}{len(wide):15}"
            f"{min(wide) if wide else '-':>9}{sum(bool(made.faults()) for made in ours):8}"
        )
    total = [made for ours in by_kernel.values() for made in ours]
    yield f"{len(total)} variants, {sum(bool(made.faults()) for made in total)} faults"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="every variant, not only what most layers choose (long)")
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES, help="default: all of them")
    parser.add_argument("--kernel", metavar="TEXT", default="", help="only kernels whose name contains this")


def run(arguments: argparse.Namespace) -> int:
    """Build, print each and the summary; 1 when a variant has a fault."""
    done: list[Build] = []

    def builds() -> Iterator[Build]:
        for architecture in arguments.arch or ARCHITECTURES:
            typical = launches(architecture, cases.TYPICAL)
            wanted = everything(architecture) if arguments.all else list(typical.values())
            for launch in sorted(wanted, key=lambda one: one.kernel):
                if arguments.kernel in launch.kernel:
                    done.append(build(launch, architecture))
                    yield done[-1]

    for line in table(builds()):
        print(line, flush=True)
    print()
    print("\n".join(summary(done)))
    return 1 if any(made.faults() for made in done) else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    configure(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.exit(main())
