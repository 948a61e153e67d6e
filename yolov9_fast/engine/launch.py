"""`python -m yolov9_fast.engine.launch TORCHRUN_WORDS`: torchrun whose failures are not a traceback.

The processes say in one line why they ended; torchrun adds a traceback of its own.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence


def main(words: Sequence[str]) -> int:
    """Run torchrun with `words`; the exit code of the process that failed first, 2 if a signal ended it."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.raiseExceptions = False  # its handlers of signals raise inside log calls too
    try:
        run.run(run.parse_args(list(words)))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 2
    except SignalException as error:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
