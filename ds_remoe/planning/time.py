"""Time of one optimizer step: a sum of what each part takes at the rates of the hardware, kernels one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ds_remoe.config.schema import ModelConfig, MoEConfig
from ds_remoe.model.flops import flops_per_token
from ds_remoe.planning.activations import FP32, Load, activations
from ds_remoe.planning.hardware import GB, Cluster
from ds_remoe.planning.settings import EngineSettings
from ds_remoe.planning.sizes import ParamGroup, moe_layers
from ds_remoe.planning.traffic import Flow

ACTIVATION_PASSES = 5
"""Reads and writes of each kept activation byte: written and read forward, read backward, its gradient both."""
LOGIT_BYTES = 16
"""Memory traffic of the loss for one logit, besides three times its own bytes: in fp32 its log-probability is written,
its exponential taken in place, and that read again. A narrow logit is copied to fp32 first, half as much more."""
FUSED_STEP_BYTES, STEP_BYTES = 40, 100
"""Memory traffic of Adam for one element, with clipping and casts: in one kernel, and in one for each operation."""
PCIE_BYTES, HOST_BYTES = 25 * GB, 100 * GB
"""With offloading: bytes/s from an accelerator to its host, and the host memory's of a node."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step by part, and what they amount to.

    Attributes:
        matmul: matrix products, attention scores left out.
        attention: scores and weighted sums.
        recompute: matrix products done again, for activation checkpointing or beyond the activation budget.
        elementwise: norms, rotary embeddings, activations, loss: at the memory's bandwidth.
        overhead: host time of the layers that nothing hides.
        exchange: all-to-all of tokens.
        gradients: reducing gradients, as far as backward does not hide it.
        optimizer: the step itself.
        parameters: gathering the parameters after it, and the statistics.
        step_tokens: tokens of the step over all ranks.
        model_flops: FLOPs of the step on one rank as `flops_per_token` counts them.
        peak_flops: of one accelerator.
    """

    matmul: float
    attention: float
    recompute: float
    elementwise: float
    overhead: float
    exchange: float
    gradients: float
    optimizer: float
    parameters: float
    step_tokens: int
    model_flops: float
    peak_flops: float

    @property
    def communication(self) -> float:
        """What the wire adds to the step."""
        return self.exchange + self.gradients + self.parameters

    @property
    def total(self) -> float:
        compute = self.matmul + self.attention + self.recompute + self.elementwise + self.overhead
        return compute + self.communication + self.optimizer

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks together."""
        return self.step_tokens / self.total

    @property
    def mfu(self) -> float:
        return self.model_flops / self.total / self.peak_flops

    def parts(self) -> dict[str, float]:
        """Seconds by part, in the order of the table."""
        return {
            "matrix products": self.matmul,
            "attention scores": self.attention,
            "recomputation": self.recompute,
            "elementwise": self.elementwise,
            "layer overhead": self.overhead,
            "tokens to experts": self.exchange,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "parameters, statistics": self.parameters,
        }


def step_time(
    model: ModelConfig,
    moe: MoEConfig,
    vocab_size: int,
    groups: Sequence[ParamGroup],
    settings: EngineSettings,
    cluster: Cluster,
    load: Load,
    step_flows: Sequence[Flow],
) -> StepTime:
    """Time of one optimizer step at a routing density."""
    hardware = cluster.hardware
    rank_tokens = load.tokens * settings.accumulation
    active = load.density * moe.total_experts if moe_layers(model, moe) else 0.0
    flops = flops_per_token(model, moe, vocab_size, active)
    scores = 3 * 2 * model.seq_length * model.hidden_size * model.num_layers
    dense_flops = flops_per_token(model, moe, vocab_size, 0.0)
    experts = (flops - dense_flops) * rank_tokens / hardware.expert_flops
    matmul = (dense_flops - scores) * rank_tokens / hardware.gemm_flops + experts
    attention = scores * rank_tokens / hardware.attention_flops
    head = 3 * 2 * vocab_size * model.hidden_size * rank_tokens / hardware.gemm_flops
    first_gemm = 2 * 2 * model.hidden_size * (model.d_ffn // moe.granularity)
    over_budget = load.recomputed_pairs * moe_layers(model, moe) * settings.accumulation
    recompute = over_budget * first_gemm / hardware.expert_flops
    if model.activation_checkpointing:
        recompute += (matmul - head + attention) / 3
    kept = activations(
        model.model_copy(update={"activation_checkpointing": False}),
        moe,
        vocab_size,
        load,
        settings.dtype,
        is_cpu=hardware.is_cpu,
    ).saved
    logit_bytes = LOGIT_BYTES * (1.0 if settings.item == FP32 else 1.5) + 3 * settings.item
    loss = load.tokens * vocab_size * logit_bytes
    elementwise = (ACTIVATION_PASSES * kept + loss) * settings.accumulation / hardware.elementwise_bytes
    on_wire = {flow.name: flow.seconds(hardware) for flow in step_flows}
    exchange = sum(on_wire[flow.name] for flow in step_flows if flow.kind == "all-to-all")
    reducing = sum(on_wire[flow.name] for flow in step_flows if flow.name.endswith("gradients"))
    if any(flow.hidden for flow in step_flows):
        behind = (matmul + attention + elementwise) * 2 / 3
        reducing = max(0.0, reducing - (behind if settings.stage == 2 else behind / settings.accumulation))
    return StepTime(
        matmul=matmul,
        attention=attention,
        recompute=recompute,
        elementwise=elementwise,
        overhead=hardware.layer_seconds * model.num_layers * settings.accumulation,
        exchange=exchange,
        gradients=reducing,
        optimizer=_optimizer(groups, settings, cluster),
        parameters=sum(on_wire[f.name] for f in step_flows if f.kind != "all-to-all" and "gradients" not in f.name),
        step_tokens=settings.global_batch * model.seq_length,
        model_flops=flops * rank_tokens,
        peak_flops=hardware.peak_flops,
    )


def _optimizer(groups: Sequence[ParamGroup], settings: EngineSettings, cluster: Cluster) -> float:
    elements = sum(group.partition if settings.stage else group.elements for group in groups)
    if settings.offload:
        moved = 2 * settings.item * elements / PCIE_BYTES
        return moved + elements * FUSED_STEP_BYTES * cluster.gpus_per_node / HOST_BYTES
    return elements * (FUSED_STEP_BYTES if settings.fused_optimizer else STEP_BYTES) / cluster.hardware.copy_bytes
