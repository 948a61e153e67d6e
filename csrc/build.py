"""The one build recipe of the compiled operators: sources, flags, CUDA architectures, jobs.

`_C_cpu.so` and `_C_cuda.so` are plain shared libraries against PyTorch's stable ABI: they link no Python and serve
every torch from 2.10 on. A missing tool is no error; the reason is written to `_build_info.json` next to the libraries.

    YOLOV9_FAST_SKIP_EXT=1      compile nothing
    YOLOV9_FAST_SKIP_CUDA=1     compile the CPU part only
    YOLOV9_FAST_FORCE_CUDA=1    compile CUDA although torch was built for another CUDA major version
    YOLOV9_FAST_PORTABLE=1      for any CPU of this architecture, not only those with the vector units of this one
    YOLOV9_FAST_SANITIZE        such as "address,undefined": instrument the CPU part, as csrc/sanitize.py does
    YOLOV9_FAST_CUDA_ARCHS      such as "8.0;9.0+PTX"; default: what nvcc knows of DEFAULT_ARCHS, PTX of the newest
    MAX_JOBS                    compilers at a time; default cores / 2, at least 2 of 2, with 5 GB of free memory each
    CXX, CUDA_HOME              the compiler (default c++) and the CUDA toolkit (default: the one of the nvcc on PATH)
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

INFO_NAME = "_build_info.json"
DEFAULT_ARCHS = ("8.0", "9.0", "10.0")
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# Contraction off: assign and nms promise the same bits on every backend, and a contracted a*b+c differs from eager's.
# Without traps and errno, values stay the same and a division may move across a branch, so that loops vectorise.
CXX_MATH = ("-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno")
CXX_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", *CXX_MATH, STABLE_ABI)
CUDA_FLAGS = ("-O3", "-std=c++20", "--fmad=false", "-Xptxas=-v", "-Xcompiler=-fPIC,-fvisibility=hidden", STABLE_ABI)


class Unbuildable(Exception):
    """Why a part cannot be built here; the text is shown to the user."""

    def __init__(self, reason: str, log: str = "") -> None:
        super().__init__(reason)
        self.log = log


@dataclass
class Part:
    """One library: its file name if it was built, else the reason."""

    file: str | None = None
    reason: str | None = None
    compiler: str | None = None
    flags: list[str] = field(default_factory=list)
    log: str = ""
    kernels: list[dict[str, str | int]] = field(default_factory=list)
    """Of a CUDA part: the report of ptxas for each kernel and architecture, as `kernel_report` returns it."""


@dataclass(frozen=True)
class Torch:
    """Where the installed torch keeps its headers and libraries."""

    version: str
    cuda: str | None
    include: list[str]
    lib: Path


@dataclass(frozen=True)
class Recipe:
    """How to compile the sources of one part and link them."""

    compiler: list[str]
    compile_flags: list[str]
    link_flags: list[str]


def build(source: Path, output: Path, scratch: Path) -> list[Path]:
    """Compile `source` (csrc/) into the package folder `output`; returns the files written, `_build_info.json` last."""
    torch: Torch | None = None
    parts = {"cpu": Part(), "cuda": Part()}
    try:
        if flag("YOLOV9_FAST_SKIP_EXT"):
            raise Unbuildable("YOLOV9_FAST_SKIP_EXT=1")
        torch = find_torch()
    except Unbuildable as error:
        parts = {name: Part(reason=str(error)) for name in parts}
    else:
        parts["cpu"] = build_part("cpu", "*.cpp", cpu_recipe, torch, source, output, scratch)
        parts["cuda"] = build_part("cuda", "*.cu", cuda_recipe, torch, source, output, scratch)
    written = []
    for name, part in parts.items():
        library = output / f"_C_{name}.so"
        if part.file is None:
            library.unlink(missing_ok=True)
            print(
                f"yolov9_fast: {name} operators not compiled ({part.reason}); the package works without",
                file=sys.stderr,
            )
        else:
            written.append(library)
    info = {
        "torch": torch.version if torch else None,
        "machine": platform.machine(),
        "portable": flag("YOLOV9_FAST_PORTABLE"),
        "cpu_features": [] if flag("YOLOV9_FAST_PORTABLE") else cpu_features(),
        "parts": {name: asdict(part) for name, part in parts.items()},
    }
    path = output / INFO_NAME
    path.write_text(json.dumps(info, indent=2) + "\n")
    return [*written, path]


def build_part(
    name: str,
    pattern: str,
    find_recipe: Callable[[Torch], Recipe],
    torch: Torch,
    source: Path,
    output: Path,
    scratch: Path,
) -> Part:
    """Compile `csrc/NAME/PATTERN` and link `_C_NAME.so` into `output`, or give the reason why not."""
    try:
        recipe = find_recipe(torch)
        sources = sorted((source / name).glob(pattern))
        library = output / f"_C_{name}.so"
        logs = compile_and_link(recipe, sources, source, library, scratch / name, torch)
    except Unbuildable as error:
        return Part(reason=str(error), log=error.log)
    return Part(
        file=library.name,
        compiler=version_line(recipe.compiler),
        flags=public_flags(recipe.compile_flags),
        kernels=[row for file, text in logs.items() for row in kernel_report(file, text)],
    )


def build_emulated(source: Path, output: Path, scratch: Path) -> Part:
    """Build `_C_emulated.so`, CUDA's block algorithms run by the host, into `output`: for tests, never installed."""
    try:
        torch = find_torch()
    except Unbuildable as error:
        return Part(reason=str(error))
    return build_part("emulated", "*.cpp", cpu_recipe, torch, source, output, scratch)


