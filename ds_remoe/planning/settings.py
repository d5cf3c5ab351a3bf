"""What a plan needs to know of the DeepSpeed part of a run."""

from __future__ import annotations

from dataclasses import dataclass

from ds_remoe.config import RunConfig
from ds_remoe.planning.activations import ITEM_BYTES
from ds_remoe.planning.hardware import Dtype

REDUCE_BUCKET = 5e8
"""Elements; DeepSpeed's default at ZeRO 1 and 2, and the fixed size at stage 0 (0.19.8)."""


@dataclass(frozen=True)
class EngineSettings:
    """One engine's settings on a world of a given size.

    Attributes:
        dtype: of the parameters and gradients.
        stage: of ZeRO.
        micro_batch: sequences of one forward on one rank.
        accumulation: micro-batches of an optimizer step.
        global_batch: sequences of an optimizer step over all ranks.
        bucket: elements that ZeRO reduces at a time.
        overlap: reduce gradients while backward goes on.
        to_owner: reduce each gradient to the rank that owns it, instead of to all.
        offload: optimizer states and step on the host.
        wire_bytes: bytes of a gradient element on the wire.
        master_bytes: bytes of a master weight; 0 where the parameters are their own.
        moment_bytes: bytes of the optimizer's moments for one element.
        fused_optimizer: one kernel steps (DeepSpeed's FusedAdam, or torch's with fused), not one for each operation.
    """

    dtype: Dtype
    stage: int
    micro_batch: int
    accumulation: int
    global_batch: int
    bucket: int
    overlap: bool
    to_owner: bool
    offload: bool
    wire_bytes: int
    master_bytes: int
    moment_bytes: int
    fused_optimizer: bool

    @classmethod
    def of(cls, run: RunConfig, world_size: int) -> EngineSettings:
        """The settings of a checked run; ValueError where its batch does not fit the world size."""
        config = run.deepspeed
        zero, bf16, fp16 = (config.get(name, {}) for name in ("zero_optimization", "bf16", "fp16"))
        dtype: Dtype = "bf16" if bf16.get("enabled") else "fp16" if fp16.get("enabled") else "fp32"
        stage = int(zero.get("stage", 0))
        sizes = run.batch_sizes(world_size)
        half_masters = bf16.get("bf16_master_weights_and_grads") or fp16.get("fp16_master_weights_and_grads")
        # At ZeRO 1 and 2 every dtype, fp32 included, has a partition of masters beside the parameters.
        master = 2 if half_masters else 4 if stage or dtype != "fp32" else 0
        wire: Dtype = config.get("communication_data_type", dtype).lower()
        optimizer = config["optimizer"].get("params", {})
        moments = 3 if optimizer.get("amsgrad") else 2
        return cls(
            dtype=dtype,
            stage=stage,
            micro_batch=sizes.micro_batch,
            accumulation=sizes.accumulation,
            global_batch=sizes.global_batch,
            bucket=int(float(zero.get("reduce_bucket_size", REDUCE_BUCKET))),
            overlap=bool(zero.get("overlap_comm", False)),
            to_owner=stage > 0 and not zero.get("use_multi_rank_bucket_allreduce", True),
            offload=zero.get("offload_optimizer", {}).get("device", "none") == "cpu",
            wire_bytes=ITEM_BYTES[wire],
            master_bytes=master,
            moment_bytes=moments * (2 if bf16.get("bf16_optimizer_states") else 4),
            fused_optimizer=not optimizer.get("torch_adam", False) or bool(optimizer.get("fused", False)),
        )

    @property
    def item(self) -> int:
        """Bytes of a parameter."""
        return ITEM_BYTES[self.dtype]
