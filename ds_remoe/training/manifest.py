"""The manifest of a checkpoint: the topology and model it was saved with, written last and atomically."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

MANIFEST = "ds_remoe_manifest.json"
FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used as asked; the message says which, why, and what to do."""


@dataclass(frozen=True)
class RunIdentity:
    """What has to be the same for a resume to continue the same run.

    Attributes:
        world_size, ep_size, zero_stage: the topology that DeepSpeed's files are cut for.
        dtype: "fp32", "bf16" or "fp16".
        micro_batch_size, gradient_accumulation_steps: they decide which samples share a step and a micro-batch.
        optimizer: type of the optimizer.
        seed: of the order of samples.
        data: fingerprint of the token store.
        model, moe, sparsity: these sections of the configuration.
    """

    world_size: int
    ep_size: int
    zero_stage: int
    dtype: str
    micro_batch_size: int
    gradient_accumulation_steps: int
    optimizer: str
    seed: int
    data: str
    model: dict[str, Any]
    moe: dict[str, Any]
    sparsity: dict[str, Any]


@dataclass(frozen=True)
class Manifest:
    """One complete checkpoint.

    Attributes:
        step: optimizer steps done.
        samples: sequences seen.
        identity: of the run that saved it.
        wandb_run_id: to continue the same W&B run; None without W&B.
        versions: of ds_remoe, deepspeed and torch.
        files: size in bytes of each file of the checkpoint, by path relative to it.
    """

    step: int
    samples: int
    identity: RunIdentity
    wandb_run_id: str | None
    versions: dict[str, str]
    files: dict[str, int]

    def write(self, folder: Path) -> None:
        """Put the manifest into a folder whose files are complete; it appears whole or not at all."""
        write_atomically(folder / MANIFEST, json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check the form.

        Raises:
            CheckpointError: there is none, or it is not of this format.
        """
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(
                f"{folder}: has no {MANIFEST}, so its save did not finish; resume from another one"
            ) from None
        except ValueError as error:
            raise CheckpointError(f"{path}: not JSON ({error}); resume from another checkpoint") from None
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise CheckpointError(f"{path}: not a manifest of format {FORMAT}; it was saved by another release")
        try:
            return cls(**{**content, "identity": RunIdentity(**content["identity"])})
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: {error}; it was saved by another release") from None

    def check_files(self, folder: Path) -> None:
        """Compare the files on the disk with the manifest.

        Raises:
            CheckpointError: naming the first file that is missing or has another size.
        """
        for name, size in self.files.items():
            path = folder / name
            if not path.is_file():
                raise CheckpointError(f"{path}: missing, though the manifest names it; resume from another checkpoint")
            if path.stat().st_size != size:
                raise CheckpointError(
                    f"{path}: {path.stat().st_size} bytes, but {size} were saved; resume from another checkpoint"
                )

    def check_identity(self, current: RunIdentity, folder: Path) -> None:
        """Refuse to continue another run's checkpoint.

        Raises:
            CheckpointError: naming every field that differs, with both values.
        """
        lines = []
        for field in fields(RunIdentity):
            saved, now = getattr(self.identity, field.name), getattr(current, field.name)
            if isinstance(saved, dict):
                keys = sorted(saved.keys() | now.keys())
                lines += [
                    f"{field.name}.{key}: the checkpoint has {saved.get(key)!r}, this run {now.get(key)!r}"
                    for key in keys
                    if saved.get(key) != now.get(key)
                ]
            elif saved != now:
                lines.append(f"{field.name}: the checkpoint has {saved!r}, this run {now!r}")
        if lines:
            listing = "\n  ".join(lines)
            raise CheckpointError(
                f"{folder}: cannot be resumed by this run, as they differ in\n  {listing}\n"
                "Launch with the checkpoint's values, or give this run another remoe.train.output_dir"
            )


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that is on the disk, whole, when this returns; a kill leaves the old file or none."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Force a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
