"""Imports by name: optional packages, whose absence is an error that says how to install them, and users' modules."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from yolov9_fast._text import printable
from yolov9_fast.errors import UserError

_PIP_NAMES = {
    "cv2": "opencv-python-headless",
    "tqdm": "tqdm",
    "matplotlib": "matplotlib",
    "pycocotools": "pycocotools",
    "tensorboard": "tensorboard",
    "torch.utils.tensorboard": "tensorboard",
    "safetensors": "safetensors",
    "yaml": "pyyaml",
}


def require(module: str) -> ModuleType:
    """Import `module` or raise `UserError` that says which package to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        root = module.split(".")[0]
        package = _PIP_NAMES.get(module) or _PIP_NAMES.get(root) or root
        raise UserError(
            f"{module} cannot be imported ({error}); install it with `pip install {package}` or all extras with "
            f"`pip install 'yolov9-fast[all]'`"
        ) from error


def import_module(name: str) -> ModuleType:
    """Import a user's module; the working folder is searched first, as `python -m` does.

    Raises:
        ValueError: there is none, or importing it fails.
    """
    folder = os.getcwd()
    sys.path.insert(0, folder)
    importlib.invalidate_caches()  # the file may have just been written
    try:
        return importlib.import_module(name)
    except Exception as error:  # a module may fail in any way
        reason = f"{type(error).__name__}: {printable(error)}"
        raise ValueError(f"cannot import {printable(name, 200)!r}: {reason}") from error
    finally:
        sys.path.remove(folder)


def import_callable(path: str) -> Callable[..., Any]:
    """The function or other callable at a user's import path `module:function`.

    Raises:
        ValueError: there is none.
    """
    module, _, name = path.partition(":")
    if not module or not name:
        raise ValueError(f"expected an import path module:function, got {printable(path, 200)!r}")
    found = getattr(import_module(module), name, None)
    if not callable(found):
        module, name = printable(module, 200), printable(name, 200)
        raise ValueError(f"{printable(path, 200)!r}: module {module} has no function {name}")
    return found  # type: ignore[no-any-return]


def when_imported(module: str, call: Callable[[], object]) -> None:
    """Run `call()` at once if `module` has been imported, else right after it is; imports nothing itself."""
    if module in sys.modules:
        call()
        return
    _waiting.setdefault(module, []).append(call)
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


_waiting: dict[str, list[Callable[[], object]]] = {}


class _Finder(MetaPathFinder):
    """Finds the modules that `when_imported` waits for, as Python itself does, and has the calls run after them."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _waiting:
            return None
        calls = _waiting.pop(name)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                for call in calls:
                    call()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_FINDER = _Finder()
