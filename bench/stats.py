"""Statistics of timings: medians with percentiles, ratios of medians with a bootstrap interval, a verdict on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

THRESHOLD = 0.05
_DRAWS = 2000


@dataclass(frozen=True)
class Summary:
    """Median, 20th and 80th percentile of `count` samples, in the samples' unit."""

    median: float
    p20: float
    p80: float
    count: int


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians and the bounds of its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def text(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def summarise(samples: Sequence[float]) -> Summary:
    values = np.asarray(samples, dtype=np.float64)
    if values.size == 0:
        raise ValueError("samples: expected at least one, got none")
    low, middle, high = np.percentile(values, (20, 50, 80))
    return Summary(float(middle), float(low), float(high), int(values.size))


def ratio_of_medians(
    numerator: Sequence[float], denominator: Sequence[float], *, paired: bool = False, seed: int = 0
) -> Ratio:
    """median(numerator) / median(denominator) with a percentile bootstrap interval.

    `paired`: sample i of both comes from the same round, so that rounds are drawn, not samples: what slowed a whole
    round down then cancels. Needs equal lengths.
    """
    first = np.asarray(numerator, dtype=np.float64)
    second = np.asarray(denominator, dtype=np.float64)
    if first.size == 0 or second.size == 0:
        raise ValueError(f"ratio: expected samples on both sides, got {first.size} and {second.size}")
    if paired and first.size != second.size:
        raise ValueError(f"first, second: expected equally many samples, got {first.size} and {second.size}")
    generator = np.random.default_rng(seed)
    chosen = generator.integers(first.size, size=(_DRAWS, first.size))
    other = chosen if paired else generator.integers(second.size, size=(_DRAWS, second.size))
    drawn = np.median(first[chosen], axis=1) / np.median(second[other], axis=1)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Ratio(float(np.median(first) / np.median(second)), float(low), float(high))


def verdict(ratio: Ratio, threshold: float = THRESHOLD) -> str:
    """One of "slower", "faster", "same" for new / old: beyond the threshold, with an interval that leaves 1 out."""
    if ratio.value >= 1 + threshold and ratio.low > 1:
        return "slower"
    if ratio.value <= 1 / (1 + threshold) and ratio.high < 1:
        return "faster"
    return "same"


def settled(verdicts: Sequence[str]) -> str:
    """What all repeats agree on; "same" where they do not."""
    return verdicts[0] if verdicts and len(set(verdicts)) == 1 else "same"
