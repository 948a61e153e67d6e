"""`python -m tests.ptx [pytest arguments]`: tests under the arithmetic of PTX."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = ("tests/kernels", "tests/ops", "-k", "(triton or test_batch_norm or test_maps) and not auto")


def main(arguments: list[str]) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.ptx.plugin", *(arguments or DEFAULT)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