def compile_and_link(
    recipe: Recipe, sources: Sequence[Path], root: Path, library: Path, scratch: Path, torch: Torch
) -> dict[str, str]:
    """Compile what changed since the last call (by content) and link, replacing `library` in one step.

    Returns the compiler's messages by source file; they are stored next to the objects.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    settings = repr((recipe, version_line(recipe.compiler), torch.version)).encode()

    def compile_one(path: Path) -> Path:
        key = hashlib.sha256(settings)
        for file in sorted({path, *headers_of(path, root)}):
            key.update(file.read_bytes())
        compiled = scratch / f"{path.stem}-{key.hexdigest()[:16]}.o"
        if not compiled.exists():
            partial = compiled.with_suffix(".part.o")
            command = [*recipe.compiler, *recipe.compile_flags, f"-I{root}", "-c", str(path), "-o", str(partial)]
            compiled.with_suffix(".log").write_text(run(command, path.name, with_messages=True))
            partial.replace(compiled)
        return compiled

    with ThreadPoolExecutor(max_jobs()) as pool:
        objects = list(pool.map(compile_one, sources))
    partial = library.with_suffix(".part.so")
    run([*recipe.compiler, "-shared", *map(str, objects), "-o", str(partial), *recipe.link_flags], library.name)
    partial.replace(library)
    logs = (compiled.with_suffix(".log") for compiled in objects)
    return {path.name: log.read_text() for path, log in zip(sources, logs, strict=True) if log.exists()}


def headers_of(path: Path, root: Path) -> set[Path]:
    """The headers below `root` that `path` includes with quotes, directly or through others."""
    found: set[Path] = set()
    waiting = [path]
    while waiting:
        names = re.findall(r'^#include "(.+)"', waiting.pop().read_text(), re.MULTILINE)
        new = {root / name for name in names if (root / name).exists()} - found
        found |= new
        waiting += new
    return found


def kernel_report(file: str, log: str) -> list[dict[str, str | int]]:
    """From the messages of `ptxas -v`: file, kernel (mangled), arch, registers, stack and spills in bytes."""
    rows: list[dict[str, str | int]] = []
    for block in re.split(r"(?=ptxas info\s*: Compiling entry function)", log)[1:]:
        name = re.match(r"ptxas info\s*: Compiling entry function '(\w+)' for '(\w+)'", block)
        memory = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block)
        registers = re.search(r"Used (\d+) registers", block)
        if name and memory and registers:
            stack, stores, loads = map(int, memory.groups())
            rows.append(
                {
                    "file": file,
                    "kernel": name.group(1),
                    "arch": name.group(2),
                    "registers": int(registers.group(1)),
                    "stack": stack,
                    "spill_stores": stores,
                    "spill_loads": loads,
                }
            )
    return rows


def cpu_recipe(torch: Torch) -> Recipe:
    """Flags for csrc/cpu/*.cpp: this machine's vector width unless YOLOV9_FAST_PORTABLE=1."""
    native = [] if flag("YOLOV9_FAST_PORTABLE") else ["-march=native"]
    sanitize = sanitizer_flags(os.environ.get("YOLOV9_FAST_SANITIZE", ""))
    return Recipe(
        find_cxx(),
        [*CXX_FLAGS, *native, *sanitize, *(f"-isystem{folder}" for folder in torch.include)],
        [*sanitize[:1], *link_flags(torch, "")],
    )


def sanitizer_flags(names: str) -> list[str]:
    """For YOLOV9_FAST_SANITIZE: the first finding ends the process, with line numbers, which need -O1."""
    if not names.strip():
        return []
    if not re.fullmatch(r"[a-z-]+(,[a-z-]+)*", names.strip()):
        raise Unbuildable(f"YOLOV9_FAST_SANITIZE={names!r}: expected names such as address,undefined")
    return [f"-fsanitize={names.strip()}", "-fno-sanitize-recover=all", "-O1", "-g", "-fno-omit-frame-pointer"]


def cuda_recipe(torch: Torch) -> Recipe:
    """Flags for csrc/cuda/*.cu: for any torch, even one for CPUs; static cudart, so that loading needs no CUDA."""
    if flag("YOLOV9_FAST_SKIP_CUDA"):
        raise Unbuildable("YOLOV9_FAST_SKIP_CUDA=1")
    nvcc = find_nvcc()
    match = re.search(r"release (\d+)\.", run([nvcc, "--version"], "nvcc"))
    major = match.group(1) if match else "unknown"
    if torch.cuda and torch.cuda.split(".")[0] != major and not flag("YOLOV9_FAST_FORCE_CUDA"):
        raise Unbuildable(
            f"nvcc is of CUDA {major}, torch of CUDA {torch.cuda}; YOLOV9_FAST_FORCE_CUDA=1 compiles anyway"
        )
    archs = architecture_flags(nvcc)
    include = [f"-isystem={folder}" for folder in torch.include]
    return Recipe(
        [nvcc, "-ccbin", find_cxx()[0]],
        [*CUDA_FLAGS, f"--threads={min(4, os.cpu_count() or 1)}", *archs, *include],
        ["-cudart=static", *archs, *link_flags(torch, "-Xlinker=")],
    )


def link_flags(torch: Torch, prefix: str) -> list[str]:
    """libtorch.so is linked although no symbol of it is used: in a CUDA torch it loads libtorch_cuda."""
    if sys.platform == "darwin":
        return ["-undefined", "dynamic_lookup"]
    keep = f"{prefix}--no-as-needed" if prefix else "-Wl,--no-as-needed"
    return [f"-L{torch.lib}", keep, "-ltorch", "-ltorch_cpu"]


def architecture_flags(nvcc: str) -> list[str]:
    """-gencode flags from YOLOV9_FAST_CUDA_ARCHS, or for those default architectures that this nvcc knows."""
    known = set(re.findall(r"compute_(\d+)", run([nvcc, "--list-gpu-arch"], "nvcc")))
    asked = os.environ.get("YOLOV9_FAST_CUDA_ARCHS", "")
    names = [name for name in re.split(r"[;,\s]+", asked) if name]
    if not names:
        names = [name for name in DEFAULT_ARCHS if name.replace(".", "") in known]
        if not names:
            raise Unbuildable(f"nvcc knows none of {', '.join(DEFAULT_ARCHS)}; set YOLOV9_FAST_CUDA_ARCHS")
        names[-1] += "+PTX"
    flags = []
    for name in names:
        number = name.removesuffix("+PTX").replace(".", "")
        if not re.fullmatch(r"\d+[a-z]?", number):
            raise Unbuildable(f"YOLOV9_FAST_CUDA_ARCHS={asked!r}: {name!r} is no architecture such as 9.0 or 9.0+PTX")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def find_torch() -> Torch:
    try:
        import torch
    except Exception as error:
        raise Unbuildable(
            f"torch cannot be imported while building ({error}): install torch, then this with --no-build-isolation"
        ) from error
    folder = Path(torch.__file__).parent
    headers = [folder / "include", folder / "include" / "torch" / "csrc" / "api" / "include"]
    if not (headers[0] / "torch" / "csrc" / "stable" / "library.h").exists():
        raise Unbuildable(f"torch {torch.__version__} has no stable ABI headers; torch >= 2.10 has")
    return Torch(torch.__version__, torch.version.cuda, [str(path) for path in headers], folder / "lib")


def find_cxx() -> list[str]:
    asked = shlex.split(os.environ.get("CXX", ""))
    for candidate in [asked] if asked else [["c++"], ["g++"], ["clang++"]]:
        path = shutil.which(candidate[0])
        if path:
            return [path, *candidate[1:]]
    raise Unbuildable(f"no C++ compiler: {' '.join(asked) or 'c++, g++, clang++'} not found on PATH")


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else None
    path = path or shutil.which("nvcc")
    if path is None:
        raise Unbuildable("no nvcc on PATH or in CUDA_HOME")
    return path


def run(command: list[str], what: str, with_messages: bool = False) -> str:
    """Standard output (and error) of `command`; a failure is an `Unbuildable` with the compiler's messages."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise Unbuildable(f"{command[0]} cannot be run: {error}") from error
    if done.returncode != 0:
        log = f"{shlex.join(command)}\n{done.stderr or done.stdout}"
        print(log, file=sys.stderr)
        raise Unbuildable(f"{Path(command[0]).name} failed on {what} with exit code {done.returncode}", log[:4000])
    return done.stdout + done.stderr if with_messages else done.stdout


def version_line(compiler: list[str]) -> str:
    lines = [line for line in run([compiler[0], "--version"], compiler[0]).splitlines() if line.strip()]
    chosen = [line for line in lines if "release" in line] or lines[:1]
    return chosen[0] if chosen else compiler[0]


def public_flags(flags: Sequence[str]) -> list[str]:
    """The flags that decide the result: all but the include folders."""
    return [text for text in flags if not text.startswith("-isystem")]


def flag(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() not in ("", "0", "false", "no", "off")


def max_jobs() -> int:
    asked = os.environ.get("MAX_JOBS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    cores = os.cpu_count() or 1
    jobs = max(min(cores, 2), cores // 2)  # nvcc starts threads of its own
    memory = Path("/proc/meminfo")
    if memory.exists():
        match = re.search(r"MemAvailable:\s+(\d+) kB", memory.read_text())
        if match:
            jobs = min(jobs, int(match.group(1)) // 5_000_000)
    return max(1, jobs)


def cpu_features() -> list[str]:
    """Vector extensions of this machine, which `-march=native` may use and a machine that loads the result needs."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return []
    match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", path.read_text(), re.MULTILINE)
    words = match.group(1).split() if match else []
    return sorted(word for word in words if re.match(r"avx|amx|fma|f16c|bmi|sse|sve|asimd", word))
