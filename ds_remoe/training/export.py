"""The weights of a checkpoint as safetensors, expert by expert, whatever ranks and ZeRO stage saved it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import ds_remoe
from ds_remoe.deepspeed_checkpoint_io import load_values
from ds_remoe.deepspeed_optimizer_state import MASTER, MODEL_FILE, saved_cut
from ds_remoe.model.exported import CONFIG, INDEX, WEIGHTS
from ds_remoe.moe.experts import DOWN, GATE, UP
from ds_remoe.training.manifest import CheckpointError, Manifest, sync_folder, write_atomically
from ds_remoe.training.saved_optimizer import SavedOptimizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_EXPERT = re.compile(r"(?P<experts>.+\.deepspeed_experts)\.(?P<index>\d+)\.(?P<matrix>.+)")


class CheckpointWeights:
    """The weights of a checkpoint by their names in the state dict of the model with ep_size 1.

    Files are mapped into memory, so that a weight is read where it is asked for. Where the model was trained in bf16 or
    fp16, fp32 weights are the optimizer's masters.

    Args:
        checkpoint: its folder; the files were checked.
        manifest: of it.

    Attributes:
        shapes: of all weights, by name.
    """

    def __init__(self, checkpoint: Path, manifest: Manifest) -> None:
        self._checkpoint = checkpoint
        self._trained_in_fp32 = manifest.identity.dtype == "fp32"
        content = load_values(checkpoint / MODEL_FILE, "cpu", mmap=True)
        self._weights: dict[str, Tensor] = dict(content["module"])
        self._parameters = [name for name in self._weights if name not in content["buffer_names"]]
        for file in sorted(checkpoint.glob("layer_*_expert_*_mp_rank_00_model_states.pt"), key=_layer_and_expert):
            self._weights.update(load_values(file, "cpu", mmap=True))
        self.shapes = {name: tensor.shape for name, tensor in self._weights.items()}
        self._saved: SavedOptimizer | None = None

    def stored(self, name: str) -> Tensor:
        """A weight as the model had it."""
        return self._weights[name]

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A weight, contiguous."""
        stored = self._weights[name]
        if dtype != torch.float32 or self._trained_in_fp32 or stored.dtype == torch.float32:
            return stored.to(dtype, copy=True).contiguous()
        if self._saved is None:
            cut = saved_cut(self._checkpoint)
            assert cut is not None
            self._saved = SavedOptimizer(self._checkpoint, cut, self.optimizer_sizes())
        master = torch.empty(stored.numel())
        self._saved.read(*self._place(name), master)
        return master.view(stored.shape)

    def optimizer_sizes(self) -> dict[str, int]:
        """Elements of the optimizer's global tensors: those without experts, then the stacked ones of each layer."""
        sizes = {name: self.shapes[name].numel() for name in self._parameters}
        for name, shape in self.shapes.items():
            expert = _EXPERT.fullmatch(name)
            if expert:
                stacked = f"{expert['experts']}.{'down' if expert['matrix'] == DOWN else 'gate_up'}"
                sizes[stacked] = sizes.get(stacked, 0) + shape.numel()
        return sizes

    def _place(self, name: str) -> tuple[str, str, int]:
        """Where a weight's master begins: global tensor, key, first element. As `StackedSwiGLU` stacks experts."""
        expert = _EXPERT.fullmatch(name)
        if expert is None:
            return name, MASTER, 0
        size, index = self.shapes[name].numel(), int(expert["index"])
        if expert["matrix"] == DOWN:
            return f"{expert['experts']}.down", MASTER, index * size
        return f"{expert['experts']}.gate_up", MASTER, (2 * index + (GATE, UP).index(expert["matrix"])) * size


def export(
    checkpoint: Path,
    manifest: Manifest,
    output: Path,
    dtype: str,
    *,
    max_shard_size: str = "5GB",
    advance: Callable[[int], None] = lambda count: None,
) -> list[Path]:
    """Write a checkpoint's weights as sharded safetensors, with an index and the model's configuration.

    One shard is in memory at a time. The folder is complete or not there: it is written under another name first.

    Args:
        checkpoint: its folder; the files were checked.
        manifest: of it.
        output: folder to make.
        dtype: of the weights: "fp32" or "bf16".
        max_shard_size: bytes of a file, with unit, as huggingface_hub takes it.
        advance: takes the number of bytes written since its last call.

    Returns:
        The files.

    Raises:
        CheckpointError: `output` exists, or a file of the checkpoint is not as DeepSpeed writes it.
        OSError: something could not be written.
    """
    if output.exists():
        raise CheckpointError(f"--output {output}: exists; choose another name, or remove it")
    weights = CheckpointWeights(checkpoint, manifest)
    itemsize = DTYPES[dtype].itemsize
    split = split_state_dict_into_shards_factory(
        weights.shapes,
        get_storage_size=lambda shape: shape.numel() * itemsize,
        filename_pattern=WEIGHTS,
        max_shard_size=max_shard_size,
    )
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write(weights, split, partial, dtype, manifest, (checkpoint / MODEL_FILE).stat().st_mode, advance)
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # on a full disk it would be in the way
        raise
    sync_folder(output.parent)
    return [output / name for name in (*split.filename_to_tensors, INDEX, CONFIG)]


def _write(
    weights: CheckpointWeights,
    split: StateDictSplit,
    folder: Path,
    dtype: str,
    manifest: Manifest,
    mode: int,
    advance: Callable[[int], None],
) -> None:
    """Write the files of an export with these permissions; all are on the disk on return."""
    itemsize = DTYPES[dtype].itemsize
    for file, names in split.filename_to_tensors.items():
        shard = {name: weights.read(name, DTYPES[dtype]) for name in names}
        try:
            save_file(shard, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder / file}: could not be written ({error})") from error
        (folder / file).chmod(mode)  # safetensors makes files that the owner alone may read
        with (folder / file).open("rb") as written:
            os.fsync(written.fileno())
        advance(sum(weights.shapes[name].numel() * itemsize for name in names))
    size = sum(shape.numel() for shape in weights.shapes.values())
    index = {"metadata": {"total_size": size * itemsize}, "weight_map": split.tensor_to_filename}
    write_atomically(folder / INDEX, json.dumps(index, indent=1) + "\n")
    identity = manifest.identity
    config = {
        "model": identity.model,
        "moe": identity.moe,
        "vocab_size": weights.shapes["embedding.weight"][0],
        "dtype": dtype,
        "parameters": size,
        "step": manifest.step,
        "samples": manifest.samples,
        "data": identity.data,
        "versions": {**manifest.versions, "exported_by": ds_remoe.__version__},
    }
    write_atomically(folder / CONFIG, json.dumps(config, indent=1) + "\n")


def _layer_and_expert(file: Path) -> tuple[int, int]:
    layer, expert = re.findall(r"\d+", file.name)[:2]
    return int(layer), int(expert)
