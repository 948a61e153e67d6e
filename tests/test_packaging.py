"""Installation: what sdist and wheel hold, and that no missing torch, compiler or nvcc stops them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from csrc import build as recipe

ROOT = Path(__file__).resolve().parent.parent
INGREDIENTS = (
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "LICENSE",
    "README.md",
    "Makefile",
    "csrc",
    "kernels",
    "bench",
)
HAS_COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what is packaged, so that building writes nothing into the repository."""
    copy = tmp_path / "tree"
    copy.mkdir()
    ignore = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__", "results")
    for name in (*INGREDIENTS, "yolov9_fast"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=ignore)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """Environment of a machine without torch, numpy or any program: nothing on PATH, and imports that fail."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for name in ("torch", "numpy"):
        (hidden / f"{name}.py").write_text(f"raise ImportError('No module named {name!r}')\n")
    (tmp_path / "no-programs").mkdir()
    return {"PATH": str(tmp_path / "no-programs"), "PYTHONPATH": str(hidden), "HOME": str(tmp_path)}


def make(hook: str, tree: Path, environment: dict[str, str]) -> Path:
    """Call one hook of the build backend as pip does, in its own process; returns the file or folder it made."""
    out = tree.parent / "out"
    out.mkdir(exist_ok=True)
    code = f"import sys; from setuptools import build_meta; print(build_meta.{hook}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=tree, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


def build_report(wheel: Path) -> dict[str, dict[str, str]]:
    with zipfile.ZipFile(wheel) as archive:
        report: dict[str, dict[str, str]] = json.loads(archive.read("yolov9_fast/_build_info.json"))["parts"]
    return report


def test_metadata_needs_neither_torch_nor_a_compiler(tree: Path, bare: dict[str, str]) -> None:
    folder = make("prepare_metadata_for_build_wheel", tree, bare)
    metadata = (folder / "METADATA").read_text()
    assert "Name: yolov9-fast\nVersion: 0.1.0\n" in metadata
    assert "Requires-Dist: torch>=2.10\n" in metadata
    assert "License-Expression: MIT\n" in metadata
    assert "yolov9-fast = yolov9_fast.cli.main:main" in (folder / "entry_points.txt").read_text()


def test_the_sdist_holds_all_sources_and_no_binary(tree: Path, bare: dict[str, str]) -> None:
    (tree / "yolov9_fast" / "_C_cpu.so").write_bytes(b"left by an install in place")
    sdist = make("build_sdist", tree, bare)
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {
        path.relative_to(tree).as_posix()
        for folder in ("csrc", "kernels", "bench", "yolov9_fast")
        for path in (tree / folder).rglob("*")
        if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh", ".yaml", ".sh")
    }
    assert wanted <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "Makefile"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc", "_build_info.json"))]


def test_a_wheel_without_torch_and_compiler_is_pure_and_says_why(tree: Path, bare: dict[str, str]) -> None:
    wheel = make("build_wheel", tree, bare)
    assert wheel.name == "yolov9_fast-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"yolov9_fast/ops/_box_iou.py", "yolov9_fast/kernels/__init__.py"} <= names
    assert {"yolov9_fast/bench/stats.py", "yolov9_fast/bench/counts.json"} <= names
    assert not [name for name in names if name.startswith("yolov9_fast/bench/test_")]
    graphs = {f"yolov9_fast/models/graphs/{path.name}" for path in (tree / "yolov9_fast/models/graphs").glob("*.yaml")}
    assert graphs
    assert graphs <= names
    assert not [
        name for name in names if name.startswith(("csrc", "tests", "kernels", "bench")) or name.endswith(".so")
    ]
    for part in build_report(wheel).values():
        assert part["file"] is None
        assert "torch cannot be imported" in part["reason"]


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"CXX": "/nowhere/c++"}, "no C++ compiler: /nowhere/c++ not found"),
        ({"CXX": "false"}, "exit code 1"),
        ({"YOLOV9_FAST_SKIP_EXT": "1"}, "YOLOV9_FAST_SKIP_EXT=1"),
    ],
)
def test_a_compiler_that_is_absent_or_fails_stops_nothing(tree: Path, variables: dict[str, str], reason: str) -> None:
    wheel = make("build_wheel", tree, {**os.environ, "YOLOV9_FAST_SKIP_CUDA": "1", **variables})
    assert wheel.name.endswith("py3-none-any.whl")
    assert reason in build_report(wheel)["cpu"]["reason"]


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
def test_a_compiled_wheel_serves_every_python_and_loads(tree: Path) -> None:
    environment = {**os.environ, "YOLOV9_FAST_SKIP_CUDA": "1", "YOLOV9_FAST_PORTABLE": "1"}
    wheel = make("build_wheel", tree, environment)
    assert wheel.name.startswith("yolov9_fast-0.1.0-py3-none-")
    assert not wheel.name.endswith("any.whl")
    report = build_report(wheel)
    assert report["cpu"]["file"] == "_C_cpu.so"
    assert "-march=native" not in report["cpu"]["flags"]
    assert report["cuda"]["reason"] == "YOLOV9_FAST_SKIP_CUDA=1"
    installed = tree.parent / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    code = (
        "import torch, yolov9_fast as yf, yolov9_fast.kernels\n"
        "from yolov9_fast.ops import _library as library\n"
        "yf.set_backend('cpu'); b = torch.tensor([[0., 0., 2., 2.]])\n"
        "print(library.PACKAGE_FOLDER, library.loaded, yf.ops.box_iou(b, b).item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(installed)},
        cwd=tree.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    expected = f"{installed / 'yolov9_fast'} {{'cpu': None, 'cuda': 'not compiled: YOLOV9_FAST_SKIP_CUDA=1'}} 1.0\n"
    assert done.stdout == expected, done.stderr


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that answers as nvcc 12.6 does, which does not know compute_100 yet."""
    folder = tmp_path / "cuda" / "bin"
    folder.mkdir(parents=True)
    program = folder / "nvcc"
    program.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        "--version) echo 'Cuda compilation tools, release 12.6, V12.6.85';;\n"
        "--list-gpu-arch) echo compute_70; echo compute_80; echo compute_90;;\n"
        "esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    for name in ("YOLOV9_FAST_CUDA_ARCHS", "YOLOV9_FAST_SKIP_CUDA", "YOLOV9_FAST_FORCE_CUDA"):
        monkeypatch.delenv(name, raising=False)
    return program


