"""Where the host may wait for a GPU, or copy to it from memory that is not page-locked: all places, by reason.

What a step really does is traced in `tests/fake_cuda`; this also finds what no trace runs. Indexing by a mask cannot be
told from other indexing in the source.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "yolov9_fast"
ENGINE = (
    "clock",
    "device",
    "distributed",
    "ema",
    "flat",
    "host_copy",
    "inference",
    "loss_scale",
    "optimizer",
    "predictor",
    "step",
    "trainer",
    "validator",
)
METHODS = {"argwhere", "cpu", "is_nonzero", "item", "masked_select", "new_tensor", "nonzero", "synchronize", "tolist"}
FUNCTIONS = {"argwhere", "as_tensor", "bincount", "equal", "isin", "masked_select", "nonzero", "tensor", "unique"}
"""Of torch."""
KNOWN = {
    "once in ten batches, once an epoch": (
        "engine/loss_scale.py:LossScale.state_dict",
        *("engine/trainer.py:Trainer._mean_loss", "engine/validator.py:validate"),
        *("engine/trainer.py:Trainer._train_epoch", "engine/trainer.py:Trainer._report_skipped"),
    ),
    "of what a HostCopy has brought": (
        *("engine/validator.py:_Evaluation.finish", "engine/predictor.py:Predictor._detect"),
        *("engine/host_copy.py:HostCopy.wait", "engine/clock.py:PhaseClock.seconds"),
    ),
    "a result whose size its caller has to know": (
        *("_accelerate/nms.py:_per_image", "_accelerate/nms.py:torchvision_nms"),
        "_accelerate/nms.py:torchvision_batched_nms",
    ),
    "asked for": ("ops/_nms.py:warn_if_cut",),
    "at the start of a run or a process": (
        *("engine/validator.py:_matched_classes", "ops/_probe.py:_launch_cuda"),
        *("engine/flat.py:FlatStorage.take_moments", "engine/loss_scale.py:LossScale.load_state_dict"),
    ),
    "on a CPU only, or for rows of targets that are given on a GPU": (
        *("losses/targets.py:pad_targets", "losses/targets.py:_check_indices"),
        *("ops/_detection_loss.py:_check_values", "ops/_detection_loss.py:_all_ones"),
    ),
    "eager forms, whose sizes depend on data": (
        *("ops/_assign.py:assign_reference", "ops/_assign.py:_claims"),
        *("ops/_detection_loss.py:detection_loss_reference", "ops/_detection_loss.py:class_loss"),
        *("ops/_detection_loss.py:unless_ones_reference", "ops/_nms_boxes.py:nms_boxes_reference"),
        *("ops/_nms.py:_candidates", "ops/_nms.py:_resolve"),
        *("ops/_augment.py:augment_reference", "ops/_augment.py:_canvas"),
    ),
    "a cumulative average (momentum=None), as in torch's own BatchNorm": ("nn/sync_batch_norm.py:arguments",),
    "boxes that the caller knows, or classes that it chooses, in other code's NMS": (
        *("_accelerate/nms.py:_as_candidates", "_accelerate/nms.py:_filtered", "_accelerate/nms.py:_chosen"),
    ),
    "a copy of a module for its probe": ("_accelerate/probe.py:_twin",),
    "numbers of Python": (
        "engine/flat.py:FlatStorage.write_rates",
        *("engine/distributed.py:join_process_group", "engine/predictor.py:Prediction.as_dict"),
        *("engine/predictor.py:Prediction.counts", "engine/predictor.py:class_indices"),
        *("engine/trainer.py:Trainer._run_epoch", "engine/trainer.py:Trainer._image_size"),
        *("engine/validator.py:ValidationResult.fitness", "losses/detection.py:DetectionLoss.__call__"),
        *("losses/terms.py:parse_terms", "nn/steps.py:bottleneck", "nn/yolov7.py:_checked_anchors"),
        *("ops/_assign.py:assign", "ops/_assign.py:_power", "ops/_conv1x1.py:_products_round_otherwise"),
        *("ops/_boxes.py:anchor_points", "ops/_nms.py:_check"),
        *("engine/device.py:parse_device", "_accelerate/nms.py:non_max_suppression_ultralytics"),
        *("_accelerate/loss.py:FastAssigner.__init__", "_accelerate/loss.py:FastMatcher.__call__"),
        *("_accelerate/loss.py:_assigner", "_accelerate/loss.py:_matcher", "_accelerate/loss.py:_min_side"),
    ),
}


def files() -> Iterator[Path]:
    """Of layers that a step, a validation or a prediction runs through."""
    for folder in ("nn", "losses", "ops", "_accelerate"):
        yield from sorted((PACKAGE / folder).glob("*.py"))
    yield from (PACKAGE / "engine" / f"{name}.py" for name in ENGINE)


def waits(node: ast.AST, owner: str = "") -> Iterator[str]:
    """The function of every call that may wait."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            yield from waits(child, f"{owner}.{child.name}".lstrip("."))
            continue
        if isinstance(child, ast.Call) and may_wait(child):
            yield owner
        yield from waits(child, owner)


def may_wait(call: ast.Call) -> bool:
    function = call.func
    if isinstance(function, ast.Name):
        return function.id in ("bool", "float", "int") and not isinstance(call.args[0], ast.Constant)
    if not isinstance(function, ast.Attribute):
        return False
    of_torch = isinstance(function.value, ast.Name) and function.value.id == "torch"
    return function.attr in (FUNCTIONS if of_torch else METHODS)


def test_every_wait_for_a_gpu_is_known() -> None:
    found = set()
    for path in files():
        place = path.relative_to(PACKAGE).as_posix()
        found |= {f"{place}:{owner}" for owner in waits(ast.parse(path.read_text()))}
    known = {place for places in KNOWN.values() for place in places}
    assert found - known == set()
    assert known - found == set()  # what is gone is no exception


def test_a_wait_is_found() -> None:
    source = """
class A:
    def b(self, x):
        return x.item()
def c(x):
    def d():
        return bool((x > 0).any())
    return torch.tensor([1.0], device=x.device)
def e(x):
    return x.sum() * float("inf") + torch.where(x > 0, x, 0)
"""
    assert list(waits(ast.parse(source))) == ["A.b", "c.d", "c"]
