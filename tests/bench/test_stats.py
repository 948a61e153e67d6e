"""The statistics of timings: intervals that cover, verdicts that a 10 % slowdown changes and noise does not."""

from __future__ import annotations

import numpy as np
import pytest
from yolov9_fast.bench.stats import Ratio, ratio_of_medians, settled, summarise, verdict


def noisy(count: int, seed: int, factor: float = 1.0) -> list[float]:
    """Times as machines give them: a minimum, and now and then a disturbance."""
    generator = np.random.default_rng(seed)
    return list(factor * (1e-3 + generator.exponential(2e-5, count) + 5e-4 * (generator.random(count) < 0.1)))


def test_summary_is_the_median_with_its_percentiles() -> None:
    summary = summarise([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (summary.median, summary.p20, summary.p80, summary.count) == (3.0, pytest.approx(1.8), pytest.approx(4.2), 5)


def test_no_samples_are_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        summarise([])
    with pytest.raises(ValueError, match="both sides"):
        ratio_of_medians([1.0], [])
    with pytest.raises(ValueError, match="equally many"):
        ratio_of_medians([1.0], [1.0, 2.0], paired=True)


def test_a_slowdown_of_ten_percent_is_seen_and_none_is_not() -> None:
    seen = missed = invented = 0
    for seed in range(60):
        old = noisy(15, seed)
        seen += verdict(ratio_of_medians(noisy(15, seed + 1000, 1.1), old)) == "slower"
        missed += verdict(ratio_of_medians(noisy(15, seed + 1000, 1 / 1.1), old)) != "faster"
        invented += verdict(ratio_of_medians(noisy(15, seed + 1000), old)) != "same"
    assert seen >= 58
    assert missed <= 6
    assert invented == 0


def test_the_interval_covers_the_true_ratio_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        a, b = generator.normal(1.2, 0.05, 25), generator.normal(1.0, 0.05, 25)
        ratio = ratio_of_medians(list(a), list(b), seed=seed)
        covered += ratio.low <= 1.2 <= ratio.high
    assert covered >= 176


def test_pairs_cancel_what_disturbed_a_whole_round() -> None:
    generator = np.random.default_rng(0)
    mood = generator.uniform(1, 3, 21)
    old, new = mood * generator.normal(1, 0.002, 21), 1.03 * mood * generator.normal(1, 0.002, 21)
    paired = ratio_of_medians(list(new), list(old), paired=True)
    loose = ratio_of_medians(list(new), list(old))
    assert paired.high - paired.low < 0.2 * (loose.high - loose.low)


def test_an_interval_that_holds_one_is_no_difference() -> None:
    assert verdict(Ratio(1.2, 0.99, 1.5)) == "same"
    assert verdict(Ratio(1.04, 1.03, 1.05)) == "same"
    assert verdict(Ratio(1.06, 1.03, 1.09)) == "slower"
    assert verdict(Ratio(1 / 1.06, 0.9, 0.99)) == "faster"


def test_a_verdict_needs_every_repeat() -> None:
    assert settled(["slower", "slower", "slower"]) == "slower"
    assert settled(["slower", "same", "slower"]) == settled([]) == "same"
