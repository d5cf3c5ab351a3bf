"""Restarts a run that failed, from its last good checkpoint, until it is done or there is no sense in it.

torchrun's agent does not serve here. It starts the ranks itself, one agent a node with a rendezvous of their own, so it
would take the place of DeepSpeed's launcher (hostfile, pdsh, `.deepspeed_env`, Slurm) rather than look after it; it
restarts at once after any exit code, 2 included, and knows no step, so that a run which fails at the same place uses up
all its restarts; and asked to stop, it ends with an error although the ranks have saved. DeepSpeed's own agent is gone
since 0.19.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType

from ds_remoe.config.leave import WRONG_INPUT
from ds_remoe.launching.hosts import Host
from ds_remoe.launching.processes import TOKEN_VARIABLE, ask_ranks_to_stop, marked
from ds_remoe.launching.watcher import Watcher, end_everywhere

FAILED = 1
LAUNCHER_STOPPED = 1
"""Exit code of DeepSpeed's launchers when they were asked to stop."""
LONGEST_BACKOFF = 600.0
_POLL_SECONDS = 0.1


class CommandError(Exception):
    """The system does not run the command; the message says why, and the remedy."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come, read from its folder.

    Attributes:
        step: the last step that stands in metrics.jsonl; 0 before the first.
        saved_step: that of the checkpoint which `latest` names; None where there is none.
        mark: changes when a session takes the folder into use, which it does once all its ranks have met.
        stopped_by: the signal by which the last session that did so was asked to stop, as it says itself; None where it
            has not stopped so.
    """

    step: int
    saved_step: int | None
    mark: object
    stopped_by: str | None

    @property
    def is_saved(self) -> bool:
        """Whether a restart would lose no step."""
        return (self.saved_step or 0) == self.step


@dataclass(frozen=True)
class Policy:
    """When to give up, and how long to wait.

    Attributes:
        max_restarts: in all.
        backoff: seconds before a restart; doubled for each attempt in a row that got no further than the one before,
            up to 10 minutes.
        grace: seconds in which ranks that were asked to stop must have saved, before they are killed.
    """

    max_restarts: int
    backoff: float
    grace: float


