"""Checkpoints: DeepSpeed's files, each rank's random state, a manifest written last, and a pointer moved after it."""

from __future__ import annotations

import pickle
import shutil
import socket
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from rich.filesize import decimal

import ds_remoe
from ds_remoe.deepspeed_checkpoint_io import Writes, loading_values_only, recording_writes
from ds_remoe.deepspeed_compat import refresh_learning_rate, schedule_may_be_new
from ds_remoe.deepspeed_optimizer_state import configured_hyperparameters
from ds_remoe.training.agreement import gathered, on_rank_0
from ds_remoe.training.checkpoint_files import file_problem, record_file, share_out, unnamed_files, unnamed_problems
from ds_remoe.training.checkpoint_folder import LATEST, CheckpointFolder
from ds_remoe.training.manifest import (
    TAG,
    CheckpointError,
    CheckpointSaveError,
    FileRecord,
    Manifest,
    RunIdentity,
    sync_folder,
    tag_of,
)
from ds_remoe.training.random_state import random_state, restore_random_state


@dataclass(frozen=True)
class Choice:
    """A checkpoint that was checked, file by file, and is to be continued.

    Attributes:
        path: its folder.
        manifest: of it.
        notes: for the user: why newer ones were passed over, and what could not be checked.
    """

    path: Path
    manifest: Manifest
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _RankFiles:
    """What one rank wrote, or why it could not."""

    files: dict[str, FileRecord]
    error: str | None


