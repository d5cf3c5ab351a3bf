"""Checkpoints: DeepSpeed's files, each rank's random state, a manifest written last, and a pointer moved after it."""

from __future__ import annotations

import os
import pickle
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

import ds_remoe
from ds_remoe.deepspeed_compat import refresh_learning_rate
from ds_remoe.training.manifest import MANIFEST, CheckpointError, Manifest, RunIdentity, sync_folder, write_atomically

LATEST = "latest"
_TAG = re.compile(r"step(\d{8})")


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run, a folder each, named by step; every rank calls every method.

    Attributes:
        folder: on a file system that all ranks share.
        identity: of this run.
        keep: newest checkpoints that stay.
    """

    folder: Path
    identity: RunIdentity
    keep: int

    def save(self, engine: Any, step: int, samples: int, wandb_run_id: str | None) -> Path:
        """Save after optimizer step `step`; on return the checkpoint is complete and `latest` names it.

        A process killed at any moment leaves the previous checkpoint the latest: the manifest comes after all files,
        the pointer after the manifest, and what is no longer needed goes last: older checkpoints, and later ones, which
        were left by a save that was killed or by the line of training that this run has turned away from.
        """
        tag = f"step{step:08d}"
        target = self.folder / tag
        if dist.get_rank() == 0 and target.exists():
            shutil.rmtree(target)
        dist.barrier()
        engine.save_checkpoint(str(self.folder), tag, save_latest=False)
        torch.save(_random_state(), target / _random_state_file())
        dist.barrier()
        if dist.get_rank() == 0:
            files = sorted(path for path in target.rglob("*") if path.is_file())
            for path in files:
                _sync_file(path)
            Manifest(
                step=step,
                samples=samples,
                identity=self.identity,
                wandb_run_id=wandb_run_id,
                versions={
                    "ds_remoe": ds_remoe.__version__,
                    "deepspeed": deepspeed.__version__,
                    "torch": str(torch.__version__),
                },
                files={str(path.relative_to(target)): path.stat().st_size for path in files},
            ).write(target)
            write_atomically(self.folder / LATEST, tag)
            self._prune(target)
        dist.barrier()
        return target

    def choose(self, resume: str) -> Path | None:
        """The checkpoint that `--resume` means, decided by rank 0 for all.

        Args:
            resume: "auto" (the latest, or none where there is none yet), "none", or a tag such as "step00000100".

        Raises:
            CheckpointError: the tag does not exist, or "none" would overwrite checkpoints.
        """
        choice: list[Any] = [None]
        if dist.get_rank() == 0:
            try:
                choice[0] = self._choose(resume)
            except CheckpointError as error:
                choice[0] = error
        dist.broadcast_object_list(choice, src=0)
        if isinstance(choice[0], CheckpointError):
            raise choice[0]
        return choice[0]

    def load(self, engine: Any, checkpoint: Path) -> Manifest:
        """Restore model, optimizer shards, scheduler, λ and random state; `latest` names this checkpoint from then on.

        Raises:
            CheckpointError: the checkpoint is incomplete, damaged, or belongs to another run.
        """
        manifest = Manifest.read(checkpoint)
        manifest.check_identity(self.identity, checkpoint)
        manifest.check_files(checkpoint)
        try:
            path, _ = engine.load_checkpoint(str(checkpoint.parent), checkpoint.name)
            random_state = torch.load(checkpoint / _random_state_file(), weights_only=True)
        except (OSError, EOFError, KeyError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{checkpoint}: cannot be read ({type(error).__name__}: {error}); {self._what_exists()}, resume from "
                "another with --resume TAG"
            ) from error
        if path is None or engine.global_steps != manifest.step:
            raise CheckpointError(
                f"{checkpoint}: DeepSpeed loaded step {engine.global_steps}, but the manifest says {manifest.step}; "
                "its files are of another step. Resume from another checkpoint"
            )
        _restore_random_state(random_state)
        refresh_learning_rate(engine)
        if dist.get_rank() == 0:
            write_atomically(self.folder / LATEST, checkpoint.name)
        dist.barrier()
        return manifest

    def _choose(self, resume: str) -> Path | None:
        if resume == "none":
            if self._complete():
                raise CheckpointError(
                    f"--resume none: {self.folder} holds checkpoints of an earlier run; remove it, choose another "
                    "remoe.train.output_dir, or resume with --resume auto"
                )
            return None
        if resume != "auto":
            chosen = self.folder / resume
            if not _TAG.fullmatch(resume) or not chosen.is_dir():
                raise CheckpointError(f"--resume {resume}: {chosen} does not exist; {self._what_exists()}")
            return chosen
        return self._latest()

    def _latest(self) -> Path | None:
        pointer = self.folder / LATEST
        if not pointer.exists():
            if self._complete():
                raise CheckpointError(f"{pointer}: missing, but {self._what_exists()}; name one with --resume TAG")
            return None
        tag = pointer.read_text(encoding="utf-8", errors="replace").strip()
        if not _TAG.fullmatch(tag) or not (self.folder / tag).is_dir():
            raise CheckpointError(
                f"{pointer} = {tag[:80]!r}: names no checkpoint, and {self._what_exists()}; name one with --resume TAG"
            )
        return self.folder / tag

    def _complete(self) -> list[Path]:
        return [path for path in self._all() if (path / MANIFEST).exists()]

    def _what_exists(self) -> str:
        tags = [path.name for path in self._complete()]
        return f"there are {', '.join(tags)}" if tags else "there are no checkpoints"

    def _all(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if path.is_dir() and _TAG.fullmatch(path.name))

    def _prune(self, newest: Path) -> None:
        line = [path for path in self._complete() if path <= newest]
        for path in self._all():
            if path not in line[-self.keep :]:
                shutil.rmtree(path)
        sync_folder(self.folder)


def _random_state_file() -> str:
    return f"random_state_rank_{dist.get_rank():05d}.pt"


def _random_state() -> dict[str, Any]:
    numpy_state: Any = np.random.get_state(legacy=False)
    inner = numpy_state["state"]
    return {
        "torch": torch.get_rng_state(),
        "device": get_accelerator().get_rng_state(),
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": {"key": inner["key"].tolist(), "pos": int(inner["pos"])}},
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    get_accelerator().set_rng_state(state["device"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy_state = state["numpy"]
    key = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy_state, "state": {**numpy_state["state"], "key": key}})


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
