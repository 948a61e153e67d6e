"""Target of the augmentation operator: random images on canvases, maps, tables and flips; wrong arguments."""

from __future__ import annotations

from typing import Any

from tests.fuzz.frame import Case, target
from tests.fuzz.operators import SEEDS, Invocation, check, spoil
from tests.ops.test_augment import drawn
from yolov9_fast import ops
from yolov9_fast.ops import _library


@target("augment", memory_mib=1024, case_seconds=10.0)
def augment(case: Case) -> None:
    # Without the multiply-add of OpenCV's code a few pixels differ: then errors and sizes are compared.
    fused = "fma" in _library.build_info().get("cpu_features", [])

    def call(*arguments: Any) -> Any:
        made = ops.augment(*arguments)
        return made if fused else made * 0

    arguments = spoil(case, list(drawn(case.draw(SEEDS, "seed")).values()))
    check(Invocation("augment", call, arguments, backends=("cpu",)))
