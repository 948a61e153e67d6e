"""Imports of optional packages, with an error that names the `pip install` that provides them."""

from __future__ import annotations

import importlib
from types import ModuleType

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
