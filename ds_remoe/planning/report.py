"""A plan as tables and as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group as Stack
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ds_remoe.model.flops import num_active_params, num_params
from ds_remoe.planning.advice import advice, stage_name
from ds_remoe.planning.hardware import GB, GIB
from ds_remoe.planning.plan import Plan
from ds_remoe.planning.time import ACTIVATION_PASSES, HOST_BYTES, PCIE_BYTES


def show(plan: Plan) -> Stack:
    """Everything about one cluster, for a terminal."""
    tables = [_memory_table(plan), _traffic_table(plan), _time_table(plan)]
    warnings = [Text(f"! {line}", style="yellow") for line in advice(plan)]
    notes = [Text(f"  {line}", style="dim") for line in footnotes(plan)]
    return Stack(_heading(plan), *tables, *warnings, Padding(Stack(*notes), (1, 0, 0, 0)))


def show_scaling(plans: Sequence[Plan], refused: Mapping[int, str]) -> Stack:
    """One row a cluster, and why the run cannot use the others.

    Args:
        plans: at least one, the smallest cluster first; efficiency is relative to it.
        refused: number of nodes → the problem.
    """
    table = _table("Scaling")
    for name in ("nodes", "ranks", "batch", "accumulation", "memory", "step", "tokens/s", "MFU", "wire", "efficiency"):
        table.add_column(name, justify="right")
    each = [plan.settled.time.tokens_per_second / plan.cluster.world_size for plan in plans]
    for plan, rate in zip(plans, each, strict=True):
        time = plan.settled.time
        table.add_row(
            f"{plan.cluster.nodes:,}",
            f"{plan.cluster.world_size:,}",
            f"{plan.settings.global_batch:,}",
            str(plan.settings.accumulation),
            Text(_memory(plan.peak), style="green" if plan.fits else "red"),
            _seconds(time.total),
            f"{time.tokens_per_second:,.0f}",
            f"{time.mfu:.1%}",
            f"{time.communication / time.total:.0%}",
            f"{rate / each[0]:.0%}",
        )
    lines = [Text(f"! {nodes:,} nodes: {problem}", style="yellow") for nodes, problem in refused.items()]
    if any("train_batch_size" in problem for problem in refused.values()):
        hint = "--set train_batch_size=null lets the batch grow with the ranks, "
        hint += "--set gradient_accumulation_steps=null keeps it"
        lines.append(Text(f"  {hint}", style="yellow"))
    return Stack(table, *lines)


def footnotes(plan: Plan) -> list[str]:
    """What the figures rest on."""
    hardware = plan.cluster.hardware
    own = [
        f"assumed: {ACTIVATION_PASSES} passes over each activation; {hardware.link_latency * 1e6:.0f} us a hop in a "
        f"node, {hardware.network_latency * 1e6:.0f} us between nodes; experts balanced, a token's experts independent",
        "memory leaves out what the runtime holds: contexts, libraries, fragmentation"
        + (", and memory that is kept for the next step until the host runs short" if hardware.is_cpu else ""),
    ]
    if any(flow.hidden for flow in plan.settled.flows):
        own.insert(0, "* behind backward: the table of times has what backward does not hide")
    if plan.settings.offload:
        own.insert(
            0, f"assumed: {PCIE_BYTES / GB:g} GB/s to the host, {HOST_BYTES / GB:g} GB/s of a node's host memory"
        )
    return [*hardware.notes, *own]


def as_figures(plan: Plan) -> dict[str, Any]:
    """The plan as plain data: bytes, seconds, shares."""
    return {
        "nodes": plan.cluster.nodes,
        "gpus_per_node": plan.cluster.gpus_per_node,
        "hardware": asdict(plan.cluster.hardware),
        "engine": asdict(plan.settings),
        "fits": plan.fits,
        "usable_bytes": round(plan.usable_memory),
        "stages": {
            stage.name: {
                "density": stage.load.density,
                "memory_bytes": {kind: round(size) for kind, size in stage.memory.kinds().items()},
                "backward_bytes": round(stage.memory.backward),
                "optimizer_step_bytes": round(stage.memory.optimizer_step),
                "host_bytes": round(stage.memory.states.host),
                "wire": [
                    {
                        "what": flow.name,
                        "kind": flow.kind,
                        "ranks": flow.group.size,
                        "nodes": flow.group.nodes,
                        "calls": flow.calls,
                        "rank_bytes_in_node": round(flow.rank_near),
                        "node_bytes_between_nodes": round(flow.node_far),
                        "seconds": flow.seconds(plan.cluster.hardware),
                    }
                    for flow in stage.flows
                ],
                "seconds": stage.time.parts() | {"total": stage.time.total},
                "tokens_per_second": stage.time.tokens_per_second,
                "mfu": stage.time.mfu,
            }
            for stage in plan.stages
        },
        "warnings": advice(plan),
        "notes": footnotes(plan),
    }


def _heading(plan: Plan) -> Text:
    model, moe, cluster, settings = plan.run.remoe.model, plan.run.remoe.moe, plan.cluster, plan.settings
    total, active = (count(model, moe, plan.vocab_size) for count in (num_params, num_active_params))
    nodes = "1 node" if cluster.nodes == 1 else f"{cluster.nodes:,} nodes"
    text = Text(f"\n{plan.run.path.name}", style="bold")
    text.append(f"  {_count(total)} parameters, {_count(active)} active, {settings.dtype}, ZeRO {settings.stage}")
    text.append(f"\n{nodes} of {cluster.gpus_per_node} x {cluster.hardware.name}", style="bold")
    text.append(
        f"  batch {settings.global_batch:,} = {settings.micro_batch} x {settings.accumulation} x "
        f"{cluster.world_size:,} ranks; {moe.total_experts} experts, ep_size {moe.ep_size}\n"
        if len(plan.groups) > 1
        else f"  batch {settings.global_batch:,} = {settings.micro_batch} x {settings.accumulation} x "
        f"{cluster.world_size:,} ranks; dense\n"
    )
    return text


def _memory_table(plan: Plan) -> Table:
    table = _table("Memory of a rank")
    table.add_column("", no_wrap=True)
    for stage in plan.stages:
        table.add_column(f"{stage_name(plan, stage)}\n{stage.load.density:.3g} active", justify="right")
    columns = [stage.memory.kinds() for stage in plan.stages]
    for kind in columns[0]:
        if any(column[kind] for column in columns):
            table.add_row(kind, *(_memory(column[kind]) for column in columns))
    table.add_section()
    for name, values in (
        ("in backward", [stage.memory.backward for stage in plan.stages]),
        ("in the optimizer step", [stage.memory.optimizer_step for stage in plan.stages]),
    ):
        table.add_row(name, *(_fitting(value, plan) for value in values), style="bold")
    if plan.settled.memory.states.host:
        table.add_row("on the host", *(_memory(stage.memory.states.host) for stage in plan.stages))
    return table


def _traffic_table(plan: Plan) -> Table | Text:
    if not plan.settled.flows:
        return Text("One rank: nothing on the wire.\n")
    table = _table(f"On the wire in a step of {stage_name(plan, plan.settled)}")
    table.add_column("", no_wrap=True)
    table.add_column("collective", no_wrap=True)
    for name in ("ranks", "calls", "a rank in\nits node", "a node\nto others", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for flow in plan.settled.flows:
        table.add_row(
            flow.name,
            flow.kind + ("*" if flow.hidden else ""),
            f"{flow.group.size:,}",
            f"{flow.calls:,}",
            _bytes(flow.rank_near),
            _bytes(flow.node_far),
            _seconds(flow.seconds(plan.cluster.hardware)),
        )
    return table


def _time_table(plan: Plan) -> Table:
    table = _table("A step")
    table.add_column("", no_wrap=True)
    stages = [stage for stage in plan.stages if stage.name != "worst"]
    for stage in stages:
        table.add_column(stage_name(plan, stage), justify="right")
        table.add_column("", justify="right", style="dim")
    columns = [stage.time.parts() for stage in stages]
    for part in columns[0]:
        if any(column[part] for column in columns):
            shares = (
                (_seconds(c[part]), f"{c[part] / s.time.total:.0%}") for c, s in zip(columns, stages, strict=True)
            )
            table.add_row(part, *(cell for pair in shares for cell in pair))
    table.add_section()
    rows = [
        ("step", [_seconds(s.time.total) for s in stages]),
        ("tokens/s", [f"{s.time.tokens_per_second:,.0f}" for s in stages]),
        ("MFU", [f"{s.time.mfu:.1%}" for s in stages]),
    ]
    for name, values in rows:
        table.add_row(name, *(cell for value in values for cell in (value, "")), style="bold")
    return table


def _table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", title_style="bold cyan", header_style="dim", box=None, padding=(0, 2, 0, 0)
    )


def _fitting(size: float, plan: Plan) -> Text:
    share = size / plan.cluster.hardware.memory_bytes
    return Text(f"{share:.0%}  {_memory(size)}", style="red" if size > plan.usable_memory else "green")


def _memory(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / GIB * 1024:.1f} MiB"


def _count(number: float) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.0f}M"


def _bytes(size: float) -> str:
    for unit, scale in (("GB", GB), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return "-" if not size else f"{size:.0f} B"


def _seconds(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"
