"""Memory of one rank by kind, as DeepSpeed 0.19.8 and this model allocate it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ds_remoe.config.schema import MoEConfig
from ds_remoe.planning.activations import FP32, Activations, Load
from ds_remoe.planning.settings import REDUCE_BUCKET, EngineSettings
from ds_remoe.planning.sizes import ParamGroup

LAYERS, EXPERTS = "activations of the layers", "activations of the experts"
LOSS, WORKSPACE = "logits, loss, their gradients", "backward of one layer"


@dataclass(frozen=True)
class States:
    """Model states and buffers of the rank that holds the most, in bytes, whatever the routing.

    Attributes:
        parameters: in the training dtype.
        gradients: at the end of the last backward pass of a step.
        optimizer: masters and moments, on the device.
        buckets: in which ZeRO reduces gradients, from the beginning of backward to its end.
        step: needed besides while gradients are reduced and the optimizer steps; no activation exists then.
        host: of the rank on the host, with offloading.
    """

    parameters: float
    gradients: float
    optimizer: float
    buckets: float
    step: float
    host: float


def model_states(groups: Sequence[ParamGroup], settings: EngineSettings) -> States:
    """States of one rank for its parameter groups."""
    item, stage = settings.item, settings.stage
    elements = float(sum(group.elements for group in groups))
    optimizer_bytes = settings.master_bytes + settings.moment_bytes
    if stage == 0:
        # DeepSpeed flattens gradients to reduce them, and makes fp32 copies of half-precision ones to step.
        flat = item * min(elements, int(REDUCE_BUCKET)) if groups[0].replicas > 1 else 0
        step = max(flat, FP32 * elements if settings.master_bytes else 0)
        return States(item * elements, item * elements, optimizer_bytes * elements, 0, step, 0)
    partition = sum(group.partition for group in groups)
    largest = max(group.partition for group in groups)
    buckets: float = settings.bucket * item * (2 if settings.overlap else 1)
    if stage == 2:
        buckets += item * min(settings.bucket, elements)
    parameters = item * sum(group.padded for group in groups)
    if not settings.offload:
        # At stage 1 those of the parameters, and at the step the partition's; at stage 2 that alone.
        gradients, step = (item * partition, 0.0) if stage == 2 else (item * elements, float(item * partition))
        # One group at a time: its gradients in fp32, and Adam's denominator where no kernel does the whole step.
        step += FP32 * largest * ((item < FP32) + (not settings.fused_optimizer))
        return States(parameters, gradients, optimizer_bytes * partition, buckets, step, 0)
    temporary = item * max(size for group in groups for size in group.sizes)
    host: float = (optimizer_bytes + settings.master_bytes + item) * partition + temporary
    if settings.accumulation > 1:
        host += FP32 * sum(group.touched for group in groups)
    device_gradients = 0 if stage == 2 else item * elements
    return States(parameters, device_gradients, 0, buckets + temporary, 0, host)


@dataclass(frozen=True)
class Memory:
    """Everything on one rank at one routing density."""

    states: States
    activations: Activations
    exchange: float

    @property
    def backward(self) -> float:
        """Bytes at the worst moment of a backward pass."""
        return sum(self.kinds().values())

    @property
    def optimizer_step(self) -> float:
        """Bytes at the worst moment of an optimizer step."""
        states = self.states
        return states.parameters + states.gradients + states.optimizer + states.step

    @property
    def peak(self) -> float:
        return max(self.backward, self.optimizer_step)

    def kinds(self) -> dict[str, float]:
        """Bytes at that moment by kind, in the order of the table."""
        kept = self.activations
        at_the_loss = kept.head + kept.loss_block >= kept.workspace
        return {
            "parameters": self.states.parameters,
            "gradients": self.states.gradients,
            "optimizer states": self.states.optimizer,
            "communication buffers": self.states.buckets + self.exchange,
            LAYERS: kept.layers,
            EXPERTS: kept.experts,
            LOSS: kept.head + kept.loss_block if at_the_loss else 0.0,
            WORKSPACE: 0.0 if at_the_loss else kept.workspace,
        }


def exchange_buffers(moe: MoEConfig, hidden_size: int, load: Load, item: int) -> float:
    """Send and receive buffers of one all-to-all; received rows that are kept count as activations."""
    if moe.router == "dense" or moe.ep_size == 1:
        return 0.0
    return 2 * moe.ep_size * load.rows_to_rank * hidden_size * item
