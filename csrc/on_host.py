"""The CUDA wrappers and kernels of csrc/cuda, run by the host, in place of the CPU operators of the same names.

    python -m csrc.on_host [--quick] [pytest arguments; default: every operator's tests]

Each `.cu` file is translated (launches become calls, shared memory is registered) and compiled by the host's compiler
with the headers of csrc/cuda_on_host, twice; the first finding fails:

    address    AddressSanitizer and UndefinedBehaviorSanitizer
    accesses   every read and write of a kernel is looked at: races, shared memory that nobody has written, memory of
               no checked tensor (csrc/cuda_on_host/accesses.cpp), and UndefinedBehaviorSanitizer

`--quick` runs one case of each test, without those that launch for long. At the end there is the number of tests that
launched kernels; in a run without pytest's arguments a kernel that nothing launched fails.

Threads and blocks run in shuffled orders. `YOLOV9_FAST_CUDA_SEEDS` (such as "0,1,2,3"; 0: ascending) runs the tests in
both builds with each of these orders; by default each build has one of its own.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from csrc import build, sanitize

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "cuda_on_host"
HEADERS = ROOT / "csrc" / "cuda_on_host"
SANITIZERS = {"address": sanitize.SANITIZERS, "accesses": "undefined", "simulated": ""}
SEEDS = {"address": "1", "accesses": "2"}
OTHER_BACKENDS = {"eager", "emulated", "triton", "cuda"}
LONG = (
    "gradcheck|finite_differences|five_thousand|full_size|number_of_threads|random_cases|larger_cases|greedy_loop|float64"
    "|emulated|ground_truths|opcheck|one_graph|compiled_files|environment_variable"
)


def translate(text: str, key: str = "CPU") -> str:
    """A `.cu` or `.cuh` file as C++ for the headers of csrc/cuda_on_host, for tensors of that dispatch key.

    Raises `ValueError` for what the headers do not know.
    """
    text = _with_calls(text)
    text = re.sub(
        r"extern __shared__ ([\w: ]+?) (\w+)\[\];",
        r"\1* \2 = static_cast<\1*>(cuda_on_host::dynamic_shared_memory());",
        text,
    )
    text = re.sub(
        r"__shared__ (\w[\w: ]*?(?:<[^<>;]*>)?) (\w+)((?:\[[^\]]*\])*);",
        r"static \1 \2_storage\3;\n  auto& \2 = cuda_on_host::shared(\2_storage);",
        text,
    )
    if "__shared__" in text:
        raise ValueError(f"shared memory in a form that is not known: {text[text.index('__shared__') :][:80]!r}")
    text = re.sub(r"cudaFuncSetAttribute\(\s*(\w+)(?:<[^;]*>)?,", r'cuda_on_host::set_attribute("\1",', text)
    text = text.replace("#pragma once\n", "")
    text = text.replace("torch::stable::accelerator::DeviceGuard", "cuda_on_host::DeviceGuard")
    if key == "CUDA":
        return text
    text = re.sub(r"([\w.\[\]]+)\.get_device_index\(\)", r"cuda_on_host::device_of(\1)", text)
    text = text.replace(".is_cuda()", ".is_cpu()")
    return re.sub(r"(LIBRARY_IMPL\(\w+), CUDA,", r"\1, CPU,", text)


def _with_calls(text: str) -> str:
    """`name<types><<<grid, threads, bytes, stream>>>(arguments)` as a call of `cuda_on_host::launch`."""
    bounds = re.findall(r"__launch_bounds__\(([^(),]+)[^()]*\)\s+(\w+)\(", text)
    most_threads = {kernel: threads for threads, kernel in bounds}
    written, start = [], 0
    for match in re.finditer(r"(\w+)(<[^<>;()]*>)?<<<", text):
        if match.start() < start:
            raise ValueError(f"a launch within a launch: {match[0]}")
        end = text.index(">>>", match.end())
        opening = text.index("(", end)
        closing = _closing(text, opening)
        how = ", ".join(_parts(text[match.end() : end]))
        kernel = match[1] + (match[2] or "")
        arguments = f", {text[opening + 1 : closing]}" if text[opening + 1 : closing].strip() else ""
        written += [
            text[start : match.start()],
            f'cuda_on_host::launch({{"{match[1]}", {most_threads.get(match[1], "1024")}, {how}}}, '
            f"[](auto... given) {{ {kernel}(given...); }}{arguments})",
        ]
        start = closing + 1
    return "".join([*written, text[start:]])


def _closing(text: str, opening: int) -> int:
    depth = 0
    for place in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise ValueError("a parenthesis that is never closed")


def _parts(text: str) -> list[str]:
    """The four arguments between <<< and >>>."""
    parts, depth = [""], 0
    for character in text:
        depth += {"(": 1, "{": 1, ")": -1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    if len(parts) != 4:
        raise ValueError(f"expected <<<grid, threads, bytes, stream>>>, got <<<{text}>>>")
    return [part.strip() for part in parts]


def build_on_host(kind: str = "address", source: Path = ROOT / "csrc", folder: Path = FOLDER) -> Path:
    """`_C_cpu.so` with the CUDA operators, for CPU tensors; `kind` is "address" or "accesses", as above.

    With "simulated" it is `_C_cuda.so` in `folder`, for tensors of a simulated device, without sanitizers.

    Returns the folder in which it is; `RuntimeError` says why there is none. Compiles only what changed.
    """
    simulated = kind == "simulated"
    key, output = ("CUDA", folder) if simulated else ("CPU", folder / kind)
    for path in (folder / "source", output, FOLDER / kind):
        path.mkdir(parents=True, exist_ok=True)
    shared = (source / "cuda" / "stream.cuh").read_text()
    with (FOLDER / "lock").open("w") as lock:  # other processes may build too
        fcntl.flock(lock, fcntl.LOCK_EX)
        translated = []
        for path in sorted((source / "cuda").glob("*.cu")):
            translated.append(folder / "source" / f"{path.stem}.cpp")
            _write(translated[-1], translate(path.read_text().replace('#include "cuda/stream.cuh"\n', shared), key))
        try:
            torch = build.find_torch()
            runtime, plain, sanitizers = _build_runtime(kind, torch)
            calls = ["-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"] if kind == "accesses" else []
            flags = ["-include", "tensors.h", "-Wno-unknown-pragmas", *plain.compile_flags, *sanitizers, *calls]
            kernels = build.Recipe(
                plain.compiler,
                [*_headers(), *flags],
                [*sanitizers[:1], *plain.link_flags, str(runtime), f"-Wl,-rpath,{runtime.parent}"],
            )
            objects = folder / "objects" / kind
            build.compile_and_link(kernels, translated, source, output / f"_C_{key.lower()}.so", objects, torch)
        except build.Unbuildable as error:
            raise RuntimeError(f"no operators of CUDA on the host: {error}") from error
    return output


def _headers() -> list[str]:
    """The folder of headers; with what is in them, so that everything is compiled again when one has changed."""
    content = b"".join(path.read_bytes() for path in sorted(HEADERS.glob("*.h")))
    return [f"-I{HEADERS}", f"-DYF_HEADERS={hashlib.sha256(content).hexdigest()[:16]}"]


def _build_runtime(kind: str, torch: build.Torch) -> tuple[Path, build.Recipe, list[str]]:
    """The library of fibres and launches, the flags without sanitizers, and those of the sanitizers."""
    sanitizers = build.sanitizer_flags(SANITIZERS[kind])
    plain = _plain_recipe(torch)
    flags = [*_headers(), *plain.compile_flags, *sanitizers, "-fvisibility=default"]
    recipe = build.Recipe(plain.compiler, flags, [*sanitizers[:1], *plain.link_flags, "-ldl"])
    files = [HEADERS / "runtime.cpp", *([HEADERS / "accesses.cpp"] if kind == "accesses" else [])]
    library = FOLDER / kind / "libcuda_on_host.so"
    build.compile_and_link(recipe, files, HEADERS, library, FOLDER / "objects" / kind, torch)
    return library, plain, sanitizers


def _plain_recipe(torch: build.Torch) -> build.Recipe:
    """That of the CPU operators, without sanitizers."""
    asked = os.environ.pop("YOLOV9_FAST_SANITIZE", None)
    try:
        return build.cpu_recipe(torch)
    finally:
        if asked is not None:
            os.environ["YOLOV9_FAST_SANITIZE"] = asked


def _write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def environment(kind: str, folder: Path, seed: str) -> dict[str, str]:
    """For a process that uses the library of `build_on_host(kind)`."""
    found = sanitize.environment(folder)
    if kind == "accesses":
        found.pop("LD_PRELOAD")
    return {**found, "YOLOV9_FAST_CUDA_SEED": seed}


def take_launches() -> list[str]:
    """The kernels launched since the last call; none in a process that does not use the library of `build_on_host`."""
    path = Path(os.environ.get("YOLOV9_FAST_LIBRARY_FOLDER", ""), "libcuda_on_host.so")
    if not path.exists():
        return []
    library = ctypes.CDLL(str(path))
    library.cuda_on_host_take_launches.restype = ctypes.c_char_p
    return [line.split()[0] for line in library.cuda_on_host_take_launches().decode().splitlines()]


def main(arguments: list[str]) -> int:
    given = [each for each in arguments if each != "--quick"]
    seeds = os.environ.get("YOLOV9_FAST_CUDA_SEEDS")
    runs = [(kind, seed) for kind in SEEDS for seed in seeds.split(",")] if seeds else list(SEEDS.items())
    command = [*sanitize.PYTEST, "-p", "csrc.on_host", *arguments]
    command += [] if given else ["--every-kernel", *default_tests()]
    codes = []
    for kind, seed in runs:
        print(f"{kind}, order {seed}", flush=True)
        codes.append(subprocess.run(command, cwd=ROOT, env=environment(kind, build_on_host(kind), seed)).returncode)
    return max(codes)


def default_tests() -> list[str]:
    """The files with tests of an operator that has a CUDA file."""
    files = sorted((ROOT / "tests" / "ops").glob("test_*.py"))
    found = [path for path in files if _is_of_an_operator(path) or _calls_an_operator(path.read_text())]
    return [*map(str, found), "-m", "not gpu"]


def _operators() -> set[str]:
    return {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")}


def _is_of_an_operator(path: Path) -> bool:
    return sanitize.of_operator(path.stem, _operators())


def _calls_an_operator(text: str) -> bool:
    return re.search(rf"\bops\.({'|'.join(_operators())})\w*\(", text) is not None


# ---- as a plugin of pytest


def pytest_addoption(parser: Any) -> None:
    group = parser.getgroup("CUDA on the host")
    group.addoption("--quick", action="store_true", help="one case of each test, without long ones")
    group.addoption("--every-kernel", action="store_true", help="fail if a kernel is never launched")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Without cases of other backends, and of files that are not an operator's without tests that call none."""
    kept, seen = [], set()
    for item in items:
        function = (item.path, item.function.__qualname__)
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        other = any(isinstance(value, str) and value in OTHER_BACKENDS for value in values)
        calls = _is_of_an_operator(item.path) or _calls_an_operator(inspect.getsource(item.function))
        left_out = config.getoption("quick") and (function in seen or re.search(LONG, function[1]))
        if not other and calls and not left_out:
            seen.add(function)
            kept.append(item)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


_launched: dict[str, list[str]] = {}
"""The kernels that each test launched."""


def pytest_runtest_teardown(item: Any) -> None:
    _launched[item.nodeid] = take_launches()


def pytest_sessionfinish(session: Any) -> None:
    kernels = [kernel for of_test in _launched.values() for kernel in of_test]
    texts = [path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cu")]
    every = {name for text in texts for name in re.findall(r"(\w+)(?:<[^<>;()]*>)?<<<", text)}
    tests = sum(map(bool, _launched.values()))
    print(f"\n{tests} tests: {len(kernels)} launches of {len(set(kernels))} kernels of {len(every)}")
    missing = sorted(every - set(kernels))
    if missing and session.config.getoption("every_kernel"):
        print(f"never launched: {', '.join(missing)}")
        session.exitstatus = 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
