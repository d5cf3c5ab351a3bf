"""Weights that `ds-remoe checkpoint export` wrote, read into a model with its experts on any number of ranks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ds_remoe.config.schema import ModelConfig, MoEConfig
from ds_remoe.deepspeed_compat import launched_rank
from ds_remoe.model.decoder import Decoder

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model{suffix}.safetensors"
"""Name of a shard, as huggingface_hub fills it in."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_REMEDY = "copy the export again, or make it anew"
_EXPERT = re.compile(r"(.+\.deepspeed_experts)\.(\d+)\.(.+)")


def load_exported(
    folder: str | Path, *, ep_size: int = 1, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Decoder:
    """The model of an export, with its weights.

    Args:
        folder: that `ds-remoe checkpoint export` made.
        ep_size: ranks that share one set of experts: this rank reads its own experts alone. Expert-parallel groups are
            neighbouring ranks; `ds_remoe.initialize` makes them.
        device: of the weights.
        dtype: of the weights; default: as they were exported.

    Raises:
        FileNotFoundError: a file of the export is missing.
        ValueError: the export is not of this release's model, or a file of it is not whole; or ep_size does not divide
            the number of experts.
    """
    folder = Path(folder)
    if ep_size < 1:
        raise ValueError(f"ep_size = {ep_size}: must be a whole number of at least 1")
    try:
        described = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        vocab_size, exported_in = int(described["vocab_size"]), _DTYPES[described["dtype"]]
        model = ModelConfig.model_validate(described["model"])
        # Without expert parallelism there is no wire; the layers refuse its settings then.
        wire = {} if ep_size > 1 else {"wire_dtype": "auto", "hierarchical_all_to_all": False}
        moe = MoEConfig.model_validate({**described["moe"], **wire, "ep_size": ep_size})
    except (KeyError, TypeError, ValueError) as error:  # pydantic's and json's errors are ValueErrors
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder / CONFIG}: not of a model of this release ({reason}); export it again") from error
    decoder = Decoder(model, moe, vocab_size, seed=0).to(device, dtype or exported_in)
    first = launched_rank() % ep_size * (moe.total_experts // ep_size)
    read_weights(decoder, folder, first)
    return decoder


@torch.no_grad()
def read_weights(model: torch.nn.Module, folder: Path, first_expert: int = 0) -> None:
    """Read every weight of a model from an export, one tensor in memory at a time.

    Args:
        model: with the names of the exported one, its experts counted from 0.
        folder: that `ds-remoe checkpoint export` made.
        first_expert: of the export, for the model's expert 0 of each layer.

    Raises:
        FileNotFoundError: a file of the export is missing.
        ValueError: a weight is missing, or of another shape, or a file is not whole.
    """
    files = _weight_map(folder / INDEX)
    with ExitStack() as stack:
        opened: dict[str, Any] = {}
        for name, weight in model.state_dict().items():
            saved = _global_name(name, first_expert)
            if saved not in files:
                raise ValueError(f"{folder}: has no {saved}; it was exported from another model")
            file = files[saved]
            with _reading(folder / file):
                if file not in opened:
                    opened[file] = stack.enter_context(safe_open(folder / file, framework="pt"))
                tensor = opened[file].get_tensor(saved)
            if tensor.shape != weight.shape:
                raise ValueError(f"{folder}: {saved} is {list(tensor.shape)}, but the model's {list(weight.shape)}")
            weight.copy_(tensor)


def _weight_map(index: Path) -> dict[str, str]:
    """File of each weight."""
    try:
        files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(file, str) for file in files.values()):
            raise TypeError("weight_map holds something else than names of files")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{index}: not an export's index ({type(error).__name__}: {error}); {_REMEDY}") from error
    return files


@contextmanager
def _reading(shard: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{shard}: not a whole file of safetensors ({error}); {_REMEDY}") from error


def _global_name(name: str, first_expert: int) -> str:
    expert = _EXPERT.fullmatch(name)
    return name if expert is None else f"{expert[1]}.{int(expert[2]) + first_expert}.{expert[3]}"
