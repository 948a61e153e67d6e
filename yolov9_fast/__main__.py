"""`python -m yolov9_fast`: the same as the command `yolov9-fast`."""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # No traceback before `main` has its handlers.
    from yolov9_fast.cli.main import main

    sys.exit(main())
