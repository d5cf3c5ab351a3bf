"""Progress of a long job on the terminal: a live bar where there is one, plain lines in a log file."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID
from rich.table import Column
from rich.text import Text

from ds_remoe.training.record import StepRecord


class JobProgress:
    """A job of `total` units; what it reports beside the bar is any text. Use it as a context manager.

    On a terminal it is a bar that redraws in place. Elsewhere (CI, a log file) it prints a plain line at the first and
    the last update and at most every `line_seconds` in between.

    Args:
        description: what is being done, for example "evaluation".
        total: units of the whole job, 0 if unknown.
        start: units that an earlier session has done.
        console: where to write; the default is standard output.
        enabled: False writes nothing; give it on every rank but 0.
        line_seconds: seconds between two plain lines.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        description: str,
        total: int,
        *,
        start: int = 0,
        console: Console | None = None,
        enabled: bool = True,
        line_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console()
        self._enabled = enabled
        self._description = description
        self._total = total
        self._start = start
        self._done = start
        self._line_seconds = line_seconds
        self._clock = clock
        self._began = clock()
        self._last_line: float | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._began = self._clock()
        if self._enabled and self._console.is_terminal:
            self._bar = Progress(
                BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
                _StatusColumn(table_column=Column(no_wrap=True)),
                console=self._console,
                expand=True,
            )
            self._task = self._bar.add_task(
                self._description, total=self._total or None, completed=self._start, status=self._line("")
            )
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def advance_to(self, done: int, status: str = "") -> None:
        """`done` units of the whole job are finished; `status` stands beside the bar or on the line."""
        self._done = done
        if not self._enabled:
            return
        text = self._line(status)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, status=text)
            return
        now = self._clock()
        if self._last_line is None or now - self._last_line >= self._line_seconds or done == self._total:
            self._last_line = now
            self._print_line(text)

    def message(self, text: str) -> None:
        """Print a line that stays, above the bar if there is one."""
        if self._enabled:
            self._print_line(text)

    @property
    def eta_seconds(self) -> float | None:
        """Seconds left at the mean speed of this session, all pauses included; None while that is unknown."""
        done_here = self._done - self._start
        if done_here <= 0 or self._total == 0:
            return None
        return (self._clock() - self._began) / done_here * (self._total - self._done)

    def _line(self, status: str) -> str:
        count = f"{self._done}/{self._total}" if self._total else f"{self._done}"
        eta = self.eta_seconds
        if eta is None:
            left = ""
        elif self._done >= self._total:
            left = f"in {format_seconds(self._clock() - self._began)}"
        else:
            left = f"ETA {format_seconds(eta)}"
        return "  ".join(part for part in (f"{self._description} {count}", status, left) if part)

    def _print_line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class TrainProgress(JobProgress):
    """Progress of a training run in optimizer steps: loss, sparsity against its target, λ, tokens/s, time left.

    Args:
        total_steps: optimizer steps of the whole run.
        start_step: steps done before this session (the resumed checkpoint's).
        target_sparsity: 1 - k/E; None leaves the target out.
        console, enabled, line_seconds, clock: as for JobProgress.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        target_sparsity: float | None = None,
        *,
        console: Console | None = None,
        enabled: bool = True,
        line_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(
            "step",
            total_steps,
            start=start_step,
            console=console,
            enabled=enabled,
            line_seconds=line_seconds,
            clock=clock,
        )
        self._target = target_sparsity

    def update(self, record: StepRecord) -> None:
        """Show one step; an evaluation leaves a line of its own."""
        self.advance_to(record.step, self._status(record))
        if record.valid_loss is not None:
            self.message(f"step {record.step}  valid loss {record.valid_loss:.4f}")

    def _status(self, record: StepRecord) -> str:
        parts = [f"loss {record.lm_loss:.3f}"]
        if record.skipped is not None:
            parts.append("skipped")
        if record.sparsity is not None:
            target = "" if self._target is None else f"/{self._target:.3f}"
            parts.append(f"S {record.sparsity:.3f}{target}")
        if record.l1_coefficient is not None:
            parts.append(f"λ {record.l1_coefficient:.1e}")
        parts.append(f"{format_count(record.tokens_per_second)} tok/s")
        return "  ".join(parts)


class _StatusColumn(ProgressColumn):
    """The status text, never wrapped: the bar gives way instead."""

    def render(self, task: Task) -> Text:
        return Text(str(task.fields.get("status", "")), no_wrap=True, overflow="ellipsis")


def format_seconds(seconds: float) -> str:
    """For example 0:07, 12:05, 3:20:00, 2d 4:00:00."""
    whole = max(0, round(seconds))
    days, rest = divmod(whole, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    if days:
        return f"{days}d {hours}:{minutes:02d}:{rest:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_count(value: float) -> str:
    """Three significant digits with k, M, B, T: 950, 12.3k, 1.20M."""
    if not math.isfinite(value):
        return str(value)
    for unit in ("", "k", "M", "B"):
        if abs(value) < 999.5:
            digits = 0 if not unit or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
            return f"{value:.{digits}f}{unit}"
        value /= 1000
    return f"{value:.3g}T"
