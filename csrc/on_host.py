"""The CUDA wrappers and kernels of csrc/cuda, run by the host, in place of the CPU operators of the same names.

    python -m csrc.on_host [pytest arguments; default: the operators' tests that are not slow]

Each `.cu` file is translated (launches become calls, shared memory is registered) and compiled by the host's compiler
with the headers of csrc/cuda_on_host, AddressSanitizer and UndefinedBehaviorSanitizer; the first finding fails. The
tests run once with threads and blocks in ascending order and once shuffled (`YOLOV9_FAST_CUDA_SEED`).
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

from csrc import build, sanitize

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "cuda_on_host"
HEADERS = "cuda_on_host"


def translate(text: str, key: str = "CPU") -> str:
    """A `.cu` or `.cuh` file as C++ for the headers of csrc/cuda_on_host, for tensors of that dispatch key."""
    text = _with_calls(text)
    text = re.sub(
        r"__shared__ ([\w<>, ]+) (\w+);", r"static \1 \2_storage;\n  \1& \2 = cuda_on_host::shared(\2_storage);", text
    )
    text = text.replace("#pragma once\n", "")
    text = text.replace("torch::stable::accelerator::DeviceGuard", "cuda_on_host::DeviceGuard")
    if key == "CUDA":
        return text
    text = re.sub(r"([\w.\[\]]+)\.get_device_index\(\)", r"cuda_on_host::device_of(\1)", text)
    text = text.replace(".is_cuda()", ".is_cpu()")
    return re.sub(r"(LIBRARY_IMPL\(\w+), CUDA,", r"\1, CPU,", text)


def _with_calls(text: str) -> str:
    """`name<types><<<grid, threads, bytes, stream>>>(arguments)` as a call of `cuda_on_host::launch`."""
    written, start = [], 0
    for match in re.finditer(r"(\w+)(<[^<>;()]*>)?<<<", text):
        if match.start() < start:
            raise ValueError(f"a launch within a launch: {match[0]}")
        end = text.index(">>>", match.end())
        opening = text.index("(", end)
        closing = _closing(text, opening)
        grid, threads, size, stream = _parts(text[match.end() : end])
        kernel, arguments = match[1] + (match[2] or ""), text[opening + 1 : closing]
        written += [
            text[start : match.start()],
            f'cuda_on_host::launch("{match[1]}", {grid}, {threads}, {size}, {stream}, '
            f"[&] {{ {kernel}({arguments}); }})",
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


def build_on_host(
    source: Path = ROOT / "csrc", folder: Path = FOLDER, key: str = "CPU", sanitizers: str = sanitize.SANITIZERS
) -> Path:
    """`_C_cpu.so` with the CUDA operators, for CPU tensors, under sanitizers; `RuntimeError` says why there is none.

    With `key="CUDA"` it is `_C_cuda.so`, for tensors of a simulated device.
    """
    scratch = folder / "objects"
    (folder / "source").mkdir(parents=True, exist_ok=True)
    shared = (source / "cuda" / "stream.cuh").read_text()
    translated = []
    for path in sorted((source / "cuda").glob("*.cu")):
        translated.append(folder / "source" / f"{path.stem}.cpp")
        _write(translated[-1], translate(path.read_text().replace('#include "cuda/stream.cuh"\n', shared), key))
    before = os.environ.get("YOLOV9_FAST_SANITIZE")
    os.environ["YOLOV9_FAST_SANITIZE"] = sanitizers
    try:
        torch = build.find_torch()
        recipe = build.cpu_recipe(torch)
    except build.Unbuildable as error:
        raise RuntimeError(f"no operators of CUDA on the host: {error}") from error
    finally:
        if before is None:
            del os.environ["YOLOV9_FAST_SANITIZE"]
        else:
            os.environ["YOLOV9_FAST_SANITIZE"] = before
    headers = sorted((source / HEADERS).rglob("*.h"))
    version = hashlib.sha256(b"".join(path.read_bytes() for path in headers)).hexdigest()[:16]
    flags = [f"-I{source / HEADERS}", "-include", "new_empty.h", "-Wno-unknown-pragmas", f"-DYF_HEADERS={version}"]
    on_host = build.Recipe(recipe.compiler, [*flags, *recipe.compile_flags], recipe.link_flags)
    library = folder / f"_C_{key.lower()}.so"
    try:
        build.compile_and_link(
            on_host, [*translated, source / HEADERS / "runtime.cpp"], source, library, scratch, torch
        )
    except build.Unbuildable as error:
        raise RuntimeError(f"no operators of CUDA on the host: {error}") from error
    return folder


def _write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def main(arguments: list[str]) -> int:
    folder = build_on_host()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(arguments or default_tests())]
    environment = sanitize.environment(folder)
    codes = [
        subprocess.run(command, cwd=ROOT, env={**environment, "YOLOV9_FAST_CUDA_SEED": seed}).returncode
        for seed in ("0", "1")
    ]
    return max(codes)


def default_tests() -> list[str]:
    """The tests of every operator that has a CUDA file, as `sanitize.default_tests`."""
    names = {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    files = [
        path for path in sorted((ROOT / "tests" / "ops").glob("test_*.py")) if sanitize.of_operator(path.stem, names)
    ]
    # An index out of range is an error of the CPU's operator; a GPU would have to wait for it.
    return [*map(str, files), "-m", "not slow and not gpu", "-k", "not opcheck and not is_an_error_on_the_cpu"]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
