"""The keys that DeepSpeed reads, with the kind of value each takes.

DeepSpeed accepts an unknown top-level key and ignores it, so a misspelt section would be lost. Importing DeepSpeed
takes seconds, hence these tables; tests/test_config_deepspeed_keys.py compares them with the installed package.
Checked against DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

RELEASE: Final = "DeepSpeed 0.19.8"

Kind = Literal["bool", "int", "size", "number", "string", "object", "list"]

TOP_LEVEL: Final[Mapping[str, Kind]] = {
    "train_batch_size": "int",
    "train_micro_batch_size_per_gpu": "int",
    "gradient_accumulation_steps": "int",
    "managed_gradient_accumulation": "bool",
    "optimizer": "object",
    "scheduler": "object",
    "zero_optimization": "object",
    "zero_allow_untested_optimizer": "bool",
    "zero_force_ds_cpu_optimizer": "bool",
    "bf16": "object",
    "fp16": "object",
    "gradient_clipping": "number",
    "communication_data_type": "string",
    "prescale_gradients": "bool",
    "gradient_predivide_factor": "number",
    "gradient_allreduce_op": "string",
    "disable_allgather": "bool",
    "checkpoint": "object",
    "steps_per_print": "int",
    "dump_state": "bool",
    "disable_python_gc": "bool",
    "log_level": "string",
    "wall_clock_breakdown": "bool",
    "memory_breakdown": "bool",
    "timers": "object",
    "tensorboard": "object",
    "wandb": "object",
    "csv_monitor": "object",
    "comet": "object",
    "comms_logger": "object",
    "flops_profiler": "object",
}
"""Keys that a run may set."""

REFUSED: Final[Mapping[str, str]] = {
    "activation_checkpointing": "set remoe.model.activation_checkpointing instead: this section configures DeepSpeed's "
    "own checkpoint function, which the model does not call",
    "aio": "asynchronous I/O serves NVMe offload, which needs ZeRO stage 3; remove it",
    "autotuning": "autotuning would rewrite the batch sizes; choose them by hand and remove it",
    "bfloat16": 'an old name; write "bf16"',
    "compile": "the compiler passes are not checked with uneven expert dispatch; remove it",
    "data_efficiency": "curriculum and data sampling would change the run's own resumable order of samples; remove it",
    "data_parallel_size": "the mesh of sequence parallelism is not supported; remove it",
    "data_types": "gradients are accumulated in the training dtype and buffers stay fp32; remove it, and choose the "
    'dtype with "bf16" or "fp16"',
    "dataloader_drop_last": "DeepSpeed's data loader is not used; remove it",
    "datastates_ckpt": "checkpoints are written by ds_remoe, with a manifest and an atomic latest; remove it",
    "expert_parallel": "AutoEP converts other models' MoE layers; set remoe.moe.ep_size instead",
    "hybrid_engine": "the hybrid engine serves RLHF; remove it",
    "pipeline": "pipeline parallelism is not supported; remove it and use ZeRO with remoe.moe.ep_size",
    "seq_parallel_communication_data_type": "sequence parallelism is not supported; remove it",
    "sequence_parallel_size": "sequence parallelism is not supported; remove it",
    "tensor_parallel": "tensor parallelism is not supported; remove it and use ZeRO with remoe.moe.ep_size",
    "torch_autocast": 'autocast does not reach the expert kernels; use "bf16": {"enabled": true}',
    "use_data_before_expert_parallelism": "expert groups hold neighbouring ranks here; remove it",
    "vocabulary_size": "the vocabulary is that of remoe.data.tokenizer; remove it",
    "weight_quantization": "quantised inference plays no part in training; remove it",
}
"""Keys that DeepSpeed reads and a run may not set, each with the remedy."""

REMOVED: Final[Mapping[str, str]] = {
    "amp": 'Apex AMP was removed from DeepSpeed; use "bf16": {"enabled": true}',
    "compression_training": "the compression library was removed from DeepSpeed; remove it",
    "curriculum_learning": "it was removed from DeepSpeed, and would change the order of samples; remove it",
    "eigenvalue": "it was removed from DeepSpeed; remove it",
    "elasticity": "elastic training was removed from DeepSpeed; set train_batch_size and "
    "train_micro_batch_size_per_gpu, and resume on the new number of ranks",
    "graph_harvesting": "it was removed from DeepSpeed; remove it",
    "nebula": "Nebula checkpoints were removed from DeepSpeed; remove it",
    "progressive_layer_drop": "it was removed from DeepSpeed; remove it",
    "quantize_training": "it was removed from DeepSpeed; remove it",
    "sparse_attention": "it was removed from DeepSpeed; remove it",
    "sparse_gradients": "it was removed from DeepSpeed; remove it",
}
"""Keys that DeepSpeed itself refuses."""

ZERO: Final[Mapping[str, Kind]] = {
    "stage": "int",
    "contiguous_gradients": "bool",
    "reduce_scatter": "bool",
    "reduce_bucket_size": "size",
    "use_multi_rank_bucket_allreduce": "bool",
    "allgather_partitions": "bool",
    "allgather_bucket_size": "size",
    "overlap_comm": "bool",
    "compute_grad_norm": "bool",
    "load_from_fp32_weights": "bool",
    "offload_optimizer": "object",
    "ignore_unused_parameters": "bool",
    "parameter_alignment": "bool",
    "enable_sanity_checks": "bool",
}
"""Keys of "zero_optimization" that a run may set."""

_STAGE_3 = "it is read at ZeRO stage 3 only, which has no native MoE layers; remove it"

ZERO_REFUSED: Final[Mapping[str, str]] = {
    "cpu_offload": 'an old name; write "offload_optimizer": {"device": "cpu"}',
    "cpu_offload_param": _STAGE_3,
    "cpu_offload_use_pin_memory": 'an old name; write "offload_optimizer": {"device": "cpu", "pin_memory": true}',
    "elastic_checkpoint": "it changes the layout of optimizer states in checkpoints; remove it, resuming on another "
    "number of ranks needs no setting",
    "leaf_module": _STAGE_3,
    "legacy_stage1": "the old implementation of stage 1 is not checked with expert parameter groups; remove it",
    "log_trace_cache_warnings": _STAGE_3,
    "memory_efficient_linear": _STAGE_3,
    "mics_hierarchical_params_gather": "MiCS was removed from DeepSpeed; remove it",
    "mics_shard_size": "MiCS was removed from DeepSpeed; remove it",
    "offload_param": "parameters are offloaded at ZeRO stage 3 only, which has no native MoE layers; remove it, and "
    'use "offload_optimizer": {"device": "cpu"}',
    "override_module_apply": _STAGE_3,
    "pipeline_loading_checkpoint": _STAGE_3,
    "round_robin_gradients": "the order of parameters in checkpoints would depend on the number of ranks, and the "
    "map of it there would be wrong; remove it",
    "save_muon_momentum_buffer_in_memory": _STAGE_3,
    "stage3_allgather_sequential": _STAGE_3,
    "stage3_gather_16bit_weights_on_model_save": _STAGE_3,
    "stage3_gather_fp16_weights_on_model_save": _STAGE_3,
    "stage3_max_live_parameters": _STAGE_3,
    "stage3_max_reuse_distance": _STAGE_3,
    "stage3_model_persistence_threshold": _STAGE_3,
    "stage3_module_granularity_threshold": _STAGE_3,
    "stage3_param_persistence_threshold": _STAGE_3,
    "stage3_prefetch_bucket_size": _STAGE_3,
    "stage3_use_all_reduce_for_fetch_params": _STAGE_3,
    "sub_group_size": _STAGE_3,
    "zenflow": "ZenFlow is not checked with expert parameter groups; remove it",
    "zero_hpz_partition_size": _STAGE_3,
    "zero_quantized_gradients": _STAGE_3,
    "zero_quantized_nontrainable_weights": _STAGE_3,
    "zero_quantized_weights": _STAGE_3,
    "zeropp_loco_param": "LoCo was removed from DeepSpeed; remove it",
}
"""Keys of "zero_optimization" that a run may not set, each with the remedy."""

OFFLOAD_OPTIMIZER: Final[Mapping[str, Kind]] = {
    "device": "string",
    "pin_memory": "bool",
    "ratio": "number",
}

OFFLOAD_OPTIMIZER_REFUSED: Final[Mapping[str, str]] = {
    "buffer_count": _STAGE_3,
    "cpuadam_cores_perc": _STAGE_3,
    "fast_init": _STAGE_3,
    "nvme_path": _STAGE_3,
    "pipeline_read": _STAGE_3,
    "pipeline_write": _STAGE_3,
    "super_offload": _STAGE_3,
}

BF16: Final[Mapping[str, Kind]] = {
    "enabled": "bool",
    "immediate_grad_update": "bool",
    "check_grad_overflow": "bool",
    "bf16_master_weights_and_grads": "bool",
    "bf16_optimizer_states": "bool",
}

FP16: Final[Mapping[str, Kind]] = {
    "enabled": "bool",
    "auto_cast": "bool",
    "loss_scale": "number",
    "initial_scale_power": "int",
    "loss_scale_window": "int",
    "hysteresis": "int",
    "consecutive_hysteresis": "bool",
    "min_loss_scale": "int",
    "fp16_master_weights_and_grads": "bool",
}

CHECKPOINT: Final[Mapping[str, Kind]] = {"tag_validation": "string", "load_universal": "bool"}

_OWN_CHECKPOINTS = "checkpoints are written by ds_remoe, with a manifest and an atomic latest; remove it"

CHECKPOINT_REFUSED: Final[Mapping[str, str]] = {
    "checkpoint_serialization": _OWN_CHECKPOINTS,
    "parallel_write": _OWN_CHECKPOINTS,
    "use_node_local_storage": "remoe.train.output_dir must be one folder that all nodes see; remove it",
    "writer": _OWN_CHECKPOINTS,
}

MONITORS: Final[Mapping[str, Mapping[str, Kind]]] = {
    "tensorboard": {"enabled": "bool", "output_path": "string", "job_name": "string"},
    "wandb": {"enabled": "bool", "group": "string", "team": "string", "project": "string"},
    "csv_monitor": {"enabled": "bool", "output_path": "string", "job_name": "string"},
    "comet": {
        "enabled": "bool",
        "samples_log_interval": "int",
        "project": "string",
        "workspace": "string",
        "api_key": "string",
        "experiment_name": "string",
        "experiment_key": "string",
        "online": "bool",
        "mode": "string",
    },
    "comms_logger": {
        "enabled": "bool",
        "prof_all": "bool",
        "prof_ops": "list",
        "verbose": "bool",
        "debug": "bool",
    },
    "flops_profiler": {
        "enabled": "bool",
        "recompute_fwd_factor": "number",
        "profile_step": "int",
        "module_depth": "int",
        "top_modules": "int",
        "detailed": "bool",
        "output_file": "string",
    },
}

_WARMUP: Final[Mapping[str, Kind]] = {"warmup_num_steps": "int", "warmup_type": "string"}
_WARMUP_LR: Final[Mapping[str, Kind]] = {**_WARMUP, "warmup_min_lr": "number", "warmup_max_lr": "number"}

SCHEDULERS: Final[Mapping[str, Mapping[str, Kind]]] = {
    "WarmupLR": _WARMUP_LR,
    "WarmupDecayLR": {**_WARMUP_LR, "total_num_steps": "int"},
    "WarmupCosineLR": {**_WARMUP, "total_num_steps": "int", "warmup_min_ratio": "number", "cos_min_ratio": "number"},
    "OneCycle": {
        "cycle_min_lr": "number",
        "cycle_max_lr": "number",
        "decay_lr_rate": "number",
        "cycle_first_step_size": "int",
        "cycle_second_step_size": "int",
        "cycle_first_stair_count": "int",
        "cycle_second_stair_count": "int",
        "decay_step_size": "int",
        "cycle_momentum": "bool",
        "cycle_min_mom": "number",
        "cycle_max_mom": "number",
        "decay_mom_rate": "number",
    },
    "LRRangeTest": {
        "lr_range_test_min_lr": "number",
        "lr_range_test_step_size": "int",
        "lr_range_test_step_rate": "number",
        "lr_range_test_staircase": "bool",
    },
}
"""Parameters of DeepSpeed's learning-rate schedules, without `optimizer` and the resume argument."""

