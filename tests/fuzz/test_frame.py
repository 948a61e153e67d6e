"""The frame finds failures, crashes, endless cases and too much memory, and names the input that caused them."""

from __future__ import annotations

import ctypes
import time

import pytest
from hypothesis import strategies as st

from tests.fuzz import frame
from tests.fuzz.frame import Case, Report, target


@target("frame_good")
def good(case: Case) -> None:
    assert len(case.draw(st.binary(max_size=10), "text")) <= 10


@target("frame_fails")
def fails(case: Case) -> None:
    assert case.draw(st.integers(0, 1000), "number") < 100


@target("frame_crashes")
def crashes(case: Case) -> None:
    if case.draw(st.booleans(), "wild"):
        ctypes.string_at(0)


@target("frame_hangs", case_seconds=0.3)
def hangs(case: Case) -> None:
    if case.draw(st.booleans(), "slow"):
        time.sleep(60)


@target("frame_swells", memory_mib=100)
def swells(case: Case) -> None:
    bytearray(case.draw(st.sampled_from([1, 200]), "mib") * 2**20)


def run(name: str) -> Report:
    return frame.run(frame.TARGETS[name], 0.3)


def test_a_good_target_is_clean() -> None:
    report = run("frame_good")
    assert report.clean
    assert report.cases > 10
    assert 0 < report.start_rss_mib <= report.peak_rss_mib
    assert report.slowest_case_s < 1


def test_a_failure_is_reduced_and_reported_with_what_was_drawn() -> None:
    report = run("frame_fails")
    assert not report.clean
    assert not report.crashes
    (drawn,) = (failure["drawn"] for failure in report.failures)
    # 100 where there is time to reduce it all the way.
    assert 100 <= int(drawn.removeprefix("number = ")) <= 1000
    assert report.failures[0]["error"].startswith("AssertionError")


@pytest.mark.parametrize(
    ("name", "drawn", "said"),
    [("frame_crashes", "wild = True\n", "Segmentation fault"), ("frame_hangs", "slow = True\n", "Timeout (")],
)
def test_the_end_of_the_process_is_reported_with_what_was_drawn(name: str, drawn: str, said: str) -> None:
    report = run(name)
    assert not report.clean
    assert report.crashes[0]["drawn"] == drawn
    assert said in report.crashes[0]["stderr"]
    assert ("over_time_s" in report.crashes[0]) == (name == "frame_hangs")


def test_memory_above_the_limit_is_a_failure() -> None:
    report = run("frame_swells")
    assert [failure["error"] for failure in report.failures] == ["MemoryError: "]
    assert report.failures[0]["drawn"] == "mib = 200\n"
    assert report.peak_rss_mib < report.start_rss_mib + 100
