"""Every fuzz target, for YOLOV9_FAST_FUZZ_SECONDS seconds each (default 60)."""

from __future__ import annotations

import json
import os
from dataclasses import asdict

import pytest

from tests.fuzz import frame

SECONDS = float(os.environ.get("YOLOV9_FAST_FUZZ_SECONDS", "60"))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(name for name in frame.load_all() if not name.startswith("frame_")))
def test_a_target_finds_nothing(name: str) -> None:
    report = frame.run(frame.TARGETS[name], SECONDS)
    assert report.clean, json.dumps(asdict(report), indent=1)