def test_default_architectures_are_those_that_nvcc_knows_with_ptx_of_the_newest(nvcc: Path) -> None:
    assert recipe.architecture_flags(str(nvcc)) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]


def test_architectures_can_be_chosen(nvcc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLOV9_FAST_CUDA_ARCHS", "7.0+PTX; 90a")
    assert recipe.architecture_flags(str(nvcc)) == [
        "-gencode=arch=compute_70,code=sm_70",
        "-gencode=arch=compute_70,code=compute_70",
        "-gencode=arch=compute_90a,code=sm_90a",
    ]
    monkeypatch.setenv("YOLOV9_FAST_CUDA_ARCHS", "hopper")
    with pytest.raises(recipe.Unbuildable, match="'hopper' is no architecture"):
        recipe.architecture_flags(str(nvcc))


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
def test_cuda_is_compiled_for_a_cpu_torch_and_not_for_another_major_version(
    nvcc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def torch_of(cuda: str | None) -> object:
        return recipe.Torch("2.10.0", cuda, ["/include"], Path("/lib"))

    assert recipe.cuda_recipe(torch_of(None)).compiler[0] == str(nvcc)
    assert recipe.cuda_recipe(torch_of("12.8")).compiler[0] == str(nvcc)
    with pytest.raises(recipe.Unbuildable, match=r"nvcc is of CUDA 12, torch of CUDA 13.0"):
        recipe.cuda_recipe(torch_of("13.0"))
    monkeypatch.setenv("YOLOV9_FAST_FORCE_CUDA", "1")
    assert recipe.cuda_recipe(torch_of("13.0")).compiler[0] == str(nvcc)


def test_no_nvcc_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(recipe.Unbuildable, match="no nvcc on PATH or in CUDA_HOME"):
        recipe.find_nvcc()


def test_jobs_are_at_least_one_and_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAX_JOBS", raising=False)
    assert 1 <= recipe.max_jobs() <= max(2, (os.cpu_count() or 1) // 2)
    monkeypatch.setenv("MAX_JOBS", "7")
    assert recipe.max_jobs() == 7


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
def test_only_what_changed_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "csrc"
    (source / "cpu").mkdir(parents=True)
    for name in ("one", "two"):
        (source / "cpu" / f"{name}.cpp").write_text(f'#include "common.h"\nint {name}() {{ return VALUE; }}\n')
    (source / "common.h").write_text("#define VALUE 1\n")
    torch = recipe.Torch("2.10.0", None, [], tmp_path)
    settings = recipe.Recipe(recipe.find_cxx(), ["-fPIC"], [])
    compiled: list[str] = []
    original = recipe.run
    monkeypatch.setattr(recipe, "run", lambda *args, **kw: (compiled.append(args[1]), original(*args, **kw))[1])

    def names_compiled() -> list[str]:
        compiled.clear()
        sources = sorted((source / "cpu").glob("*.cpp"))
        recipe.compile_and_link(settings, sources, source, tmp_path / "_C_cpu.so", tmp_path / "scratch", torch)
        return sorted(what for what in compiled if what.endswith(".cpp"))

    assert names_compiled() == ["one.cpp", "two.cpp"]
    assert names_compiled() == []
    (source / "cpu" / "two.cpp").write_text('#include "common.h"\nint two() { return VALUE + 1; }\n')
    assert names_compiled() == ["two.cpp"]
    (source / "common.h").write_text("#define VALUE 2\n")
    assert names_compiled() == ["one.cpp", "two.cpp"]
