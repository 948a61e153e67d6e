"""The suite's quick cases through pytest-benchmark, for those who write a kernel.

.venv/bin/python -m pytest bench/ -k "bn_silu and both" --benchmark-group-by=param:case --benchmark-columns=median,iqr
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from yolov9_fast.bench.cases import LAYOUTS, Case, NoClock, Settings
from yolov9_fast.bench.measure import Candidate, judged
from yolov9_fast.bench.operators import BACKENDS
from yolov9_fast.bench.suite import all_cases

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SETTINGS = Settings(peers=False)
CASES = all_cases(SETTINGS, DEVICE, ("ops", "blocks", "loss", "nms"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("provider", ["eager", *BACKENDS, "auto"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(benchmark: Callable[..., Any], case: Case, provider: str, layout: str) -> None:
    benchmark(right_candidate(case, provider, layout).runner.call, NoClock())


def right_candidate(case: Case, provider: str, layout: str) -> Candidate:
    """The provider, once its result has been compared with eager's in float64; fails or skips the test otherwise."""
    opened = case.open(DEVICE, SETTINGS)
    form = (provider, layout)
    opened.runners = (one for one in opened.runners if one.provider == "eager" or (one.provider, one.layout) == form)
    for outcome in judged(opened):
        if isinstance(outcome, Candidate):
            if (outcome.runner.provider, outcome.runner.layout) == form:
                return outcome
        elif (outcome["provider"], outcome["layout"]) == form:
            (pytest.fail if outcome.get("wrong") else pytest.skip)(outcome["reason"])
    pytest.skip(f"{case.subject} is not measured with {provider} in {layout}")
