"""A rank without torch, for tests of what surrounds ranks: `deepspeed --num_gpus 2 light_rank.py FOLDER`.

Like real ones, the two leave a line a step in metrics.jsonl, go on from `latest`, and save once and end with 0 when one
of them gets SIGTERM; a rank without its peer fails.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from ds_remoe.training.stop_mark import clear_stop_mark, mark_stop

STEP_SECONDS = 0.02
asked = False


def ask(*_: object) -> None:
    """SIGTERM came."""
    global asked
    asked = True


def meet(folder: Path, rank: int) -> int:
    """The other rank's pid, once it is there."""
    (folder / f"rank{rank}").write_text(f"{os.getpid()}\n")
    other = folder / f"rank{1 - rank}"
    while not other.exists() or not other.read_text().endswith("\n"):
        time.sleep(0.01)
    return int(other.read_text())


def main(folder: Path, rank: int) -> int:
    """Count steps until a rank is asked to stop."""
    signal.signal(signal.SIGTERM, ask)
    session = folder / f"session-of-launcher-{os.getppid()}"
    session.mkdir(exist_ok=True)
    metrics, checkpoints, step = folder / "metrics.jsonl", folder / "checkpoints", 0
    if rank == 0:
        (folder / ".lock").write_text(str(os.getpid()))
        clear_stop_mark(folder)
        checkpoints.mkdir(exist_ok=True)
        step = max((int(path.name.removeprefix("step")) for path in checkpoints.glob("step*")), default=0)
        metrics.write_text("".join(f'{{"step": {done}, "rank": 0}}\n' for done in range(1, step + 1)))
    peer = meet(session, rank)
    while not (session / "stop").exists():
        time.sleep(STEP_SECONDS)
        if not Path(f"/proc/{peer}").exists():
            return 1
        if asked:
            (session / "stop").touch()
        if rank == 0:
            step += 1
            with metrics.open("a") as file:
                file.write(f'{{"step": {step}, "rank": 0}}\n')
    if rank == 0:
        (checkpoints / f"step{step:08d}").mkdir()
        (checkpoints / "latest").write_text(f"step{step:08d}")
        mark_stop(folder, "SIGTERM")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[-1]), int(os.environ["RANK"])))
