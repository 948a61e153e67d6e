"""Figures as objects, to test what a plot draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from yolov9_fast.viz import figure, labels, plots


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every figure saved during the test, in order."""
    seen: list[Any] = []
    save = figure.save_figure

    def spy(out: str | Path, size: tuple[float, float], paint: Callable[[Any], None]) -> Path:
        def paint_and_keep(made: Any) -> None:
            paint(made)
            seen.append(made)

        return save(out, size, paint_and_keep)

    monkeypatch.setattr(plots, "save_figure", spy)
    monkeypatch.setattr(labels, "save_figure", spy)
    return seen
