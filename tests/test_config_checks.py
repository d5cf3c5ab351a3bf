"""Wrong configurations, each refused with the field, its value and the remedy."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ds_remoe.config import ConfigError, ConfigProblem, load_run
from ds_remoe.config.problems import MISSING

QUICKSTART = Path(__file__).parents[1] / "ds_configs" / "quickstart.json"

Case = tuple[list[str], str, Any, str]

CASES: dict[str, Case] = {
    # name: overrides of the quickstart's file, field, value, part of the remedy
    "unknown section": (["optimiser.type=Adam"], "optimiser", {"type": "Adam"}, "did you mean optimizer?"),
    "unknown section, no near name": (["qqq=1"], "qqq", 1, "known here: bf16, checkpoint"),
    "remoe misspelt": (["remo=1"], "remo", 1, "did you mean remoe?"),
    "unknown remoe key": (["remoe.moe.num_expert=8"], "remoe.moe.num_expert", 8, "did you mean num_experts?"),
    "unknown remoe part": (["remoe.modle.x=1"], "remoe.modle", {"x": 1}, "did you mean model?"),
    "unknown key in a tagged union": (
        ["remoe.data.source.max_byte=4"],
        "remoe.data.source.max_byte",
        4,
        "did you mean max_bytes_per_domain?",
    ),
    "unknown optimizer key": (["optimizer.parms=1"], "optimizer.parms", 1, "did you mean params?"),
    "unknown optimizer parameter": (
        ["optimizer.params.weight_decy=0.1"],
        "optimizer.params.weight_decy",
        0.1,
        "did you mean weight_decay?",
    ),
    "parameter of another Adam": (
        ["optimizer.params.torch_adam=false"],
        "optimizer.params.fused",
        True,
        "known here",
    ),
    "clipping in the optimizer": (
        ["optimizer.params.max_grad_norm=1.0"],
        "optimizer.params.max_grad_norm",
        1.0,
        "gradient_clipping",
    ),
    "unknown scheduler parameter": (
        ["scheduler.params.min_lr=0.1"],
        "scheduler.params.min_lr",
        0.1,
        "warmup_min_ratio",
    ),
    "schedule without parameters": (
        ['scheduler={"type": "WarmupLR"}', "remoe.train.steps=2000"],
        "scheduler.params",
        MISSING,
        "DeepSpeed fails without it",
    ),
    "warm-up from above": (
        ['scheduler={"type": "WarmupLR", "params": {"warmup_min_lr": 0.5, "warmup_num_steps": 10}}'],
        "scheduler.params.warmup_min_lr",
        0.5,
        "must be between 0 and optimizer.params.lr = ",
    ),
    "scattered gradients": (
        ["zero_optimization.contiguous_gradients=false"],
        "zero_optimization.contiguous_gradients",
        False,
        "for experts at stage 2",
    ),
    "no reduce-scatter": (
        ["zero_optimization.reduce_scatter=false"],
        "zero_optimization.reduce_scatter",
        False,
        "for experts at stages 1 and 2",
    ),
    "empty bucket": (
        ["zero_optimization.reduce_bucket_size=0"],
        "zero_optimization.reduce_bucket_size",
        0,
        "must be positive",
    ),
    "empty bucket to gather": (
        ["zero_optimization.allgather_bucket_size=0"],
        "zero_optimization.allgather_bucket_size",
        0,
        "must be positive",
    ),
    "gradients scaled before": (["prescale_gradients=true"], "prescale_gradients", True, "set zero_optimization.stage"),
    "gradients divided before": (
        ["gradient_predivide_factor=2"],
        "gradient_predivide_factor",
        2,
        "set zero_optimization.stage to 1",
    ),
    "unknown zero key": (
        ["zero_optimization.reduce_bucket=5"],
        "zero_optimization.reduce_bucket",
        5,
        "did you mean reduce_bucket_size?",
    ),
    "unknown bf16 key": (["bf16.enable=true"], "bf16.enable", True, "did you mean enabled?"),
    "unknown fp16 key": (["fp16.loss_scal=0"], "fp16.loss_scal", 0, "did you mean loss_scale?"),
    "remoe type": (["remoe.moe.k=two"], "remoe.moe.k", "two", "must be a whole number"),
    "remoe float for int": (["remoe.model.num_layers=4.0"], "remoe.model.num_layers", 4.0, "must be a whole number"),
    "remoe bool": (
        ["remoe.model.activation_checkpointing=1"],
        "remoe.model.activation_checkpointing",
        1,
        "must be true or false",
    ),
    "remoe range": (["remoe.sparsity.alpha=1.0"], "remoe.sparsity.alpha", 1.0, "must be greater than 1"),
    "remoe choice": (["remoe.moe.router=relu2"], "remoe.moe.router", "relu2", "'relu', 'topk' or 'dense'"),
    "remoe missing": (["remoe.train.steps=null"], "remoe.train.steps", MISSING, "Optimizer steps of the whole run"),
    "remoe not an object": (["remoe.moe=8"], "remoe.moe", 8, "must be an object"),
    "remoe gone": (["remoe=null"], "remoe", MISSING, "required"),
    "source type": (
        ['remoe.data.source={"type": "hubb"}'],
        "remoe.data.source.type",
        "hubb",
        "'stdlib', 'jsonl', 'parquet', 'text', 'hub'",
    ),
    "source type missing": (["remoe.data.source={}"], "remoe.data.source.type", MISSING, "hub, jsonl, parquet"),
    "engine type": (['gradient_clipping="1.0"'], "gradient_clipping", "1.0", "must be a number"),
    "engine int": (["gradient_accumulation_steps=2.0"], "gradient_accumulation_steps", 2.0, "must be a whole number"),
    "auto": (["train_micro_batch_size_per_gpu=auto"], "train_micro_batch_size_per_gpu", "auto", "give the value"),
    "no batch size": (
        ["train_micro_batch_size_per_gpu=null"],
        "train_micro_batch_size_per_gpu",
        MISSING,
        "or train_batch_size",
    ),
    "batch of zero": (["train_micro_batch_size_per_gpu=0"], "train_micro_batch_size_per_gpu", 0, "must be positive"),
    "negative accumulation": (
        ["gradient_accumulation_steps=-1"],
        "gradient_accumulation_steps",
        -1,
        "must be positive",
    ),
    "batch sizes disagree": (
        ["train_batch_size=24"],
        "train_batch_size",
        24,
        "8) * gradient_accumulation_steps (1) * 2",
    ),
    "batch size no multiple": (
        ["train_batch_size=50", "gradient_accumulation_steps=null"],
        "train_batch_size",
        50,
        "the nearest is 48",
    ),
    "k above experts": (["remoe.moe.k=9"], "remoe.moe.k", 9, "more than num_experts = 8"),
    "k equals experts": (["remoe.moe.k=8"], "remoe.moe.k", 8, 'router "dense" or a smaller k'),
    "ep_size and experts": (
        ["remoe.moe.num_experts=7"],
        "remoe.moe.ep_size",
        2,
        "num_experts * granularity = 7",
    ),
    "ep_size and world": (["remoe.moe.ep_size=4"], "remoe.moe.ep_size", 4, "must divide the world size 2"),
    "heads": (
        ["remoe.model.num_heads=6", "remoe.model.num_kv_heads=2"],
        "remoe.model.num_heads",
        6,
        "hidden_size = 128",
    ),
    "odd head": (["remoe.model.hidden_size=132"], "remoe.model.num_heads", 4, "heads of size 33"),
    "kv heads": (["remoe.model.num_kv_heads=3"], "remoe.model.num_kv_heads", 3, "must divide num_heads = 4"),
    "granularity": (["remoe.moe.granularity=3"], "remoe.moe.granularity", 3, "must divide the FFN width 256"),
    "layer frequency": (["remoe.moe.layer_frequency=5"], "remoe.moe.layer_frequency", 5, "num_layers = 4"),
    "sparsity without relu": (
        ["remoe.moe.router=topk"],
        "remoe.sparsity",
        {"lambda_init": 1e-8, "alpha": 1.2},
        "--set remoe.sparsity=null",
    ),
    "auxiliary loss without topk": (
        ["remoe.moe.aux_loss_coefficient=0.1"],
        "remoe.moe.aux_loss_coefficient",
        0.1,
        'not read with router "relu"',
    ),
    "wire dtype on one rank": (
        ["remoe.moe.ep_size=1", "remoe.moe.wire_dtype=bf16"],
        "remoe.moe.wire_dtype",
        "bf16",
        "no token leaves its rank",
    ),
    "wire dtype with bf16": (
        ["bf16.enabled=true", "remoe.moe.wire_dtype=bf16"],
        "remoe.moe.wire_dtype",
        "bf16",
        "is for fp32 training",
    ),
    "hierarchy on one rank": (
        ["remoe.moe.ep_size=1", "remoe.moe.hierarchical_all_to_all=true"],
        "remoe.moe.hierarchical_all_to_all",
        True,
        "no token leaves its rank",
    ),
    "experts with dense": (["remoe.moe.router=dense"], "remoe.moe.num_experts", 8, 'not read with router "dense"'),
    "expert parallelism with dense": (["remoe.moe.router=dense"], "remoe.moe.ep_size", 2, "remove it"),
    "stage 3": (["zero_optimization.stage=3"], "zero_optimization.stage", 3, "refuses native MoE layers"),
    "stage 4": (["zero_optimization.stage=4"], "zero_optimization.stage", 4, "must be 0, 1 or 2"),
    "parameter offload": (
        ['zero_optimization.offload_param={"device": "cpu"}'],
        "zero_optimization.offload_param",
        {"device": "cpu"},
        "offload_optimizer",
    ),
    "offload at stage 0": (
        ["zero_optimization.stage=0", "zero_optimization.offload_optimizer.device=cpu"],
        "zero_optimization.offload_optimizer.device",
        "cpu",
        "stage to 1 or 2",
    ),
    "nvme offload": (
        ["zero_optimization.offload_optimizer.device=nvme"],
        "zero_optimization.offload_optimizer.device",
        "nvme",
        "NVMe needs stage 3",
    ),
    "partial offload": (
        ['zero_optimization.offload_optimizer={"device": "cpu", "ratio": 0.5}'],
        "zero_optimization.offload_optimizer.ratio",
        0.5,
        "remove it",
    ),
    "stage 3 key": (
        ["zero_optimization.stage3_max_live_parameters=1"],
        "zero_optimization.stage3_max_live_parameters",
        1,
        "stage 3 only",
    ),
    "gradient norm off": (
        ["zero_optimization.compute_grad_norm=false"],
        "zero_optimization.compute_grad_norm",
        False,
        "remove it",
    ),
    "fp16 on the CPU": (["fp16.enabled=true"], "fp16.enabled", True, "refuses fp16 on the CPU"),
    "fp16 and bf16": (["fp16.enabled=true", "bf16.enabled=true"], "fp16.enabled", True, "keep one"),
    "fp16 without enabled": (["fp16.loss_scale=0"], "fp16.enabled", MISSING, "no effect without it"),
    "fp16 loss scale": (["fp16.loss_scale=-1"], "fp16.loss_scale", -1, "at least 0"),
    "bf16 master weights": (
        ["zero_optimization.stage=0", 'bf16={"enabled": true, "bf16_master_weights_and_grads": true}'],
        "bf16.bf16_master_weights_and_grads",
        True,
        "needs ZeRO",
    ),
    "bf16 master weights on the device": (
        ['bf16={"enabled": true, "bf16_master_weights_and_grads": true}'],
        "bf16.bf16_master_weights_and_grads",
        True,
        "or (without offloading) bf16.bf16_optimizer_states to true",
    ),
    "bf16 master weights, offloaded, torch's Adam": (
        [
            'bf16={"enabled": true, "bf16_master_weights_and_grads": true, "bf16_optimizer_states": true}',
            "zero_optimization.offload_optimizer.device=cpu",
        ],
        "bf16.bf16_master_weights_and_grads",
        True,
        "optimizer.params.torch_adam to false",
    ),
    "fp16 master weights": (
        ['fp16={"enabled": true, "fp16_master_weights_and_grads": true}'],
        "fp16.fp16_master_weights_and_grads",
        True,
        "torch_adam to false, or remove it",
    ),
    "logs in a file": (
        ['csv_monitor={"enabled": true, "output_path": "/dev/null"}'],
        "csv_monitor.output_path",
        "/dev/null",
        "/dev/null is not a folder",
    ),
    "no optimizer": (["optimizer=null"], "optimizer", MISSING, '"type": "AdamW"'),
    "optimizer type": (["optimizer.type=AdamZ"], "optimizer.type", "AdamZ", "did you mean Adam"),
    "optimizer type missing": (["optimizer.type=null"], "optimizer.type", MISSING, "one of Adam, AdamW"),
    "no learning rate": (["optimizer.params.lr=null"], "optimizer.params.lr", MISSING, "required"),
    "learning rate": (["optimizer.params.lr=0"], "optimizer.params.lr", 0, "must be above 0"),
    "learning rate past all use": (["optimizer.params.lr=1e300"], "optimizer.params.lr", 1e300, "at most 1"),
    "uphill": (["optimizer.params.maximize=true"], "optimizer.params.maximize", True, "make the loss grow"),
    "betas": (["optimizer.params.betas=[0.9, 1.0]"], "optimizer.params.betas", [0.9, 1.0], "two numbers in [0, 1)"),
    "L2 with AdamW": (
        ["optimizer.params.adam_w_mode=false"],
        "optimizer.params.adam_w_mode",
        False,
        'set type "Adam"',
    ),
    "schedule type": (["scheduler.type=CosineLR"], "scheduler.type", "CosineLR", "did you mean WarmupCosineLR?"),
    "schedule length": (
        ["remoe.train.steps=500"],
        "scheduler.params.total_num_steps",
        600,
        "--set scheduler.params.total_num_steps=500",
    ),
    "schedule length missing": (
        ["scheduler.params.total_num_steps=null"],
        "scheduler.params.total_num_steps",
        MISSING,
        "WarmupCosineLR needs it",
    ),
    "warm-up too long": (
        ["scheduler.params.warmup_num_steps=600"],
        "scheduler.params.warmup_num_steps",
        600,
        "do not fit into remoe.train.steps = 600",
    ),
    "default warm-up too long": (
        ["scheduler.params.warmup_num_steps=null"],
        "scheduler.params.warmup_num_steps",
        MISSING,
        "1000 steps of warm-up",
    ),
    "warm-up type": (["scheduler.params.warmup_type=cosine"], "scheduler.params.warmup_type", "cosine", '"linear"'),
    "schedule overrules": (
        ['scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 5, "warmup_max_lr": 1}}'],
        "scheduler.params.warmup_max_lr",
        1,
        "optimizer.params.lr = 0.002",
    ),
    "schedule overrules unseen": (
        ['scheduler={"type": "WarmupDecayLR", "params": {"total_num_steps": 600, "warmup_num_steps": 5}}'],
        "scheduler.params.warmup_max_lr",
        MISSING,
        "peak at 0.001",
    ),
    "cycle overrules": (
        ['scheduler={"type": "OneCycle", "params": {"cycle_min_lr": 1e-4, "cycle_max_lr": 0.1}}'],
        "scheduler.params.cycle_max_lr",
        0.1,
        "optimizer.params.lr = 0.002",
    ),
    "cycle of the momentum": (
        ['scheduler={"type": "OneCycle", "params": {"cycle_min_lr": 1e-4, "cycle_max_lr": 0.002}}'],
        "scheduler.params.cycle_momentum",
        MISSING,
        "over optimizer.params.betas",
    ),
    "cycle upside down": (
        ['scheduler={"type": "OneCycle", "params": {"cycle_min_lr": 1, "cycle_max_lr": 0.002}}'],
        "scheduler.params.cycle_min_lr",
        1,
        "cycle_max_lr = 0.002",
    ),
    "cycle of no steps": (
        ['scheduler={"type": "OneCycle", "params": {"cycle_first_step_size": 0}}'],
        "scheduler.params.cycle_first_step_size",
        0,
        "at least 1",
    ),
    "momentum": (
        ['scheduler={"type": "OneCycle", "params": {"cycle_momentum": true, "cycle_max_mom": 1}}'],
        "scheduler.params.cycle_max_mom",
        1,
        "in [0, 1)",
    ),
    "momentum past one": (
        [
            'scheduler={"type": "OneCycle", "params": {"cycle_momentum": true, "decay_mom_rate": 0.1, '
            '"decay_step_size": 1}}'
        ],
        "scheduler.params.decay_mom_rate",
        0.1,
        "past 1 after the cycle",
    ),
    "range test overrules": (
        ['scheduler={"type": "LRRangeTest", "params": {"lr_range_test_min_lr": 1e-6}}'],
        "scheduler.params.lr_range_test_min_lr",
        1e-6,
        "optimizer.params.lr = 0.002",
    ),
    "range test overrules unseen": (
        ['scheduler={"type": "LRRangeTest", "params": {}}'],
        "scheduler.params.lr_range_test_min_lr",
        MISSING,
        "begin at 0.001",
    ),
    "range test of no steps": (
        ['scheduler={"type": "LRRangeTest", "params": {"lr_range_test_step_size": 0}}'],
        "scheduler.params.lr_range_test_step_size",
        0,
        "at least 1",
    ),
    "elasticity": (["elasticity.enabled=true"], "elasticity", {"enabled": True}, "removed from DeepSpeed"),
    "pipeline": (["pipeline.stages=2"], "pipeline", {"stages": 2}, "not supported"),
    "tensor parallelism": (["tensor_parallel.autotp_size=2"], "tensor_parallel", {"autotp_size": 2}, "not supported"),
    "sequence parallelism": (["sequence_parallel_size=2"], "sequence_parallel_size", 2, "not supported"),
    "AutoEP": (["expert_parallel.enabled=true"], "expert_parallel", {"enabled": True}, "remoe.moe.ep_size"),
    "data types": (
        ["data_types.grad_accum_dtype=fp32"],
        "data_types",
        {"grad_accum_dtype": "fp32"},
        '"bf16" or "fp16"',
    ),
    "curriculum": (["data_efficiency.enabled=true"], "data_efficiency", {"enabled": True}, "order of samples"),
    "compression": (["compression_training={}"], "compression_training", {}, "removed from DeepSpeed"),
    "autocast": (["torch_autocast.enabled=true"], "torch_autocast", {"enabled": True}, '"bf16"'),
    "activation checkpointing": (
        ["activation_checkpointing.profile=true"],
        "activation_checkpointing",
        {"profile": True},
        "remoe.model.activation_checkpointing",
    ),
    "universal checkpoint": (["checkpoint.load_universal=true"], "checkpoint.load_universal", True, "remove it"),
    "client accumulation": (
        ["managed_gradient_accumulation=false"],
        "managed_gradient_accumulation",
        False,
        "leaves accumulation to the engine",
    ),
    "gradient sum": (["gradient_allreduce_op=sum"], "gradient_allreduce_op", "sum", "mean"),
    "negative clipping": (["gradient_clipping=-1"], "gradient_clipping", -1, "at least 0"),
    "communication dtype": (
        ["communication_data_type=fp8"],
        "communication_data_type",
        "fp8",
        "one of fp16, bf16, fp32",
    ),
    "double logging": (
        ["wandb.enabled=true", "remoe.logging.wandb.mode=offline"],
        "wandb.enabled",
        True,
        "a second run",
    ),
    "wandb settings in vain": (
        ["remoe.logging.wandb.project=mine"],
        "remoe.logging.wandb.mode",
        MISSING,
        "required beside project",
    ),
    "no data file": (
        ['remoe.data.source={"type": "jsonl", "paths": ["/nowhere/*.jsonl"]}'],
        "remoe.data.source.paths",
        "/nowhere/*.jsonl",
        "no such file",
    ),
    "folder of data": (
        ['remoe.data.source={"type": "jsonl", "paths": ["/usr"]}'],
        "remoe.data.source.paths",
        "/usr",
        "is a folder; name files or a pattern, such as /usr/*",
    ),
    "no data paths": (
        ['remoe.data.source={"type": "text", "paths": []}'],
        "remoe.data.source.paths",
        [],
        "at least 1 entry",
    ),
    "column of a text file": (
        ['remoe.data.source={"type": "text", "paths": ["/dev/null"], "text_column": "body"}'],
        "remoe.data.source.text_column",
        "body",
        'not read with type "text"',
    ),
    "endless stream": (
        ['remoe.data.source={"type": "hub", "name": "allenai/c4"}'],
        "remoe.data.source.max_documents",
        MISSING,
        "required when streaming",
    ),
    "no tokenizer": (
        ['remoe.data.tokenizer={"type": "sentencepiece", "path": "/nowhere/t.model"}'],
        "remoe.data.tokenizer.path",
        "/nowhere/t.model",
        "no file /nowhere/t.model",
    ),
    "folder without a tokenizer": (
        ['remoe.data.tokenizer={"type": "huggingface", "path": "/"}'],
        "remoe.data.tokenizer.path",
        "/",
        "no file /tokenizer.json",
    ),
    "output in a file": (
        ["remoe.train.output_dir=/dev/null/run"],
        "remoe.train.output_dir",
        "/dev/null/run",
        "/dev/null is not a folder",
    ),
    "output with NUL": (
        [r'remoe.train.output_dir="runs/\u0000"'],
        "remoe.train.output_dir",
        "runs/\0",
        "holds a NUL character, which no path has",
    ),
    "output of a long name": (
        [f"remoe.train.output_dir=/nowhere/{'x' * 300}/run"],
        "remoe.train.output_dir",
        f"/nowhere/{'x' * 300}/run",
        "or a name in it, is too long for the file system",
    ),
    "output of a long path": (
        [f"remoe.train.output_dir={'/xxxx' * 1000}"],
        "remoe.train.output_dir",
        "/xxxx" * 1000,
        "is too long for the file system",
    ),
    "cache of a long name": (
        [f"remoe.data.cache_dir=/{'x' * 5000}"],
        "remoe.data.cache_dir",
        f"/{'x' * 5000}",
        "is too long for the file system",
    ),
    "tokenizer of a long name": (
        [f'remoe.data.tokenizer={{"type": "sentencepiece", "path": "{"x" * 5000}"}}'],
        "remoe.data.tokenizer.path",
        "x" * 5000,
        "no file x",
    ),
    "vocabulary beyond reason": (
        ["remoe.data.tokenizer.vocab_size=1000000000000"],
        "remoe.data.tokenizer.vocab_size",
        10**12,
        "must be at most 1048576 (Pieces of the vocabulary",
    ),
    "cache in a file": (["remoe.data.cache_dir=/dev/null"], "remoe.data.cache_dir", "/dev/null", "not a folder"),
}


def problems_of(overrides: list[str], **arguments: Any) -> ConfigError:
    arguments = {"world_size": 2, "accelerator": "cpu", **arguments}
    with pytest.raises(ConfigError) as caught:
        load_run(QUICKSTART, overrides, **arguments)
    return caught.value


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_refused(case: Case) -> None:
    overrides, field, value, remedy = case
    error = problems_of(overrides)
    found = [problem for problem in error.problems if problem.field == field and problem.value == value]
    assert any(remedy in problem.remedy for problem in found), str(error)
    line = next(str(problem) for problem in found if remedy in problem.remedy)
    assert f"\n  {line}" in str(error)
    assert line.startswith(f"{field}: missing; " if value is MISSING else f"{field} = ")


def test_all_problems_at_once() -> None:
    error = problems_of(["remoe.moe.k=9", "zero_optimization.stage=3", "optimizr=1", "fp16.enabled=true"])
    fields = {problem.field for problem in error.problems}
    assert fields == {"remoe.moe.k", "zero_optimization.stage", "optimizr", "fp16.enabled"}
    assert str(error).splitlines()[0] == f"{QUICKSTART}: 4 problems in the configuration"
    assert len(str(error).splitlines()) == 5


def test_engine_problems_are_reported_beside_a_faulty_remoe_section() -> None:
    error = problems_of(["remoe.moe.k=two", "zero_optimization.stage=3"])
    assert {problem.field for problem in error.problems} == {"remoe.moe.k", "zero_optimization.stage"}


ALLOWED: dict[str, list[str]] = {
    "as it is": [],
    "constant learning rate": ["scheduler=null"],
    "stage 0 with clipping and expert parallelism": ["zero_optimization.stage=0", "gradient_clipping=1.0"],
    "offload": ["zero_optimization.offload_optimizer.device=cpu"],
    "bf16": ["bf16.enabled=true"],
    "topk": ["remoe.moe.router=topk", "remoe.sparsity=null", "remoe.moe.k=8"],
    "dense": ['remoe.moe={"router": "dense"}', "remoe.sparsity=null", "zero_optimization.stage=0"],
    "bucket written as a float": ["zero_optimization.reduce_bucket_size=5e8"],
    "evaluation beyond the end": ["remoe.train.eval_interval=5000", "remoe.train.save_interval=5000"],
    "one logger": ["wandb.enabled=true"],
    "hub stream with an end": ['remoe.data.source={"type": "hub", "name": "allenai/c4", "max_documents": 9}'],
    "whole hub dataset": ['remoe.data.source={"type": "hub", "name": "allenai/c4", "streaming": false}'],
    "only the global batch": ["train_micro_batch_size_per_gpu=null", "train_batch_size=16"],
}


@pytest.mark.parametrize("overrides", ALLOWED.values(), ids=ALLOWED.keys())
def test_allowed(overrides: list[str]) -> None:
    load_run(QUICKSTART, overrides, world_size=2, accelerator="cpu")


def test_world_size_and_device_are_checked_when_known() -> None:
    load_run(QUICKSTART, ["remoe.moe.ep_size=4", "fp16.enabled=true"], world_size=None)
    assert "world size 2" in str(problems_of(["remoe.moe.ep_size=4"]))
    assert "fp16" in str(problems_of(["fp16.enabled=true"]))


@pytest.mark.parametrize(("accelerator", "missing"), [("cpu", "C++ compiler"), ("cuda", "nvcc")])
def test_deepspeeds_adam_needs_a_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, accelerator: str, missing: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("ds_remoe.config.checks_optimizer._CUDA_HOME_DEFAULT", str(tmp_path))
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    load_run(QUICKSTART, world_size=2, accelerator=accelerator)
    error = problems_of(['optimizer.params={"lr": 2e-3}'], accelerator=accelerator)
    assert [problem.field for problem in error.problems] == ["optimizer.params.torch_adam"]
    assert missing in str(error)
    assert "set it to true" in str(error)


@pytest.mark.parametrize(("monitor", "package"), [("tensorboard", "tensorboard"), ("comet", "comet_ml")])
def test_a_monitor_needs_its_package(monkeypatch: pytest.MonkeyPatch, monitor: str, package: str) -> None:
    there = importlib.util.find_spec
    setting = [f"{monitor}.enabled=true"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: there("json" if name == package else name))
    load_run(QUICKSTART, setting, world_size=2, accelerator="cpu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else there(name))
    (problem,) = problems_of(setting).problems
    assert (problem.field, problem.remedy.split("; ")[1]) == (f"{monitor}.enabled", f"pip install {package}")
    load_run(QUICKSTART, [f"{monitor}.enabled=false"], world_size=2, accelerator="cpu")
    load_run(QUICKSTART, setting, world_size=2)  # the machine of the run may have it
    monkeypatch.setenv("RANK", "1")
    load_run(QUICKSTART, setting, world_size=2, accelerator="cpu")  # rank 0 alone writes


def test_unwritable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    error = problems_of([f"remoe.train.output_dir={tmp_path}/a/b", f"remoe.data.cache_dir={tmp_path}"])
    assert [problem.field for problem in error.problems] == ["remoe.train.output_dir", "remoe.data.cache_dir"]
    assert f"{tmp_path} is not writable" in str(error)


def test_a_link_that_leads_nowhere_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "link")
    error = problems_of([f"remoe.train.output_dir={tmp_path}/link/run"])
    assert f"{tmp_path}/link is not a folder" in str(error)


def test_tokenizer_files_are_found(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = json.dumps({"type": "huggingface", "path": str(path)})
        load_run(QUICKSTART, [f"remoe.data.tokenizer={tokenizer}"], world_size=2)


def _paths(value: Any, prefix: str = "") -> list[str]:
    if not isinstance(value, dict):
        return [prefix]
    inner = [path for key, entry in value.items() for path in _paths(entry, f"{prefix}.{key}" if prefix else key)]
    return [*([prefix] if prefix else []), *inner]


PATHS = [
    *_paths(json.loads(QUICKSTART.read_text())),
    "train_batch_size",
    "zero_optimization.offload_optimizer",
    "bf16",
    "fp16.loss_scale",
    "checkpoint.tag_validation",
    "wandb",
    "timers.throughput",
    "scheduler.params.cycle_min_lr",
    "scheduler.params.cycle_max_mom",
    "scheduler.params.lr_range_test_step_size",
]
JUNK = [
    0,
    -1,
    7,
    1.5,
    1e30,
    10**400,
    True,
    False,
    "x",
    "OneCycle",
    "LRRangeTest",
    "auto",
    [],
    [1],
    {},
    {"enabled": 1},
    {"type": []},
]


def _load_or_refuse(junk: dict[str, Any], world_size: int | None) -> None:
    overrides = [f"{path}={json.dumps(value)}" for path, value in junk.items()]
    with contextlib.suppress(ConfigError):
        load_run(QUICKSTART, overrides, world_size=world_size, accelerator="cpu")


@pytest.mark.parametrize("path", PATHS)
def test_junk_is_refused_or_allowed_but_never_crashes(path: str) -> None:
    for value in JUNK:
        _load_or_refuse({path: value}, 2)


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from(PATHS), st.sampled_from(JUNK), min_size=2, max_size=4),
    st.none() | st.integers(1, 8),
)
@example({"optimizer.type": "x", "optimizer.params.lr": "x"}, None)
def test_junk_in_several_places_never_crashes(junk: dict[str, Any], world_size: int | None) -> None:
    _load_or_refuse(junk, world_size)


@pytest.mark.parametrize("render", [str, repr])
def test_long_values_are_cut_in_messages(render: Callable[[object], str]) -> None:
    problem = ConfigProblem("field", list(range(1000)), "remedy")
    assert len(str(problem)) < 120
    assert "..." in str(problem)
    assert "999" in render(problem.value)


@pytest.mark.parametrize("dense", [True, False])
def test_gradients_without_experts_or_on_the_host_may_be_reduced_in_other_ways(dense: bool) -> None:
    overrides = ["zero_optimization.contiguous_gradients=false"]
    if dense:
        overrides += ["zero_optimization.reduce_scatter=false", "prescale_gradients=true"]
        load_run(QUICKSTART.with_name("dense_182m.json"), ["zero_optimization.stage=2", *overrides], world_size=8)
    else:
        overrides += ['zero_optimization.offload_optimizer={"device": "cpu"}']
        load_run(QUICKSTART, overrides, world_size=2)
