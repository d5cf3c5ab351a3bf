"""The end of a launched process that cannot go on: one message for all ranks; exit code 2 where the input is wrong."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import NoReturn

WRONG_INPUT = 2
GRACE_SECONDS = 10.0


def leave(message: str, grace_seconds: float = GRACE_SECONDS, code: int = WRONG_INPUT) -> NoReturn:
    """Say why on rank 0 and exit with `code`.

    The launcher ends all ranks as soon as one has ended, so the others wait for rank 0 to say it. A rank that is still
    alive after that stands alone with its error, and says it itself.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the trainer's handler would outlive the launcher's patience
    rank = int(os.environ.get("RANK", "0"))
    if rank != 0:
        time.sleep(grace_seconds)
        message = f"rank {rank}: {message}"
    print(message, file=sys.stderr, flush=True)
    sys.exit(code)
