"""Measuring a case: right results are timed against eager, a wrong one is not timed, an absent one has a reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from yolov9_fast.bench import measure as measuring
from yolov9_fast.bench import suite
from yolov9_fast.bench.cases import Absent, Case, OpenCase, Runner, Settings, Traffic
from yolov9_fast.bench.check import judge, relative_error
from yolov9_fast.bench.detection import detection_cases
from yolov9_fast.bench.machine import Ceilings, device_slug
from yolov9_fast.bench.measure import measure

from yolov9_fast import ops
from yolov9_fast.ops import _library as library
from yolov9_fast.ops._operator import operators

CPU = torch.device("cpu")
CEILINGS = Ceilings(((1e5, 1e11), (1e8, 1e10)), {"float32": 1e11})
QUICK = Settings(seconds=0.05, rounds=(3, 5), peers=False)


def box_iou_case() -> Case:
    return next(case for case in detection_cases(QUICK, ("float32",)) if case.subject == "box_iou")


def by_provider(case: Case) -> dict[str, dict[str, Any]]:
    return {record["provider"]: record for record in measure(case, CPU, QUICK, CEILINGS)}


@pytest.mark.skipif(library.why_not_compiled("box_iou", "cpu") is not None, reason="no compiled operators")
def test_an_operator_is_timed_beside_its_reference() -> None:
    found = by_provider(box_iou_case())
    eager, compiled = found["eager"], found["cpu"]
    assert eager["median"] > 0
    assert "speedup" not in eager
    assert compiled["speedup"]["value"] > 0
    assert compiled["speedup"]["low"] <= compiled["speedup"]["value"] <= compiled["speedup"]["high"]
    assert compiled["launches"] == 1 < eager["launches"]
    assert compiled["peak_bytes"] == 4 * 300 * 300
    assert compiled["share"] > 0
    assert compiled["bound"] == "memory"
    assert compiled["error"] < 1e-6


@pytest.mark.skipif(library.why_not_compiled("box_iou", "cpu") is not None, reason="no compiled operators")
def test_a_planted_wrong_result_has_no_speed() -> None:
    right = operators["box_iou"].implementations["cpu"].call

    def wrong(a: Tensor, b: Tensor) -> Tensor:
        result: Tensor = right(a, b).clone()
        result[3, 5] += 1e-2
        return result

    with ops.implementation("box_iou", "cpu", wrong):
        record = by_provider(box_iou_case())["cpu"]
    assert record["kind"] == "absent"
    assert record["wrong"]
    assert "wrong result" in record["reason"]
    assert not {"median", "samples", "speedup", "per_second"} & record.keys()
    assert "WRONG RESULT, no speed" in suite.summary([{**record, "case": "box_iou"}])


def case_of(*runners: Runner | Absent, rule: str = "twice") -> Case:
    def reference() -> dict[str, Tensor]:
        return {"output": torch.ones(4, dtype=torch.float64)}

    def open_case(device: torch.device, settings: Settings) -> OpenCase:
        return OpenCase(iter(runners), reference, rule, Traffic(16.0, 0.0, 16.0))

    return Case("case", "ops", "subject", "network", "forward", "float32", {}, open_case)


def runner(name: str, value: float = 1.0) -> Runner:
    return Runner(name, "nchw", lambda clock: torch.ones(4), lambda: {"output": torch.full((4,), value)})


def test_a_provider_that_raises_or_is_absent_leaves_the_others_their_time() -> None:
    def broken() -> dict[str, Tensor]:
        raise RuntimeError("no luck\nat all")

    raising = Runner("raising", "nchw", lambda clock: None, broken)
    found = by_provider(case_of(runner("eager"), raising, Absent("peer", "", "not installed"), runner("cpu")))
    assert found["raising"]["reason"] == "failed: RuntimeError: no luck"
    assert found["peer"]["reason"] == "not installed"
    assert found["cpu"]["median"] > 0
    assert found["eager"]["median"] > 0


@pytest.mark.parametrize("value", [1.001, float("nan"), float("inf")])
def test_errors_beyond_twice_eagers_are_wrong(value: float) -> None:
    found = by_provider(case_of(runner("eager"), runner("cpu", value)))
    assert found["cpu"]["kind"] == "absent"
    assert found["cpu"]["wrong"]


def test_rules() -> None:
    exact = {"output": torch.ones(3, dtype=torch.float64)}
    rough, rougher = {"output": torch.full((3,), 1.01)}, {"output": torch.full((3,), 1.03)}
    assert judge("twice", {"output": torch.full((3,), 1.019)}, rough, exact)[1] is None
    assert judge("twice", rougher, rough, exact)[1] is not None
    assert judge("twice", {}, rough, exact)[1] is not None, "a result that is missing is wrong"
    assert judge("exact", rough, rough, None)[1] is None
    assert judge("exact", rougher, rough, None)[1] is not None
    assert judge("peer", {"agreement": torch.tensor(0.995)}, {}, None)[1] is None
    assert judge("peer", {"agreement": torch.tensor(0.9)}, {}, None)[1] is not None
    assert relative_error(torch.ones(2), torch.ones(3)) == float("inf")
    assert relative_error(torch.full((2,), 1.5), torch.ones(2)) == pytest.approx(0.5)


def test_eager_in_another_layout_is_the_measure_of_that_layout() -> None:
    def other(name: str, value: float) -> Runner:
        return Runner(name, "channels_last", lambda clock: None, lambda: {"output": torch.full((4,), value)})

    first = runner("eager", 1.001)
    found = list(measure(case_of(first, other("eager", 1.004), other("cpu", 1.007)), CPU, QUICK, CEILINGS))
    assert [record["kind"] for record in found] == ["measure"] * 3
    found = list(measure(case_of(first, other("eager", 1.02), other("cpu", 1.007)), CPU, QUICK, CEILINGS))
    assert [r["provider"] for r in found if r.get("wrong")] == ["eager", "cpu"], "far off, eager is no measure either"


def test_the_limit_is_the_larger_of_bytes_and_products() -> None:
    assert CEILINGS.limit(1e8, 0.0, "float32", 1e8) == (pytest.approx(1e-2), "memory")
    assert CEILINGS.limit(1e3, 1e11, "float32", 1e3) == (pytest.approx(1.0), "arithmetic")
    middle = CEILINGS.bandwidth_at(10**6.5)
    assert 1e10 < middle < 1e11
    assert CEILINGS.bandwidth_at(1) == 1e11
    assert CEILINGS.bandwidth_at(1e12) == 1e10


def test_a_short_budget_has_something_of_every_operator() -> None:
    def cases() -> Iterator[Case]:
        for subject in ("a", "b"):
            for number in range(3):
                yield Case(f"{subject}{number}", "ops", subject, "", "", "", {}, None, priority=number > 1)  # type: ignore[arg-type]

    assert [case.name for case in suite.in_order(cases())] == ["a0", "b0", "a1", "b1", "a2", "b2"]


def test_devices_have_names_for_folders() -> None:
    assert device_slug(CPU).startswith("cpu-")
    assert device_slug(CPU) == device_slug(CPU).lower()


def test_samples_that_lost_a_core_are_taken_again_and_counted_when_all_did(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = iter(range(10**6))
    monkeypatch.setattr(measuring, "preemptions", lambda: next(counter))
    record = by_provider(case_of(runner("eager")))["eager"]
    assert record["disturbed"] == len(record["samples"])
    monkeypatch.setattr(measuring, "preemptions", lambda: 7)
    assert by_provider(case_of(runner("eager")))["eager"]["disturbed"] == 0
