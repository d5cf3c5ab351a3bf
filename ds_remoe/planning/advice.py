"""What a plan warns of, each time with the field to change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ds_remoe.moe.budget import MIN_CHUNK_PAIRS
from ds_remoe.planning.hardware import GIB
from ds_remoe.planning.memory import EXPERTS
from ds_remoe.planning.plan import Plan, Stage, make_plan

_SLOW_SHARE = 0.3
"""Share of a step on the wire from which it is worth a word."""
_ROOMY = 0.8
"""Share of the usable memory up to which a larger plan is recommended."""


def advice(plan: Plan) -> list[str]:
    """Warnings, the gravest first; empty where there is nothing to change."""
    return [*_memory(plan), *_placement(plan), *_traffic(plan), *_efficiency(plan)]


def _memory(plan: Plan) -> Iterator[str]:
    for stage in plan.stages:
        peak = stage.memory.peak
        if peak <= plan.usable_memory:
            continue
        moment = "backward" if stage.memory.backward >= stage.memory.optimizer_step else "the optimizer step"
        kind, size = max(stage.memory.kinds().items(), key=lambda entry: entry[1])
        yield (
            f"does not fit in {stage_name(plan, stage)}: {peak / GIB:.1f} GiB in {moment}, "
            f"{plan.usable_memory / GIB:.1f} GiB are usable; the largest kind is {kind}, {size / GIB:.1f} GiB: "
            f"{_remedy(plan, stage, kind)}"
        )
        return


def _remedy(plan: Plan, stage: Stage, kind: str) -> str:
    """What makes one kind of memory smaller."""
    settings, moe = plan.settings, plan.run.remoe.moe
    world, experts = plan.cluster.world_size, sum(group.elements for group in plan.groups[1:])
    if kind == "communication buffers":
        return f"lower zero_optimization.reduce_bucket_size = {settings.bucket:,}" if settings.stage else _batch(plan)
    if kind in ("parameters", "gradients", "optimizer states"):
        larger = [n for n in range(moe.ep_size + 1, world + 1) if world % n == 0 and moe.total_experts % n == 0]
        if kind == "optimizer states" and settings.stage == 0 and world > 1:
            return "set zero_optimization.stage to 1, which shares the optimizer states between the ranks"
        if kind == "gradients" and settings.stage == 1 and world > 1:
            return "set zero_optimization.stage to 2, which shares the gradients between the ranks"
        if 2 * experts > plan.groups[0].elements and larger:
            return f"raise remoe.moe.ep_size from {moe.ep_size} to {larger[0]}, which leaves fewer experts on each rank"
        if kind == "optimizer states" and not settings.offload:
            return 'offload them: zero_optimization.offload_optimizer {"device": "cpu"}, with stage 1 or 2'
        return "use a smaller model, or more ranks with a larger remoe.moe.ep_size"
    if kind == EXPERTS and stage.load.pairs == stage.load.kept_pairs and stage.name != "III":
        return (
            "set remoe.moe.activation_budget, for example to 1.25; it keeps the dense stage as small as the settled one"
        )
    if not plan.run.remoe.model.activation_checkpointing:
        return f"set remoe.model.activation_checkpointing to true, or {_batch(plan)}"
    return _batch(plan)


def _batch(plan: Plan) -> str:
    settings = plan.settings
    if settings.micro_batch == 1:
        return "the micro-batch is 1 already: shorten remoe.model.seq_length, or use a smaller model"
    return (
        f"lower train_micro_batch_size_per_gpu from {settings.micro_batch}, with gradient_accumulation_steps raised "
        f"from {settings.accumulation} for the same batch"
    )


def _placement(plan: Plan) -> Iterator[str]:
    moe, cluster = plan.run.remoe.moe, plan.cluster
    exchange = next((flow for flow in plan.settled.flows if flow.kind == "all-to-all"), None)
    if exchange is not None and exchange.group.crosses_nodes:
        inside = max(n for n in range(1, moe.ep_size + 1) if moe.ep_size % n == 0 and cluster.gpus_per_node % n == 0)
        yield (
            f"expert groups cross nodes: remoe.moe.ep_size = {moe.ep_size} on {cluster.gpus_per_node} ranks a node, so "
            f"{exchange.node_far / GIB:.2f} GiB leave a node in each step for experts; remoe.moe.ep_size = {inside} "
            "would stay inside"
        )
    if plan.settings.stage and len(plan.groups) > 1 and plan.groups[1].replicas == 1 and cluster.world_size > 1:
        yield (
            f"each expert is on one rank alone (ep_size = {moe.ep_size} = all ranks), so ZeRO shares only the "
            "optimizer states of the dense part; more ranks would share those of the experts as well"
        )


def _traffic(plan: Plan) -> Iterator[str]:
    settings, time = plan.settings, plan.settled.time
    if settings.stage == 2 and settings.accumulation > 1 and plan.cluster.world_size > 1:
        yield (
            f"zero_optimization.stage = 2 reduces gradients in each of the {settings.accumulation} micro-batches; "
            "stage 1 reduces them once a step, and needs the memory of whole gradients for it"
        )
    share = time.gradients / time.total
    if share > _SLOW_SHARE and not settings.overlap and settings.stage:
        yield (
            f"reducing gradients takes {share:.0%} of a step; zero_optimization.overlap_comm = true hides it behind "
            "backward"
        )
    elif share > _SLOW_SHARE:
        yield f"reducing gradients takes {share:.0%} of a step; raise gradient_accumulation_steps, or the bandwidth"
    if time.exchange / time.total > _SLOW_SHARE:
        yield f"bringing tokens to experts takes {time.exchange / time.total:.0%} of a step; lower remoe.moe.ep_size"


def _efficiency(plan: Plan) -> Iterator[str]:
    moe = plan.run.remoe.moe
    if plan.run.remoe.model.activation_checkpointing:
        kept = _without_checkpointing(plan)
        worst = max(stage.memory.peak for stage in kept.stages)
        if worst <= _ROOMY * plan.usable_memory:
            share = 1 - kept.settled.time.total / plan.settled.time.total
            yield (
                f"activation checkpointing takes {share:.0%} of a step; without it {worst / GIB:.1f} GiB of "
                f"{plan.usable_memory / GIB:.1f} are needed at the worst: set "
                "remoe.model.activation_checkpointing to false"
            )
    if len(plan.groups) > 1:
        each = plan.settled.load.pairs / (moe.total_experts // moe.ep_size)
        if each < MIN_CHUNK_PAIRS:
            yield (
                f"an expert gets {each:.0f} tokens of a micro-batch, too few to fill a GEMM; raise "
                "train_micro_batch_size_per_gpu, or remoe.moe.ep_size"
            )
    elements = sum(group.elements for group in plan.groups)
    if plan.settings.stage and plan.settings.bucket > 2 * elements:
        yield (
            f"zero_optimization.reduce_bucket_size = {plan.settings.bucket:,} reserves more than the {elements:,} "
            "gradients of a rank fill; lower it"
        )


def _without_checkpointing(plan: Plan) -> Plan:
    remoe = plan.run.remoe
    model = remoe.model.model_copy(update={"activation_checkpointing": False})
    run = replace(plan.run, remoe=remoe.model_copy(update={"model": model}))
    return make_plan(run, plan.vocab_size, plan.cluster, {stage.name: stage.load.density for stage in plan.stages})


def stage_name(plan: Plan, stage: Stage) -> str:
    """A stage's name in a sentence or a column."""
    if plan.run.remoe.moe.router != "relu":
        return "every step"
    return {"III": "stage III", "I": "stage I", "worst": "the worst case"}[stage.name]