class Checkpoints:
    """The checkpoints of one run; every rank calls every method.

    Args:
        folder: on a file system that all ranks share.
        identity: of this run.
        keep: newest checkpoints that stay.
    """

    def __init__(self, folder: Path, identity: RunIdentity, keep: int) -> None:
        self.folder = CheckpointFolder(folder)
        self.identity = identity
        self.keep = keep

    def save(self, engine: Any, step: int, samples: int, wandb_run_id: str | None) -> Path:
        """Save after optimizer step `step`; on return the checkpoint is complete and `latest` names it.

        A process killed at any moment leaves the previous checkpoint the latest: every rank flushes and hashes what it
        wrote, the manifest comes after all files, the pointer after the manifest, and what is no longer needed goes
        last: older checkpoints, and later ones, which were left by a save that was killed or by the line of training
        that this run has turned away from.

        Raises:
            CheckpointSaveError: on all ranks, where any of them could not write; the half-written folder is gone.
        """
        target = self.folder.path / tag_of(step)
        on_rank_0(partial(self._make_room, target))
        part = self._write(engine, target)
        parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(part, parts, dst=0)

        def complete() -> None:
            assert parts is not None
            self._complete(target, Manifest(step, samples, self.identity, wandb_run_id, _versions(), {}), parts)

        on_rank_0(complete)
        return target

    def choose(self, resume: str) -> Choice | None:
        """The checkpoint that `--resume` means, every file of it checked by one of the ranks.

        Args:
            resume: "auto" (the latest or, where that is damaged, the newest good one before it; None where there is
                none yet), "none" (None), or a tag such as "step00000100", which is taken or refused.

        Raises:
            CheckpointError: the tag does not exist or is damaged, none is good, the checkpoint is another run's, or
                "none" would overwrite checkpoints.
        """
        candidates = on_rank_0(partial(self._candidates, resume))
        passed_over: list[str] = []
        for path in candidates:
            try:
                manifest = on_rank_0(partial(Manifest.read, path))
            except CheckpointError as error:
                passed_over.append(_listing(f"{path.name} is damaged:", [str(error)]))
                continue
            manifest.check_identity(self.identity, path)
            problems = _check_files(path, manifest)
            if problems:
                passed_over.append(_listing(f"{path.name} is damaged:", problems))
                continue
            notes = [*passed_over, f"{path.name}, the newest good checkpoint, is used instead"] if passed_over else []
            if any(record.sha256 is None for record in manifest.files.values()):
                notes.append(f"{path}: its manifest, of format 1, has no hashes; only sizes could be checked")
            notes += [f"{path.name}: {change}" for change in manifest.describe_changes(self.identity)]
            return Choice(path, manifest, tuple(notes))
        if passed_over:
            remedy = "no good one is left" if resume == "auto" else "resume from another with --resume auto"
            raise CheckpointError("\n".join([*passed_over, f"{self.folder.what_exists()}; {remedy}"]))
        return None

    def load(self, engine: Any, choice: Choice) -> None:
        """Restore model, optimizer shards, scheduler, λ and random state; `latest` names this checkpoint from then on.

        Weight decay and the optimizer's other settings stay those of the run, and so does its schedule, at the step.

        Where other ranks have saved it, with another ep_size or ZeRO stage, its optimizer is resharded; the random
        state is then restored of the ranks that there were. No code in the files is run.

        Raises:
            CheckpointError: on all ranks, where one of them could not read its files, or `latest` cannot be written.
        """
        error: str | None = None
        try:
            self._read(engine, choice)
        except (OSError, EOFError, KeyError, RuntimeError, TypeError, ValueError, pickle.UnpicklingError) as failure:
            error = f"rank {dist.get_rank()}: {type(failure).__name__}: {failure}"
        errors = [text for text in gathered(error) if text is not None]
        if errors:
            raise CheckpointError(
                _listing(f"{choice.path}: cannot be read:", errors)
                + f"\n{self.folder.what_exists()}; resume from another with --resume TAG"
            )
        refresh_learning_rate(engine)
        on_rank_0(partial(self._point_to, choice.path))

    def _point_to(self, checkpoint: Path) -> None:
        try:
            self.folder.point_to(checkpoint)
        except OSError as error:
            reason = f"cannot be moved to {checkpoint.name} ({error}); make room or mend the cause"
            raise CheckpointSaveError(f"{self.folder.path / LATEST}: {reason}") from error

    def _make_room(self, target: Path) -> None:
        try:
            self.folder.path.mkdir(parents=True, exist_ok=True)
            if target.exists():
                self.folder.remove([target])
            target.mkdir()
        except OSError as error:
            raise CheckpointSaveError(f"{target}: cannot be made ({error})") from error

    def _write(self, engine: Any, target: Path) -> _RankFiles:
        """DeepSpeed's files and the random state of this rank, flushed and hashed."""
        records: dict[str, FileRecord] = {}
        with recording_writes(engine, self.folder.path) as writes:
            engine.save_checkpoint(str(self.folder.path), target.name, save_latest=False)
        state = target / _random_state_file()
        writes.write(state, lambda: torch.save(random_state(), state))

        def flush_and_hash(path: Path) -> None:
            records[str(path.relative_to(target))] = record_file(path)

        for path in writes.files:
            writes.attempt(path, partial(flush_and_hash, path))
        return _RankFiles(records, None if writes.error is None else _describe(writes))

    def _complete(self, target: Path, manifest: Manifest, parts: list[_RankFiles]) -> None:
        """On rank 0, all ranks' files being on the disk: manifest, pointer, and the removal of older checkpoints."""
        errors = [f"rank {rank}: {part.error}" for rank, part in enumerate(parts) if part.error is not None]
        for part in parts:
            manifest.files.update(part.files)
        try:
            if not errors:
                errors = self._not_shared(target, parts)
            if not errors:
                for path in unnamed_files(target, manifest.files):
                    manifest.files[str(path.relative_to(target))] = record_file(path)
                for folder in {(target / name).parent for name in manifest.files}:
                    sync_folder(folder)
                manifest.write(target)
                sync_folder(self.folder.path)
                self.folder.point_to(target)
        except (OSError, RuntimeError) as error:
            errors = [f"rank 0: {error}"]
        if errors:
            self.folder.remove([target])
            free = decimal(shutil.disk_usage(self.folder.path).free)
            raise CheckpointSaveError(
                _listing(f"{target}: the checkpoint of step {manifest.step} could not be saved:", errors)
                + f"\nWhat was written of it is removed ({free} free now); {self.folder.what_exists()}. Make room or "
                'mend the cause; remoe.train.on_save_error = "continue" trains on and tries again at the next interval'
            )
        self._prune(target)

    def _not_shared(self, target: Path, parts: list[_RankFiles]) -> list[str]:
        """Ranks whose files rank 0 does not see."""
        return [
            f"rank {rank}: wrote {name}, which rank 0 on {socket.gethostname()} does not see; remoe.train.output_dir "
            "must be one folder that all nodes share"
            for rank, part in enumerate(parts)
            for name in list(part.files)[:1]
            if not (target / name).is_file()
        ]

    def _read(self, engine: Any, choice: Choice) -> None:
        with loading_values_only(engine), configured_hyperparameters(engine), schedule_may_be_new(engine):
            path, _ = engine.load_checkpoint(str(choice.path.parent), choice.path.name)
        if path is None or engine.global_steps != choice.manifest.step:
            raise CheckpointError(
                f"DeepSpeed loaded step {engine.global_steps}, but the manifest says {choice.manifest.step}; the files "
                "are of another step"
            )
        state = choice.path / _random_state_file()
        if state.exists() or choice.manifest.identity.world_size == self.identity.world_size:
            restore_random_state(torch.load(state, weights_only=True))

    def _candidates(self, resume: str) -> list[Path]:
        """The checkpoints to try, best first."""
        folder = self.folder
        if resume == "none":
            if folder.complete():
                raise CheckpointError(
                    f"--resume none: {folder.path} holds checkpoints of an earlier run; remove it, choose another "
                    "remoe.train.output_dir, or resume with --resume auto"
                )
            return []
        if resume != "auto":
            chosen = folder.path / resume
            if not TAG.fullmatch(resume) or not chosen.is_dir():
                raise CheckpointError(f"--resume {resume}: {chosen} does not exist; {folder.what_exists()}")
            return [chosen]
        latest = folder.latest()
        # Later ones than the latest are of a line of training that the run has turned away from.
        return [] if latest is None else [latest, *(path for path in reversed(folder.complete()) if path < latest)]

    def _prune(self, newest: Path) -> None:
        line = [path for path in self.folder.complete() if path <= newest]
        self.folder.remove([path for path in self.folder.all() if path not in line[-self.keep :]])


def _check_files(checkpoint: Path, manifest: Manifest) -> list[str]:
    """What is wrong with a checkpoint, each rank reading its share of the bytes; the same list on every rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    found = [
        file_problem(checkpoint, name, manifest.files[name]) for name in share_out(manifest.files, world_size)[rank]
    ]
    problems = [problem for problem in found if problem is not None]
    if rank == 0:
        problems += unnamed_problems(checkpoint, manifest)
    return sorted(problem for part in gathered(problems) for problem in part)


def _describe(writes: Writes) -> str:
    """What went wrong in a rank's save, where, and how full the disk was."""
    reason = str(writes.error).strip().splitlines()[0]
    if str(writes.failed_at) not in reason:
        reason = f"{writes.failed_at}: {reason}"
    return f"{reason} ({decimal(writes.free_bytes)} were free then)"


def _listing(title: str, lines: list[str]) -> str:
    return "\n  ".join([title, *lines])


def _versions() -> dict[str, str]:
    return {
        "ds_remoe": ds_remoe.__version__,
        "deepspeed": deepspeed.__version__,
        "torch": str(torch.__version__),
    }


def _random_state_file() -> str:
    return f"random_state_rank_{dist.get_rank():05d}.pt"
