"""Ends this rank when the run hangs, and says who holds it up."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from ds_remoe.training.watchdog import reaper
from ds_remoe.training.watchdog.board import Board
from ds_remoe.training.watchdog.position import Limits, Position, record_collectives
from ds_remoe.training.watchdog.verdict import Sighting, tell
from ds_remoe.training.watchdog.whereabouts import Whereabouts

HUNG = 3
"""Exit code of a rank that gave up waiting for another; `ds-remoe supervise` restarts the run."""

_PERIOD_SECONDS = 0.5
_RANKS_PER_PERIOD = 500
_SILENT_PERIODS = 4
_STACK_AFTER_SECONDS = 2.0
_SHOW_CURSOR = "\x1b[?25h"  # which a progress bar hides
_LONGER = 1.5
"""A rank waits that much longer than its limit for rank 0's verdict, while rank 0 is alive."""


class Watchdog:
    """Watches this rank's progress from threads that run while its main thread waits.

    Where a rank hangs, all others soon wait for it, rank 0 among them, or it is rank 0. So each rank looks at itself
    alone: without a sign of progress for `position.limit` seconds, rank 0 judges what all ranks last said, prints the
    verdict, posts it and leaves; the others leave on that word, or say themselves that rank 0 is silent. A step costs
    a few stores; nothing is read from the device.

    A rank cannot do so while it is stopped or a call of its main thread keeps Python's lock: then its reaper, a child
    process, kills it.

    Make one on every rank, after the process group and before the engine.

    Args:
        limits: see there.

    Attributes:
        position: to be told where the rank is.
    """

    def __init__(self, limits: Limits) -> None:
        self.position = Position(limits)
        self._rank, self._limits = dist.get_rank(), limits
        self._period = _PERIOD_SECONDS * max(1.0, dist.get_world_size() / _RANKS_PER_PERIOD)
        # Counts only while this process runs: a job that its scheduler suspends for hours does not hang.
        self._now = 0.0
        self._last_beat, self._last_progress = -1, 0.0
        name = f"rank {self._rank} (host {socket.gethostname()})"
        command = [sys.executable, "-I", "-S", str(Path(reaper.__file__)), str(limits.hang), name]
        self._reaper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        assert self._reaper.stdin is not None
        self._pipe = self._reaper.stdin
        os.set_blocking(self._pipe.fileno(), False)
        self._feed_reaper(self.position.limit)
        self.position.limit_changed = self._feed_reaper
        self._stop_recording = record_collectives(self.position)
        self._closed, self._leaving = threading.Event(), threading.Event()
        self._board = Board(self._publish, self._period, lambda: self._now)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Watch no more."""
        self._closed.set()
        self._thread.join()
        self._board.close()
        self._stop_recording()
        self.position.limit_changed = lambda limit: None
        self._pipe.close()
        self._reaper.wait()

    def explain(self, error: RuntimeError) -> str | None:
        """What is to be said of an error of a collective, once it is clear who is gone; None for another error."""
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            return None
        where = Whereabouts.of(self.position, self._stalled, with_stack=False)
        deadline = self._now + (_SILENT_PERIODS + 1) * self._period
        while self._now < deadline and not self._board.silent(self._silent_after):
            time.sleep(self._period / 4)
        if self._leaving.is_set():
            threading.Event().wait()  # the watchdog's thread has the last word
        reason = str(error).strip().splitlines()[0].split(". ")[0]
        newest = f", last collective {where.last}" if where.last is not None else ""
        return f"a collective failed in {where.place}{newest}: {reason}\n{self._told()}"

    @property
    def rank_0_is_silent(self) -> bool:
        """Whether rank 0 cannot be the one that speaks."""
        return self._rank != 0 and bool(self._board.silent(self._silent_after))

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(self._period):
            now = time.monotonic()
            self._now, before = self._now + min(now - before, 2 * self._period), now
            self._feed_reaper(self.position.limit)
            if self.position.beats != self._last_beat:
                self._last_beat, self._last_progress = self.position.beats, self._now
            if self._board.verdict and self._rank != 0:
                self._leave()
            if self._stalled >= self.position.limit and self._is_hang():
                self._say_and_leave()

    @property
    def _stalled(self) -> float:
        return self._now - self._last_progress

    def _is_hang(self) -> bool:
        """Whether the others give no reason to wait on: one in a phase that may take longer, or rank 0's verdict."""
        seen = self._board.sightings().values()
        alive = [sighting.said for sighting in seen if sighting.said and sighting.age <= self._silent_after]
        limit = max([self.position.limit, *(said.limit for said in alive)])
        if self._rank != 0 and alive:
            limit *= _LONGER
        return self._stalled >= limit

    def _say_and_leave(self) -> NoReturn:
        self._leaving.set()
        text = (
            f"no progress for {self._stalled:.0f} s, of {self.position.limit:g} s allowed here "
            f"(remoe.train.hang_timeout = {self._limits.hang:g} s in a step; DEEPSPEED_TIMEOUT = "
            f"{self._limits.collective / 60:g} minutes otherwise); rank {self._rank} ends the run:\n{self._told()}"
        )
        # Past Python's streams, whose locks a thread that hangs may hold.
        os.write(2, f"{_SHOW_CURSOR if os.isatty(2) else ''}\n{text}\n".encode())
        if self._rank == 0:
            self._board.post_verdict(text, patience=2 * self._period)
            time.sleep(2 * self._period)  # the launcher may end the others as soon as this one has ended
        self._leave()

    def _leave(self) -> NoReturn:
        os._exit(HUNG)  # the main thread may be in a call that never returns

    def _told(self) -> str:
        sightings = {**self._board.sightings(), self._rank: self._own()}
        return tell(dict(sorted(sightings.items())), self._silent_after)

    def _own(self) -> Sighting:
        return Sighting(Whereabouts.of(self.position, self._stalled, with_stack=self._stalled > 0), 0.0)

    def _publish(self) -> str:
        own = Whereabouts.of(self.position, self._stalled, with_stack=self._stalled >= _STACK_AFTER_SECONDS)
        return own.to_json()

    @property
    def _silent_after(self) -> float:
        return _SILENT_PERIODS * self._period

    def _feed_reaper(self, limit: float) -> None:
        with contextlib.suppress(BrokenPipeError, BlockingIOError):  # somebody ended it, or stopped it
            os.write(self._pipe.fileno(), f"{limit}\n".encode())
