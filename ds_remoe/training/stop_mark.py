"""A file in the run's folder which says that its last session was asked to stop, saved, and ended.

Whoever looks after a run cannot learn that from the launcher: DeepSpeed's ends with 1 when it was itself asked to stop,
however well the ranks ended, and with 0 when a signal killed one of its own processes.
"""

from __future__ import annotations

from pathlib import Path

STOP_MARK = ".stopped"


def mark_stop(folder: Path, asked_by: str) -> None:
    """Say that this session has saved and ends, asked by a signal of this name."""
    (folder / STOP_MARK).write_text(asked_by, encoding="utf-8")


def clear_stop_mark(folder: Path) -> None:
    """A session begins."""
    (folder / STOP_MARK).unlink(missing_ok=True)


def stopped_by(folder: Path) -> str | None:
    """The signal that ended the last session; None where it ended by itself, failed, or has not ended."""
    try:
        return (folder / STOP_MARK).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