SCHEDULER_REQUIRED: Final[Mapping[str, tuple[str, ...]]] = {
    "WarmupDecayLR": ("total_num_steps",),
    "WarmupCosineLR": ("total_num_steps",),
    "OneCycle": ("cycle_min_lr", "cycle_max_lr"),
}

_ADAM: Final[Mapping[str, Kind]] = {
    "lr": "number",
    "betas": "list",
    "eps": "number",
    "weight_decay": "number",
    "torch_adam": "bool",
    "adam_w_mode": "bool",
}
_ADAM_TORCH: Final[Mapping[str, Kind]] = {
    **_ADAM,
    "amsgrad": "bool",
    "foreach": "bool",
    "fused": "bool",
    "maximize": "bool",
}
_ADAM_FUSED: Final[Mapping[str, Kind]] = {**_ADAM, "bias_correction": "bool", "set_grad_none": "bool"}
_ADAM_CPU: Final[Mapping[str, Kind]] = {**_ADAM, "bias_correction": "bool", "fp32_optimizer_states": "bool"}

OPTIMIZERS: Final = ("Adam", "AdamW")
"""Optimizer types of a run; DeepSpeed reads them in any case."""


def optimizer_params(*, torch_adam: bool, offload: bool) -> Mapping[str, Kind]:
    """Parameters of the class that DeepSpeed picks for "Adam" and "AdamW".

    torch.optim.Adam(W) with torch_adam, else DeepSpeedCPUAdam when the optimizer is offloaded, else FusedAdam
    (`DeepSpeedEngine.get_optimizer_configuration`).
    """
    if torch_adam:
        return _ADAM_TORCH
    return _ADAM_CPU if offload else _ADAM_FUSED
