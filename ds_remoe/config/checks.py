"""Checks across fields of the "remoe" section, and the list of all checks of a run.

Each check yields the problems that it finds; none stops at the first, so that one message tells everything.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ds_remoe.config import checks_engine, checks_optimizer, checks_scheduler
from ds_remoe.config.folders import is_file, is_folder, why_unusable
from ds_remoe.config.problems import MISSING, ConfigProblem
from ds_remoe.config.schema import (
    DataConfig,
    FilesSource,
    FileTokenizer,
    HubSource,
    LoggingConfig,
    ModelConfig,
    MoEConfig,
    ReMoEConfig,
    TrainConfig,
)
from ds_remoe.launch_environment import COLLECTIVE_TIMEOUT, collective_timeout, ranks_per_node


def check_run(
    clean: Mapping[str, Any],
    given: Mapping[str, Any],
    remoe: ReMoEConfig | None,
    *,
    world_size: int | None,
    accelerator: str | None,
) -> list[ConfigProblem]:
    """Every check that needs more than one field, or something outside of the file.

    Args:
        clean: the DeepSpeed part, reduced to what is known and of the right kind.
        given: the whole file.
        remoe: the typed section; None leaves out what needs it.
        world_size: ranks of the run; None leaves out what depends on it.
        accelerator: DeepSpeed's name of the device; None leaves out what depends on it.
    """
    problems = [
        *checks_engine.check_batch(clean, given, world_size),
        *checks_engine.check_zero(clean),
        *checks_engine.check_precision(clean, accelerator),
        *checks_engine.check_values(clean),
        *checks_engine.check_monitors(clean, accelerator),
        *checks_optimizer.check_optimizer(clean, given, accelerator),
    ]
    if remoe is None:
        return problems
    return [
        *problems,
        *checks_scheduler.check_scheduler(clean, remoe.train.steps),
        *checks_engine.check_expert_gradients(clean, remoe.moe),
        *checks_engine.check_double_logging(clean, remoe.logging),
        *check_model(remoe.model),
        *check_moe(remoe, world_size),
        *check_wire(clean, remoe.moe),
        *check_spike_guard(clean, remoe.train),
        *check_hang_timeout(remoe.train),
        *check_unread(remoe),
        *check_data(remoe.data),
        *check_folders(remoe),
        *check_logging(remoe.logging),
    ]


def check_model(model: ModelConfig) -> Iterator[ConfigProblem]:
    """Heads divide the width into even sizes, key/value heads divide the heads."""
    if model.hidden_size % model.num_heads:
        remedy = f"must divide hidden_size = {model.hidden_size}"
        yield ConfigProblem("remoe.model.num_heads", model.num_heads, remedy)
    elif model.head_size % 2:
        remedy = (
            f"gives heads of size {model.head_size}, but rotary embeddings turn pairs; "
            f"hidden_size = {model.hidden_size} divided by it must be even"
        )
        yield ConfigProblem("remoe.model.num_heads", model.num_heads, remedy)
    if model.num_heads % model.kv_heads:
        remedy = f"must divide num_heads = {model.num_heads}"
        yield ConfigProblem("remoe.model.num_kv_heads", model.num_kv_heads, remedy)


def check_moe(remoe: ReMoEConfig, world_size: int | None) -> Iterator[ConfigProblem]:
    """Experts, ranks and layers fit each other."""
    model, moe = remoe.model, remoe.moe
    if moe.router == "dense":
        return
    if moe.k > moe.num_experts:
        remedy = f"more than num_experts = {moe.num_experts}; set at most that"
        yield ConfigProblem("remoe.moe.k", moe.k, remedy)
    elif moe.router == "relu" and moe.k == moe.num_experts:
        remedy = (
            f"equals num_experts = {moe.num_experts}, so the target sparsity is 0 and there is nothing to control; "
            'set router "dense" or a smaller k'
        )
        yield ConfigProblem("remoe.moe.k", moe.k, remedy)
    if moe.total_experts % moe.ep_size:
        remedy = f"must divide the experts of a layer, num_experts * granularity = {moe.total_experts}"
        yield ConfigProblem("remoe.moe.ep_size", moe.ep_size, remedy)
    if world_size is not None and world_size % moe.ep_size:
        remedy = f"must divide the world size {world_size}; set one that does, or launch a multiple of it"
        yield ConfigProblem("remoe.moe.ep_size", moe.ep_size, remedy)
    yield from _check_exchange(moe)
    if model.d_ffn % moe.granularity:
        remedy = f"must divide the FFN width {model.d_ffn} (remoe.model.ffn_hidden_size), to split each expert evenly"
        yield ConfigProblem("remoe.moe.granularity", moe.granularity, remedy)
    if moe.layer_frequency > model.num_layers:
        remedy = f"more than remoe.model.num_layers = {model.num_layers}, so no layer would be an MoE layer; set less"
        yield ConfigProblem("remoe.moe.layer_frequency", moe.layer_frequency, remedy)


def _check_exchange(moe: MoEConfig) -> Iterator[ConfigProblem]:
    """How tokens travel between ranks, where they do."""
    if moe.ep_size == 1:
        remedy = "with ep_size = 1 no token leaves its rank; remove it"
        if moe.wire_dtype != "auto":
            yield ConfigProblem("remoe.moe.wire_dtype", moe.wire_dtype, remedy)
        if moe.hierarchical_all_to_all:
            yield ConfigProblem("remoe.moe.hierarchical_all_to_all", True, remedy)
    try:
        per_node = ranks_per_node() if moe.hierarchical_all_to_all else None
    except ValueError as error:
        yield ConfigProblem("remoe.moe.hierarchical_all_to_all", True, str(error))
        return
    if per_node is not None and per_node % moe.ep_size and moe.ep_size % per_node:
        remedy = (
            f"nodes of {per_node} ranks (LOCAL_WORLD_SIZE or LOCAL_SIZE) cut groups of ep_size = {moe.ep_size} "
            "unevenly; let ep_size divide the ranks of a node or be a multiple of them, or set this to false"
        )
        yield ConfigProblem("remoe.moe.hierarchical_all_to_all", True, remedy)


def check_wire(clean: Mapping[str, Any], moe: MoEConfig) -> Iterator[ConfigProblem]:
    """A wire narrower than the activations, not as wide."""
    for name in ("bf16", "fp16"):
        if moe.wire_dtype == "bf16" and clean.get(name, {}).get("enabled"):
            remedy = f"is for fp32 training, but {name}.enabled is true, so tokens have 16 bits already; remove it"
            yield ConfigProblem("remoe.moe.wire_dtype", moe.wire_dtype, remedy)


def check_spike_guard(clean: Mapping[str, Any], train: TrainConfig) -> Iterator[ConfigProblem]:
    """Spikes are not mistaken for a loss scale that is too large."""
    fp16 = clean.get("fp16", {})
    if train.spike_guard is not None and fp16.get("enabled") and fp16.get("loss_scale", 0) == 0:
        remedy = 'dynamic fp16 loss scaling judges the steps alone; use "bf16", set fp16.loss_scale, or remove it'
        yield ConfigProblem("remoe.train.spike_guard", train.spike_guard.model_dump(), remedy)


def check_hang_timeout(train: TrainConfig) -> Iterator[ConfigProblem]:
    """A rank that hangs is named before torch gives up the collectives of the others."""
    try:
        longest = collective_timeout()
    except ValueError as error:
        yield ConfigProblem(COLLECTIVE_TIMEOUT, os.environ[COLLECTIVE_TIMEOUT], str(error).partition(": ")[2])
        return
    if train.hang_timeout is not None and train.hang_timeout > longest:
        remedy = (
            f"more than {COLLECTIVE_TIMEOUT} = {longest / 60:g} minutes, after which torch gives up each collective by "
            f"itself; set at most {longest:g}, or raise {COLLECTIVE_TIMEOUT} (environment)"
        )
        yield ConfigProblem("remoe.train.hang_timeout", train.hang_timeout, remedy)


def check_unread(remoe: ReMoEConfig) -> Iterator[ConfigProblem]:
    """Fields that were set, but which the chosen router never reads."""
    router = remoe.moe.router
    for name in sorted(remoe.moe.model_fields_set - {"router"}):
        if router == "dense" or (name == "aux_loss_coefficient" and router != "topk"):
            yield _unread(f"remoe.moe.{name}", getattr(remoe.moe, name), router)
    if router != "relu" and "sparsity" in remoe.model_fields_set:
        given = remoe.sparsity.model_dump(exclude_unset=True)
        yield _unread("remoe.sparsity", given, router)


def _unread(field: str, value: Any, router: str) -> ConfigProblem:
    return ConfigProblem(field, value, f'not read with router "{router}"; remove it (--set {field}=null)')


def check_data(data: DataConfig) -> Iterator[ConfigProblem]:
    """Files are there, and a stream has an end."""
    source, tokenizer = data.source, data.tokenizer
    if isinstance(source, FilesSource):
        for pattern in source.paths:
            if is_folder(Path(pattern)):
                remedy = f"is a folder; name files or a pattern, such as {os.path.join(pattern, '*')}"
                yield ConfigProblem("remoe.data.source.paths", pattern, remedy)
            elif not any(is_file(Path(path)) for path in [pattern, *glob.glob(pattern, recursive=True)]):
                remedy = f"no such file, seen from {Path.cwd()}"
                yield ConfigProblem("remoe.data.source.paths", pattern, remedy)
        if source.type == "text":
            for name in sorted(source.model_fields_set & {"text_column", "domain_column"}):
                value = getattr(source, name)
                yield ConfigProblem(f"remoe.data.source.{name}", value, 'not read with type "text"; remove it')
    if isinstance(source, HubSource) and source.streaming and source.max_documents is None:
        remedy = "required when streaming, as the token store must end somewhere; set it, or streaming to false"
        yield ConfigProblem("remoe.data.source.max_documents", MISSING, remedy)
    if isinstance(tokenizer, FileTokenizer):
        path = Path(tokenizer.path)
        if tokenizer.type == "huggingface" and is_folder(path):
            path /= "tokenizer.json"
        if not is_file(path):
            yield ConfigProblem("remoe.data.tokenizer.path", tokenizer.path, f"no file {path}, seen from {Path.cwd()}")


def check_folders(remoe: ReMoEConfig) -> Iterator[ConfigProblem]:
    """The folders that a run writes to can be made and written."""
    folders = {"remoe.train.output_dir": remoe.train.output_dir, "remoe.data.cache_dir": remoe.data.cache_dir}
    for field, value in folders.items():
        remedy = why_unusable(value)
        if remedy is not None:
            yield ConfigProblem(field, value, remedy)


def check_logging(logging: LoggingConfig) -> Iterator[ConfigProblem]:
    """W&B settings are not given in vain."""
    wandb = logging.wandb
    if wandb.model_fields_set and "mode" not in wandb.model_fields_set:
        given = ", ".join(sorted(wandb.model_fields_set))
        remedy = f'required beside {given}: "online" or "offline" to log, "disabled" to keep the settings for later'
        yield ConfigProblem("remoe.logging.wandb.mode", MISSING, remedy)
