"""The folder of a run's checkpoints: which there are, which is latest, and in what state each of them is."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ds_remoe.training.checkpoint_files import Advance, file_problem, size_problem, unnamed_problems
from ds_remoe.training.manifest import MANIFEST, TAG, CheckpointError, Manifest, sync_folder, write_atomically

LATEST = "latest"
State = Literal["good", "damaged", "incomplete"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inspection:
    """What one look at a checkpoint found.

    Attributes:
        path: its folder.
        manifest: None where it is missing or damaged.
        state: "incomplete" has no manifest, as its save did not finish; "damaged" differs from its manifest.
        problems: what is wrong, a line each; empty for a good one.
        size: bytes of all files that are there.
    """

    path: Path
    manifest: Manifest | None
    state: State
    problems: tuple[str, ...]
    size: int


def inspect(checkpoint: Path, *, contents: bool, advance: Advance | None = None) -> Inspection:
    """Compare a checkpoint with its manifest, by the files' sizes alone or by their whole contents."""
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    try:
        manifest = Manifest.read(checkpoint)
    except CheckpointError as error:
        state: State = "damaged" if (checkpoint / MANIFEST).exists() else "incomplete"
        return Inspection(checkpoint, None, state, (str(error),), size)
    found = [
        file_problem(checkpoint, name, record, advance=advance) if contents else size_problem(checkpoint, name, record)
        for name, record in manifest.files.items()
    ]
    problems = (*(problem for problem in found if problem is not None), *unnamed_problems(checkpoint, manifest))
    return Inspection(checkpoint, manifest, "damaged" if problems else "good", problems, size)


@dataclass(frozen=True)
class CheckpointFolder:
    """A run's checkpoints, a folder each, named by step, and the pointer `latest`, a file that holds a name."""

    path: Path

    def all(self) -> list[Path]:
        """The checkpoints by step, whole or not."""
        if not self.path.is_dir():
            return []
        return sorted(path for path in self.path.iterdir() if path.is_dir() and TAG.fullmatch(path.name))

    def complete(self) -> list[Path]:
        """Those whose save finished."""
        return [path for path in self.all() if (path / MANIFEST).exists()]

    def what_exists(self) -> str:
        """For messages: the names of the complete ones."""
        tags = [path.name for path in self.complete()]
        return f"there are {', '.join(tags)}" if tags else "there are no checkpoints"

    def latest(self) -> Path | None:
        """The checkpoint that the pointer names; None where none was ever completed.

        A first save that was killed between its manifest and the pointer counts as the latest.

        Raises:
            CheckpointError: there are checkpoints, but no pointer, or it cannot be read or names none of them.
        """
        pointer, complete = self.path / LATEST, self.complete()
        if not pointer.exists():
            if len(complete) > 1:
                raise CheckpointError(f"{pointer}: missing, but {self.what_exists()}; name one with --resume TAG")
            return complete[0] if complete else None
        try:
            tag = pointer.read_text(encoding="utf-8", errors="replace").strip()
        except OSError as error:
            reason = f"cannot be read ({error.strerror}), but {self.what_exists()}"
            raise CheckpointError(f"{pointer}: {reason}; name one with --resume TAG") from error
        if not TAG.fullmatch(tag) or not (self.path / tag).is_dir():
            raise CheckpointError(
                f"{pointer} = {tag[:80]!r}: names no checkpoint, and {self.what_exists()}; name one with --resume TAG"
            )
        return self.path / tag

    def point_to(self, checkpoint: Path) -> None:
        """Move `latest`, atomically."""
        write_atomically(self.path / LATEST, checkpoint.name)

    def remove(self, checkpoints: Sequence[Path]) -> None:
        """Remove checkpoints, the manifest first, so that one half removed does not pass for a damaged one.

        Of one that is a symbolic link, the link goes and what it points to stays whole. What cannot be removed (NFS
        keeps files that another process reads) is left incomplete, with a warning.
        """
        for checkpoint in checkpoints:
            try:
                if checkpoint.is_symlink():
                    checkpoint.unlink()
                    continue
                (checkpoint / MANIFEST).unlink(missing_ok=True)
                sync_folder(checkpoint)
                shutil.rmtree(checkpoint)
            except OSError as error:
                _log.warning("%s: not removed completely (%s)", checkpoint, error)
        if checkpoints:
            sync_folder(self.path)


@dataclass(frozen=True)
class Pruning:
    """What a clean-up keeps and removes.

    Attributes:
        kept: by step.
        removed: by step, as they were found; those older than the ones to keep were not read (state None).
        latest: where the pointer goes; None if it stays.
    """

    kept: tuple[Path, ...]
    removed: tuple[tuple[Path, State | None], ...]
    latest: Path | None


def plan_pruning(folder: CheckpointFolder, keep: int, advance: Advance | None = None) -> Pruning:
    """Keep the `keep` newest good checkpoints and the one that `latest` names if it is good; remove the others.

    Args:
        folder: no run uses it.
        keep: at least 1.
        advance: takes the bytes read, as the contents are checked until enough good ones are found.

    Raises:
        CheckpointError: none is good, so that nothing may be removed.
    """
    try:
        latest = folder.latest()
    except CheckpointError:
        latest = None
    states: dict[Path, State] = {}
    good: list[Path] = []
    for checkpoint in reversed(folder.all()):
        if len(good) < keep or checkpoint == latest:
            states[checkpoint] = inspect(checkpoint, contents=True, advance=advance).state
            if states[checkpoint] == "good":
                good.append(checkpoint)
    if not good:
        raise CheckpointError(f"{folder.path}: has no good checkpoint, so nothing is removed")
    removed = tuple((path, states.get(path)) for path in folder.all() if path not in good)
    if latest in good:
        return Pruning(tuple(sorted(good)), removed, None)
    older = [path for path in good if latest is None or path < latest]
    return Pruning(tuple(sorted(good)), removed, max(older or good))


def prune(folder: CheckpointFolder, plan: Pruning) -> None:
    """Do what was planned; the pointer moves before anything goes."""
    if plan.latest is not None:
        folder.point_to(plan.latest)
    folder.remove([path for path, _ in plan.removed])
