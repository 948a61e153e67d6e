"""Importing any module of the package imports no optional dependency and initialises no GPU."""

from __future__ import annotations

import json
import subprocess
import sys

# Without tqdm: torch itself imports it when it is there.
EXTRAS = ("cv2", "matplotlib", "yaml", "pycocotools", "tensorboard", "safetensors", "triton", "PIL")
AFTER = f"""
import json, sys
torch = sys.modules.get("torch")
print(json.dumps({{
    "extras": [name for name in {EXTRAS!r} if name in sys.modules],
    "torch": torch is not None,
    "gpu": torch is not None and torch.cuda.is_initialized(),
}}))
"""


def after(code: str) -> dict[str, object]:
    done = subprocess.run([sys.executable, "-c", code + AFTER], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    state: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return state


def test_the_package_alone_loads_nothing() -> None:
    assert after("import yolov9_fast; yolov9_fast.__version__; dir(yolov9_fast)") == {
        "extras": [],
        "torch": False,
        "gpu": False,
    }


def test_every_module_loads_without_extras_and_without_a_gpu() -> None:
    code = """
import importlib, pkgutil, yolov9_fast
for module in pkgutil.walk_packages(yolov9_fast.__path__, "yolov9_fast."):
    if not module.name.endswith("__main__") and not module.name.startswith("yolov9_fast.kernels."):
        if not module.name.startswith("yolov9_fast._C_"):
            importlib.import_module(module.name)
"""
    assert after(code) == {"extras": [], "torch": True, "gpu": False}


def test_an_operator_is_the_function_whatever_was_imported_before() -> None:
    code = """
import yolov9_fast.ops._box_iou
import yolov9_fast as yf
from yolov9_fast.ops._box_iou import box_iou
assert yf.ops.box_iou is box_iou and callable(box_iou)
import sys
assert "torch._dynamo" not in sys.modules  # slow to import
"""
    assert after(code)["torch"]


def test_an_unknown_name_is_an_attribute_error() -> None:
    code = """
import yolov9_fast
try:
    yolov9_fast.train_it
except AttributeError as error:
    assert "train_it" in str(error)
else:
    raise SystemExit("no error")
"""
    assert after(code)["torch"] is False


def test_products_are_counted_once_a_program_counts_operations() -> None:
    code = """
import sys, torch, yolov9_fast.ops
assert "torch.utils.flop_counter" not in sys.modules
from torch.utils.flop_counter import flop_registry
assert torch.ops.yolov9_fast.conv1x1_forward in flop_registry
"""
    subprocess.run([sys.executable, "-c", code], check=True)
