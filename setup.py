"""Installs the package and compiles `csrc/` by the recipe in `csrc/build.py`; installs without it where that fails."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import ClassVar

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def load_recipe() -> ModuleType:
    """`csrc/build.py`, loaded by its path: csrc is no Python package."""
    spec = importlib.util.spec_from_file_location("yolov9_fast_build", ROOT / "csrc" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class BuildOperators(build_ext):
    """Compiles what can be compiled and never fails: what is missing, and why, is in `_build_info.json`."""

    written: ClassVar[list[Path]] = []

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        package = (ROOT if in_place else Path(self.build_lib).resolve()) / "yolov9_fast"
        # pip deletes its own folder after each call; with this one the next `make install` compiles only what changed.
        scratch = ROOT / "build" / "operators" if in_place else Path(self.build_temp).resolve()
        package.mkdir(parents=True, exist_ok=True)
        type(self).written = load_recipe().build(ROOT / "csrc", package, scratch)

    def get_source_files(self) -> list[str]:
        return [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "csrc").rglob("*.[ch]*"))]

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self.written]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class WithoutBenchTests(build_py):
    """`bench/` is the package `yolov9_fast.bench`, but its pytest-benchmark files stay in the repository."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        found: list[tuple[str, str, str]] = super().find_package_modules(package, package_dir)
        return [module for module in found if package != "yolov9_fast.bench" or not module[1].startswith("test_")]


class OperatorWheel(bdist_wheel):
    """The compiled files link neither Python nor one torch version: the wheel is for any Python 3 of the platform."""

    def get_tag(self) -> tuple[str, str, str]:
        compiled = any(path.suffix == ".so" for path in BuildOperators.written)
        return ("py3", "none", super().get_tag()[2] if compiled else "any")


setup(
    packages=[*find_packages(include=["yolov9_fast", "yolov9_fast.*"]), "yolov9_fast.kernels", "yolov9_fast.bench"],
    package_dir={"yolov9_fast.kernels": "kernels", "yolov9_fast.bench": "bench"},
    include_package_data=False,
    package_data={
        "yolov9_fast": ["**/*.yaml", "py.typed"],
        "yolov9_fast.kernels": ["**/*.json"],
        "yolov9_fast.bench": ["counts.json", "instructions.cpp"],
    },
    ext_modules=[Extension("yolov9_fast._C_cpu", sources=[])],
    cmdclass={"build_ext": BuildOperators, "bdist_wheel": OperatorWheel, "build_py": WithoutBenchTests},
)
