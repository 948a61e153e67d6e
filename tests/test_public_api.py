"""`yf.<tab>` shows the public names only; each has a docstring, and a type that users' type checkers see."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import yolov9_fast as yf

PACKAGES = ("data", "engine", "losses", "metrics", "models", "nn", "ops", "viz")
USER_CODE = """
import torch
import yolov9_fast as yf

model = yf.create_model("gelan-t", num_classes=2)
names: list[object] = [{names}]
raw = model(torch.zeros(1, 3, 64, 64))
with yf.backend("eager"):
    deployed: torch.nn.Module = yf.fuse(yf.to_deploy(model))
report: object = yf.accelerate(deployed)
current: str = yf.get_backend()
"""


def check_types(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """mypy --strict on `code` as a user's file outside the repository."""
    (folder / "user.py").write_text(code)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(folder / "cache"), "user.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)


def test_dir_shows_the_public_names_only() -> None:
    assert dir(yf) == sorted(yf.__all__)
    assert not [name for name in dir(yf) if name.startswith("_") and name != "__version__"]


@pytest.mark.parametrize("name", sorted(set(yf.__all__) - {"__version__"}))
def test_a_public_name_has_a_docstring_of_its_own(name: str) -> None:
    value = getattr(yf, name)
    assert value.__doc__
    assert value.__doc__ != type(value).__doc__


@pytest.mark.parametrize("package", PACKAGES)
def test_the_public_names_of_a_subpackage_exist_and_have_docstrings(package: str) -> None:
    module = getattr(yf, package)
    assert module.__all__ == sorted(set(module.__all__), key=module.__all__.index)
    bare = [
        name
        for name in module.__all__
        if (inspect.isclass(value := getattr(module, name)) or inspect.isroutine(value)) and not inspect.getdoc(value)
    ]
    assert not bare


def test_an_unknown_name_is_an_error_at_run_time() -> None:
    with pytest.raises(AttributeError, match="module 'yolov9_fast' has no attribute 'acelerate'"):
        yf.acelerate  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.slow
def test_user_code_with_every_public_name_passes_mypy_strict(tmp_path: Path) -> None:
    done = check_types(tmp_path, USER_CODE.format(names=", ".join(f"yf.{name}" for name in yf.__all__)))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_mypy_reports_a_misspelt_name_and_a_wrong_argument(tmp_path: Path) -> None:
    done = check_types(tmp_path, "import yolov9_fast as yf\nyf.acelerate\nyf.set_backend(3)\n")
    assert done.stdout.count("error:") == 2, done.stdout
    assert '"acelerate"' in done.stdout
    assert 'has incompatible type "int"' in done.stdout
