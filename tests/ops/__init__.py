"""Tests of operators."""

import os

CASES = int(os.environ.get("YOLOV9_FAST_TEST_CASES", "2000"))
"""Random cases of the tests that draw many."""
