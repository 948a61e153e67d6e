"""A module imports from layers below its own or from its own folder (docs/architecture.md, 1)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import yolov9_fast as yf

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "yolov9_fast"
BENCH = ROOT / "bench"
"""Installed as `yolov9_fast.bench`."""
LAYERS = {
    "kernels": 0,
    "ops": 1,
    "nn": 2,
    "models": 3,
    "losses": 3,
    "data": 3,
    "metrics": 3,
    "viz": 3,
    "engine": 4,
    "_accelerate": 5,
    "bench": 5,
    "paper": 5,
    "info": 5,
    "cli": 6,
    "__main__": 7,
}
"""By the first name below `yolov9_fast`. The command uses everything else of the top layer: one above it."""
SHARED_MODULES = {
    "_capture",
    "_collection",
    "_signals",
    "_layout",
    "_lazy",
    "_numbers",
    "_text",
    "_untrusted",
    "atomic",
    "errors",
    "limits",
}
"""Modules that every layer may use; they use nothing but each other."""


def modules() -> list[Path]:
    package = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    return sorted(package + [path for path in BENCH.glob("*.py") if not path.name.startswith("test_")])


def place(path: Path) -> Path:
    """The path below the package once installed: bench/stats.py for the file of that name in `bench/`."""
    return path.relative_to(ROOT if path.is_relative_to(BENCH) else PACKAGE)


def home(path: Path) -> str:
    """The first name below the package: `ops` of yolov9_fast/ops/_nms.py, `errors` of yolov9_fast/errors.py."""
    return place(path).with_suffix("").parts[0]


def imported(tree: ast.AST, package: str = "yolov9_fast") -> Iterator[tuple[int, str]]:
    """Line and first name below `yolov9_fast` of each import of it, inside functions too; "" for the package itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            names = [f"{module}.{alias.name}" if module == "yolov9_fast" else module for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "yolov9_fast":
                yield node.lineno, ([*name.split("."), ""])[1]


def home_of_public_name(name: str) -> str:
    """`models` for the public name `create_model`, names of folders and modules as they are."""
    return yf._MODULE_OF.get(name, name).split(".")[0]


def violations(source: str, target: str) -> str | None:
    """Why `source` (a first name) may not import `target`; None when it may."""
    target = home_of_public_name(target)
    if target == source or target in SHARED_MODULES or target == "__version__":
        return None
    if source in SHARED_MODULES:
        return f"{source} is shared by all layers and may not use {target}"
    if target == "":
        return None if LAYERS[source] >= 5 else "a layer imports modules, not the whole package"
    if target not in LAYERS:
        return f"{target} has no layer; give it one in docs/architecture.md and here"
    if LAYERS[target] >= LAYERS[source]:
        return f"{source} (layer {LAYERS[source]}) may not use {target} (layer {LAYERS[target]})"
    return None


@pytest.mark.parametrize("path", modules(), ids=lambda path: place(path).as_posix())
def test_imports_go_down(path: Path) -> None:
    folder = ".".join(("yolov9_fast", *place(path).parent.parts))
    assert home(path) in LAYERS.keys() | SHARED_MODULES, f"{path.name} has no layer"
    found = [
        f"line {line}: {reason}"
        for line, target in imported(ast.parse(path.read_text()), folder)
        if (reason := violations(home(path), target))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda path: path.name)
def test_kernels_import_of_the_package_only_the_memory_layout_and_the_reading_of_files(path: Path) -> None:
    assert {name for _, name in imported(ast.parse(path.read_text()))} <= {"kernels", "_layout", "_untrusted"}


@pytest.mark.parametrize("path", modules(), ids=lambda path: place(path).as_posix())
def test_a_file_is_short_and_has_a_docstring(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < 500
    assert (path.name == "__init__.py" and not text.strip()) or ast.get_docstring(ast.parse(text)), "no docstring"


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("import yolov9_fast.engine.trainer", ["engine"]),
        ("from yolov9_fast.nn import blocks", ["nn"]),
        ("from yolov9_fast import models, create_model", ["models", "create_model"]),
        ("import yolov9_fast as yf", [""]),
        ("def f():\n    from ..engine import ema", ["engine"]),
        ("from . import nms", ["ops"]),
        ("import torch", []),
    ],
)
def test_every_form_of_import_is_seen(code: str, names: list[str]) -> None:
    assert [name for _, name in imported(ast.parse(code), "yolov9_fast.ops")] == names


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("ops", "engine"),
        ("models", "losses"),
        ("nn", "create_model"),
        ("models", ""),
        ("errors", "ops"),
        ("ops", "unknown"),
    ],
)
def test_imports_upwards_sideways_and_of_the_whole_are_violations(source: str, target: str) -> None:
    assert violations(source, target)
