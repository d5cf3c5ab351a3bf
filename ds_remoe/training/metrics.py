"""metrics.jsonl: one JSON object per optimizer step, always written, and continued exactly by a resumed run."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from ds_remoe.training.record import RecordError, StepRecord

_STEP = re.compile(rb'\{"step": (\d+),')


class MetricsError(ValueError):
    """metrics.jsonl cannot be read or continued."""


class MetricsLog:
    """Appends step records to a metrics.jsonl, each line handed to the operating system before `append` returns.

    Args:
        path: a file that does not exist yet or is empty; its folder is made. A file with lines is refused with
            MetricsError, as only `MetricsLog.resume` knows how to continue one.
    """

    def __init__(self, path: Path) -> None:
        if path.exists() and path.stat().st_size > 0:
            raise MetricsError(
                f"{path} has the metrics of an earlier run: resume that run, or choose another remoe.train.output_dir"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        self._open(path, last_step=0)

    def _open(self, path: Path, last_step: int) -> None:
        self.path = path
        self._last_step = last_step
        self._file: BinaryIO = path.open("ab", buffering=0)

    @classmethod
    def resume(cls, path: Path, step: int) -> MetricsLog:
        """Continue a log from a checkpoint taken after optimizer step `step` (0: from the start).

        Lines after `step` are dropped, a half-written last line too; the others are kept byte for byte. The file
        is replaced as a whole, so that a kill at any moment leaves the old or the new one.

        Raises:
            MetricsError: the steps in the file are not 1, 2, 3, ..., or end before `step`.
        """
        if step < 0:
            raise MetricsError(f"cannot resume {path} after step {step}: steps count from 0")
        if step == 0 and not path.exists():
            return cls(path)
        if not path.exists():
            raise MetricsError(f"{path} is missing, but the checkpoint was taken after step {step}: restore the file")
        kept_bytes, last_step, unterminated = 0, 0, False
        for last_step, line in _numbered_lines(path):
            if last_step <= step:
                kept_bytes += len(line)
                unterminated = not line.endswith(b"\n")
        if last_step < step:
            raise MetricsError(
                f"{path} ends at step {last_step}, but the checkpoint was taken after step {step}: "
                "restore the file or resume from an earlier checkpoint"
            )
        if kept_bytes < path.stat().st_size or unterminated:
            _replace_with_prefix(path, kept_bytes, b"\n" if unterminated else b"")
        log = cls.__new__(cls)
        log._open(path, last_step=step)
        return log

    def append(self, record: StepRecord) -> None:
        """Write one record. MetricsError if it is not the step after the last one."""
        if record.step != self._last_step + 1:
            raise MetricsError(f"{self.path}: step {record.step} cannot follow step {self._last_step}")
        line = record.to_json().encode() + b"\n"
        written = self._file.write(line)
        if written != len(line):
            raise MetricsError(f"{self.path}: wrote {written} of {len(line)} bytes of step {record.step}: disk full?")
        self._last_step = record.step

    def sync(self) -> None:
        """Force the lines to the disk. Call it before a checkpoint counts as complete, so that it never is ahead."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close; a second call does nothing."""
        if not self._file.closed:
            self.sync()
            self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read(path: Path) -> list[StepRecord]:
    """All records of a metrics.jsonl, also of a run that is still writing: a half-written last line is left out.

    Raises:
        MetricsError: a line is not a StepRecord, or the steps are not 1, 2, 3, ...
    """
    records = []
    for step, line in _numbered_lines(path):
        try:
            records.append(StepRecord.from_json(line))
        except RecordError as error:
            raise MetricsError(f"{path}, line {step}: {error}") from error
    return records


def _numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(step, line with its newline) of every complete line, checked to be the steps 1, 2, 3, ..."""
    with path.open("rb") as file:
        for expected, line in enumerate(file, start=1):
            if not line.endswith(b"\n") and not _is_record(line):
                return
            match = _STEP.match(line)
            if match is None:
                raise MetricsError(f"{path}, line {expected}: not a step record: {line[:80]!r}")
            if int(match[1]) != expected:
                raise MetricsError(f"{path}, line {expected}: found step {int(match[1])}; steps must be 1, 2, 3, ...")
            yield expected, line


def _is_record(line: bytes) -> bool:
    try:
        StepRecord.from_json(line)
    except RecordError:
        return False
    return True


def _replace_with_prefix(path: Path, size: int, ending: bytes) -> None:
    """Atomically replace the file by its first `size` bytes followed by `ending`."""
    temporary = path.with_name(path.name + ".tmp")
    with path.open("rb") as source, temporary.open("wb") as target:
        shutil.copyfileobj(source, target)
        target.truncate(size)
        target.seek(size)
        target.write(ending)
        target.flush()
        os.fsync(target.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