class Supervisor:
    """Runs a command again and again.

    Args:
        command: of a launcher; by itself it must continue from the last good checkpoint.
        policy: of restarts.
        look: reads the run's progress.
        hosts: other nodes that the command starts ranks on by ssh.
    """

    def __init__(
        self, command: Sequence[str], policy: Policy, look: Callable[[], Progress], hosts: Sequence[Host] = ()
    ) -> None:
        self.command, self.policy, self.look, self.hosts = list(command), policy, look, hosts
        self._token = secrets.token_hex(16)
        self._asked_by: str | None = None

    def run(self) -> int:
        """Run to the end.

        SIGTERM and SIGINT are passed on to the ranks, which save; a second SIGINT kills them.

        Returns:
            0: done, or stopped when asked and saved. 2: refused as configured. 1: given up, or stopped without a save
            or while a failed run waited for its restart.

        Raises:
            CommandError: the command cannot be started.
        """
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._remember)
        watcher = Watcher(self._token, self.policy.grace, self.hosts)
        try:
            return self._run(watcher)
        finally:
            end_everywhere(self._token, 0.0, self.hosts)
            watcher.dismiss()

    def _run(self, watcher: Watcher) -> int:
        failed_at: int | None = None
        furthest, fruitless = self.look().step, 0
        for restarts in range(self.policy.max_restarts + 1):
            before = self.look()
            code, orphans = self._attempt(watcher)
            after = self.look()
            began = after.mark != before.mark
            if self._asked_by is None:
                self._asked_by = _who_asked(code, orphans, after.stopped_by if began else None)
            if self._asked_by is not None:
                return self._stopped(after)
            if code == 0 and not orphans and after.is_saved:
                return 0
            if code == WRONG_INPUT:
                if self.policy.max_restarts > 0:
                    self._say(
                        "exit code 2: configuration, data or checkpoint cannot be used as they are; not restarted"
                    )
                return WRONG_INPUT
            self._say(_what_failed(code, orphans, after))
            if began and failed_at == after.step:
                self._say(
                    f"it failed after step {after.step} before, too: a restart would not help. See the ranks' output "
                    f"above, and `ds-remoe checkpoint list` for a checkpoint to go back to (--resume TAG)"
                )
                return FAILED
            failed_at = after.step if began else failed_at
            if self.policy.max_restarts == 0:
                return FAILED
            if restarts == self.policy.max_restarts:
                self._say(f"gave up after {restarts} restarts (--max-restarts)")
                return FAILED
            fruitless = 0 if after.step > furthest else fruitless + 1
            furthest = max(furthest, after.step)
            seconds = min(self.policy.backoff * 2 ** max(0, fruitless - 1), LONGEST_BACKOFF)
            where = f"after step {after.saved_step}" if after.saved_step else "from the start"
            left = self.policy.max_restarts - restarts
            self._say(f"goes on {where} in {seconds:g} s (restart {restarts + 1} of {restarts + left})")
            if not self._wait(seconds):
                self._say(f"stopped by {self._asked_by} while waiting to restart a run that failed")
                return FAILED
        raise AssertionError("the last attempt returns")

    def _attempt(self, watcher: Watcher) -> tuple[int, int]:
        """Run the command once: its exit code, and the ranks that outlived it."""
        environment = {**os.environ, TOKEN_VARIABLE: self._token}
        # A session of its own: Ctrl-C must reach the ranks through this process alone, or the launcher ends them.
        try:
            process = subprocess.Popen(self.command, env=environment, start_new_session=True, stdin=subprocess.DEVNULL)
        except OSError as error:
            reason = f"cannot be run ({error.strerror}); give its path, or start a script with bash"
            raise CommandError(f"COMMAND {self.command[0]!r}: {reason}") from None
        asked = False
        while True:
            try:
                code = process.wait(_POLL_SECONDS)
                break
            except subprocess.TimeoutExpired:
                watcher.ensure()
            if self._asked_by is not None and not asked:
                asked = True
                self._stop_ranks(process)
        return code, end_everywhere(self._token, self.policy.grace, self.hosts)

    def _stop_ranks(self, process: subprocess.Popen[bytes]) -> None:
        self._say(f"{self._asked_by}: the ranks save and end; {self.policy.grace:g} s at most")
        if self.hosts:
            end_everywhere(self._token, self.policy.grace, self.hosts)
            return
        asked = set[int]()
        if not ask_ranks_to_stop(self._token, asked):  # none was started yet
            process.terminate()
        deadline = time.monotonic() + self.policy.grace
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            ask_ranks_to_stop(self._token, asked)
        if process.poll() is None:
            self._say(f"{len(marked(self._token))} processes are still there after {self.policy.grace:g} s; killed")
            end_everywhere(self._token, 0.0, ())

    def _stopped(self, progress: Progress) -> int:
        if progress.is_saved:
            self._say(f"stopped by {self._asked_by}; saved after step {progress.step}")
            return 0
        kept = f"that of step {progress.saved_step}" if progress.saved_step else "none"
        self._say(f"stopped by {self._asked_by} after step {progress.step}, not saved; the last checkpoint is {kept}")
        return FAILED

    def _wait(self, seconds: float) -> bool:
        """Sleep; false where a signal asked to stop meanwhile."""
        deadline = time.monotonic() + seconds
        while self._asked_by is None and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        return self._asked_by is None

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self._asked_by == "SIGINT":
            self.policy = Policy(0, 0.0, 0.0)
            end_everywhere(self._token, 0.0, self.hosts)
        self._asked_by = signal.Signals(signum).name

    @staticmethod
    def _say(text: str) -> None:
        print(f"supervise: {text}", file=sys.stderr, flush=True)


def _who_asked(code: int, orphans: int, stopped_by: str | None) -> str | None:
    """The signal, where somebody else asked the run to stop and it did; None where it failed.

    Orphans stop because this supervisor asks them to. So there only the launcher can tell: it was ended by SIGTERM or
    SIGINT, or caught it, and then ends with 1; had a rank failed, its peers could not have saved.
    """
    if stopped_by is not None and (orphans == 0 or code == LAUNCHER_STOPPED):
        return stopped_by
    # Not 128 + SIGTERM: srun ends so, too, when one task failed and it ended the others.
    return f"{signal.Signals(-code).name} to the launcher" if -code in (signal.SIGTERM, signal.SIGINT) else None


def _what_failed(code: int, orphans: int, progress: Progress) -> str:
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    if orphans:
        how += f"; the launcher was gone and {orphans} of its ranks were not, they were ended"
    elif code == 0:
        how += f", but step {progress.step} is not saved: the launcher's code hides that it was killed"
    return f"the run failed after step {progress.step} ({how})"
