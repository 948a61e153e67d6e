"""Loss terms from outside the package: functions that `DetectionLoss` calls in addition to its own terms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from yolov9_fast._lazy import import_callable
from yolov9_fast.errors import UserError
from yolov9_fast.losses.targets import PaddedTargets
from yolov9_fast.ops._assign import Assignment

TermFunction = Callable[[Sequence[Tensor], Assignment, PaddedTargets], Tensor]
"""`function(maps, assignment, targets)` of one branch.

`maps`: raw maps, float32 [B, 64 + nc, H/s, W/s] by ascending stride s; `assignment`: [B, A], over the cells of all maps
in this order, row by row; `targets`: the padded ground truth that `assignment.gt_index` counts. Returns a 0-dimensional
tensor: a sum over images and anchors, which `DetectionLoss` then normalises.
"""

STANDARD_TERMS = ("box", "cls", "dfl")


class LossTerm(NamedTuple):
    """A term of the loss: its name in results.csv, its function and its weight."""

    name: str
    function: TermFunction
    weight: float = 1.0

    def __call__(self, maps: Sequence[Tensor], assignment: Assignment, targets: PaddedTargets) -> Tensor:
        """The function's value, without the weight; raises `ValueError` unless it is a 0-dimensional tensor."""
        value = self.function(maps, assignment, targets)
        if not isinstance(value, Tensor) or value.dim() or not value.is_floating_point():
            got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss term {self.name}: expected a 0-dimensional floating tensor, got {got}")
        return value


def parse_terms(text: str) -> tuple[LossTerm, ...]:
    """Terms of a comma-separated list of `module:function` or `module:function=weight`, named by their functions.

    Raises:
        UserError: there is no such function, a weight is not a number, or two terms have the same name.
    """
    terms = []
    try:
        for entry in filter(None, text.split(",")):
            path, _, weight = entry.partition("=")
            terms.append(LossTerm(path.rpartition(":")[2], import_callable(path), float(weight or 1)))
        term_names(terms)
    except ValueError as error:
        raise UserError(f"loss_terms: {error}") from error
    return tuple(terms)


def term_names(terms: Sequence[LossTerm]) -> tuple[str, ...]:
    """The names of the standard terms, then of `terms`; raises `ValueError` unless all differ."""
    names = (*STANDARD_TERMS, *(term.name for term in terms))
    if len(set(names)) < len(names):
        raise ValueError(f"terms: expected names that differ, got {', '.join(names)}")
    return names
