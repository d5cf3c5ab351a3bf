"""The plan of a run on a cluster: memory, traffic and time at the densities of its stages, and what to change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ds_remoe.config import RunConfig
from ds_remoe.config.schema import MoEConfig
from ds_remoe.planning.activations import Load, activations
from ds_remoe.planning.hardware import MEMORY_USABLE, Cluster
from ds_remoe.planning.memory import Memory, exchange_buffers, model_states
from ds_remoe.planning.settings import EngineSettings
from ds_remoe.planning.sizes import ParamGroup, param_groups
from ds_remoe.planning.time import StepTime, step_time
from ds_remoe.planning.traffic import Flow, flows

DENSE_STAGE_DENSITY = 0.5
"""A ReLU router's density at the start: its logits are symmetric about zero."""


@dataclass(frozen=True)
class Stage:
    """One routing density.

    Attributes:
        name: "III" is the settled stage, "I" the dense one at the start, "worst" every expert active for every token.
    """

    name: str
    load: Load
    memory: Memory
    flows: tuple[Flow, ...]
    time: StepTime


@dataclass(frozen=True)
class Plan:
    """What a run will need on one cluster.

    Attributes:
        stages: by name, "III" first; "I" and "worst" for ReLU routers alone.
    """

    run: RunConfig
    vocab_size: int
    cluster: Cluster
    settings: EngineSettings
    groups: tuple[ParamGroup, ...]
    stages: tuple[Stage, ...]

    @property
    def settled(self) -> Stage:
        """The stage in which a run spends nearly all its time."""
        return self.stages[0]

    @property
    def usable_memory(self) -> float:
        """Bytes of an accelerator that a run can fill; the rest goes to contexts, libraries and fragmentation."""
        return self.cluster.hardware.memory_bytes * MEMORY_USABLE

    @property
    def peak(self) -> float:
        """Most bytes of a rank in the stages that the run passes, the worst case left aside."""
        return max(stage.memory.peak for stage in self.stages if stage.name != "worst")

    @property
    def fits(self) -> bool:
        """Whether these stages fit."""
        return self.peak <= self.usable_memory


def stage_densities(moe: MoEConfig, dense_stage_density: float = DENSE_STAGE_DENSITY) -> dict[str, float]:
    """The densities worth planning: a ReLU router's three, or the one that another router always has."""
    settled = moe.k / moe.num_experts
    if moe.router != "relu":
        return {"III": settled}
    return {"III": settled, "I": max(dense_stage_density, settled), "worst": 1.0}


def make_plan(run: RunConfig, vocab_size: int, cluster: Cluster, densities: Mapping[str, float]) -> Plan:
    """Plan a run that was loaded and checked for the cluster's world size.

    Args:
        densities: stage → share of active pairs, the stage that lasts first.

    Raises:
        ValueError: the batch sizes do not fit the world size.
    """
    model, moe = run.remoe.model, run.remoe.moe
    settings = EngineSettings.of(run, cluster.world_size)
    dense, experts = param_groups(model, moe, vocab_size, cluster.world_size)
    groups = (dense, *experts)
    states = model_states(groups, settings)
    tokens = settings.micro_batch * model.seq_length
    is_cpu = cluster.hardware.is_cpu
    over_ranks = moe.router == "relu" and run.remoe.sparsity.balance_scope == "data_parallel"
    stages = []
    for name, density in densities.items():
        load = Load.of(moe, tokens, density, is_cpu=is_cpu, model=model)
        kept = activations(model, moe, vocab_size, load, settings.dtype, is_cpu=is_cpu)
        memory = Memory(states, kept, exchange_buffers(moe, model.hidden_size, load, settings.item))
        wire = flows(model, moe, groups, settings, cluster, load, over_ranks)
        seconds = step_time(model, moe, vocab_size, groups, settings, cluster, load, wire)
        stages.append(Stage(name, load, memory, tuple(wire), seconds))
    return Plan(run, vocab_size, cluster, settings, groups, tuple(stages))
