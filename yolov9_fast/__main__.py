"""`python -m yolov9_fast`: the same as the command `yolov9-fast`."""

from __future__ import annotations

import sys

from yolov9_fast.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
