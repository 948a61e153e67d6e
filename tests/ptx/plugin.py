"""A plugin of pytest: every test runs once with each answer that PTX allows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ptx import ANSWERS, arithmetic


@pytest.fixture(autouse=True, params=ANSWERS)
def answer_of_ptx(request: pytest.FixtureRequest) -> Iterator[str]:
    with arithmetic(request.param):
        yield str(request.param)
