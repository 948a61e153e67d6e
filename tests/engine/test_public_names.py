"""The public names of `yolov9_fast.engine`."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from yolov9_fast import engine

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", engine.__all__)
def test_a_public_name_has_a_docstring_and_is_of_this_package(name: str) -> None:
    found = getattr(engine, name)
    assert found.__name__ == name
    assert found.__module__.startswith("yolov9_fast.engine.")
    assert found.__doc__


def test_type_checkers_and_dir_see_the_same_names() -> None:
    tree = ast.parse((ROOT / "yolov9_fast/engine/__init__.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    typed = {
        alias.name: node.module for node in imports for alias in node.names if (node.module or "").startswith("yolov9")
    }
    assert typed.keys() == set(engine.__all__) == set(dir(engine))
    assert all(getattr(engine, name).__module__ == module for name, module in typed.items())


def test_other_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match=r"module 'yolov9_fast.engine' has no attribute 'Trainner'"):
        getattr(engine, "Trainner")  # noqa: B009


def test_importing_the_package_imports_no_torch() -> None:
    script = "import sys; import yolov9_fast.engine; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False", done.stderr
