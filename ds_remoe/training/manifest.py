"""The manifest of a checkpoint: its files and the topology and model it was saved with, written last and atomically."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ds_remoe.training.topology import Topology

MANIFEST = "ds_remoe_manifest.json"
TAG = re.compile(r"step(\d{8})")
FORMAT = 2
_SIZES_ONLY_FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used as asked; the message says which, why, and what to do."""


class CheckpointSaveError(CheckpointError):
    """A checkpoint could not be saved; nothing half-written is left, and the earlier ones are as they were."""


def tag_of(step: int) -> str:
    """Name of the checkpoint after optimizer step `step`."""
    return f"step{step:08d}"


EXECUTION_SETTINGS = frozenset({"ep_size", "activation_budget", "wire_dtype", "hierarchical_all_to_all"})
"""Settings of `remoe.moe` that say where and how experts are computed, not what they compute."""
_SPREAD = frozenset({"world_size", "ep_size", "zero_stage", "micro_batch_size", "gradient_accumulation_steps"})
_MAY_CHANGE = _SPREAD | {"scheduler"}


@dataclass(frozen=True)
class RunIdentity:
    """What a run is, and how it is spread over ranks.

    A resume continues the same run where all is the same but the schedule, which it may change on its way, and how the
    work is spread: the topology, the split of the global batch, and the settings `EXECUTION_SETTINGS` of `moe`.

    Attributes:
        world_size, ep_size, zero_stage: the topology that DeepSpeed's files are cut for.
        dtype: "fp32", "bf16" or "fp16".
        micro_batch_size, gradient_accumulation_steps: with the world size, which samples share a step.
        optimizer: type of the optimizer.
        seed: of the order of samples.
        data: fingerprint of the token store.
        model, moe, sparsity: these sections of the configuration.
        scheduler: type of the learning-rate schedule, "none" without one; None in manifests that do not tell.
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
    scheduler: str | None = None

    @property
    def topology(self) -> Topology:
        """What the files are cut for."""
        return Topology(self.world_size, self.ep_size, self.zero_stage)

    @property
    def global_batch(self) -> int:
        """Sequences of an optimizer step."""
        return self.micro_batch_size * self.gradient_accumulation_steps * self.world_size


@dataclass(frozen=True)
class FileRecord:
    """One file as it was saved.

    Attributes:
        size: in bytes.
        sha256: of the content, 64 hexadecimal digits; None in a manifest of format 1, which kept sizes only.
    """

    size: int
    sha256: str | None


@dataclass(frozen=True)
class Manifest:
    """One complete checkpoint.

    Attributes:
        step: optimizer steps done.
        samples: sequences seen.
        identity: of the run that saved it.
        wandb_run_id: to continue the same W&B run; None without W&B.
        versions: of ds_remoe, deepspeed and torch.
        files: each file of the checkpoint but the manifest, by path relative to it.
    """

    step: int
    samples: int
    identity: RunIdentity
    wandb_run_id: str | None
    versions: dict[str, str]
    files: dict[str, FileRecord]

    def write(self, folder: Path) -> None:
        """Put the manifest, with a checksum of its own, into a folder whose files are complete; whole or not at all."""
        content = {"format": FORMAT, **asdict(self)}
        write_atomically(folder / MANIFEST, json.dumps({**content, "sha256": _checksum(content)}, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check the form.

        Raises:
            CheckpointError: there is none, it is damaged, of another format, or of another step than the folder.
        """
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{folder}: has no {MANIFEST}, so its save did not finish") from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error})") from error
        except ValueError as error:
            raise CheckpointError(f"{path}: damaged: not JSON ({error})") from None
        if not isinstance(content, dict) or content.get("format") not in (_SIZES_ONLY_FORMAT, FORMAT):
            raise CheckpointError(
                f"{path}: not a manifest of format {_SIZES_ONLY_FORMAT} or {FORMAT}; it is damaged or was saved by "
                "another release"
            )
        if content["format"] == FORMAT and content.pop("sha256", None) != _checksum(content):
            raise CheckpointError(f"{path}: damaged: its content is not what was saved (SHA-256)")
        try:
            manifest = cls._from_json(content)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: {error}; it was saved by another release") from None
        if TAG.fullmatch(folder.name) and tag_of(manifest.step) != folder.name:
            raise CheckpointError(f"{path}: of another checkpoint: it says step {manifest.step}")
        return manifest

    @classmethod
    def _from_json(cls, content: dict[str, Any]) -> Manifest:
        values = {key: value for key, value in content.items() if key != "format"}
        if content["format"] == _SIZES_ONLY_FORMAT:
            files = {name: FileRecord(size, None) for name, size in values["files"].items()}
        else:
            files = {name: FileRecord(**record) for name, record in values["files"].items()}
        return cls(**{**values, "identity": RunIdentity(**values["identity"]), "files": files})

    def check_identity(self, current: RunIdentity, folder: Path) -> None:
        """Refuse to continue another run's checkpoint.

        Raises:
            CheckpointError: naming every field that differs, with both values.
        """
        lines = []
        for field in fields(RunIdentity):
            saved, now = getattr(self.identity, field.name), getattr(current, field.name)
            if isinstance(saved, dict):
                ignored = EXECUTION_SETTINGS if field.name == "moe" else frozenset()
                lines += [
                    f"{field.name}.{key}: the checkpoint has {saved.get(key)!r}, this run {now.get(key)!r}"
                    for key in sorted((saved.keys() | now.keys()) - ignored)
                    if saved.get(key) != now.get(key)
                ]
            elif saved != now and field.name not in _MAY_CHANGE:
                what = " (fingerprint of corpus, tokenizer and split)" if field.name == "data" else ""
                lines.append(f"{field.name}{what}: the checkpoint has {saved!r}, this run {now!r}")
        saved, now = self.identity.global_batch, current.global_batch
        if saved != now:
            parts = "micro-batch size * gradient accumulation steps * ranks"
            steps, rest = divmod(saved, current.micro_batch_size * current.world_size)
            remedy = "" if rest else f"; --set gradient_accumulation_steps={steps} keeps it"
            lines.append(f"global batch ({parts}): the checkpoint has {saved}, this run {now}{remedy}")
        if lines:
            listing = "\n  ".join(lines)
            raise CheckpointError(
                f"{folder}: cannot be resumed by this run, as they differ in\n  {listing}\n"
                "Launch with the checkpoint's values, or give this run another remoe.train.output_dir"
            )

    def describe_changes(self, current: RunIdentity) -> list[str]:
        """What a run that may resume this checkpoint does differently, for the user."""
        saved, notes = self.identity, []
        if saved.topology != current.topology:
            notes.append(f"saved by {saved.topology}; resharded for {current.topology}")
        if saved.micro_batch_size != current.micro_batch_size:
            notes.append(
                f"the micro-batch size was {saved.micro_batch_size} and is {current.micro_batch_size} now: balance "
                "weights are taken per micro-batch, so the losses are not those of a run without the change"
            )
        if saved.scheduler not in (None, current.scheduler):
            follows = "optimizer.params.lr" if current.scheduler == "none" else "it, at the step reached"
            change = f"was {saved.scheduler} and is {current.scheduler} now"
            notes.append(f"the scheduler {change}: the learning rate follows {follows}")
        return notes


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that is on the disk, whole, on return; a kill or an error leaves the old one or none."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Force a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(content: dict[str, Any]) -> str:
    """SHA-256 of a manifest's values, however they are laid out in the file."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
