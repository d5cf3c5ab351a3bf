"""`ds-remoe plan`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ds_remoe.commands.arguments import add_run_arguments, positive
from ds_remoe.config import ConfigError, RunConfig, load_run

if TYPE_CHECKING:
    from rich.console import Console

    from ds_remoe.commands.arguments import Commands
    from ds_remoe.planning.hardware import Hardware
    from ds_remoe.planning.plan import Plan

DEFAULT_GPU = "h100"


def add_plan(commands: Commands) -> None:
    """Parser of `ds-remoe plan`."""
    description = (
        "Memory by kind, bytes on the wire, step time and MFU of a run on a cluster, before there is one. The figures "
        "of an accelerator are published ones, or with --calibrate this machine's; options override them."
    )
    parser = commands.add_parser("plan", help="what a run needs on a cluster", description=description)
    add_run_arguments(parser)
    number: dict[str, Any] = {"type": _above_zero, "metavar": "X"}
    parser.add_argument(
        "--nodes", type=positive, nargs="+", default=[1], metavar="N", help="one or several (default: 1)"
    )
    parser.add_argument("--gpus-per-node", type=positive, default=8, metavar="G", help="ranks a node (default: 8)")
    parser.add_argument("--gpu", metavar="NAME", help=f"a100-40gb, a100, {DEFAULT_GPU} (default), h200, b200, l40s")
    parser.add_argument("--peak-tflops", **number, help="peak of one accelerator at the training dtype")
    parser.add_argument(
        "--gemm-efficiency", **number, help="share of the peak that matrix products reach (default: 0.6)"
    )
    parser.add_argument("--memory-gib", **number, help="memory of one accelerator")
    parser.add_argument("--bandwidth-memory", **number, help="GB/s of its memory, as reached")
    parser.add_argument("--bandwidth-intra", **number, help="GB/s from one to the others of its node, as reached")
    parser.add_argument(
        "--bandwidth-inter", "--bandwidth", **number, help="GB/s from a whole node to others, as reached"
    )
    parser.add_argument("--density", **number, help="share of active pairs in the dense stage (default: 0.5)")
    parser.add_argument("--calibrate", action="store_true", help="measure this machine and plan with its rates")
    parser.add_argument("--check", type=positive, metavar="STEPS", help="train as many here on one rank, and compare")
    parser.add_argument("--output", metavar="FILE", help="JSON to write; it must not exist")
    parser.add_argument("--picture", metavar="FILE", help="PNG of the memory by kind")
    parser.set_defaults(run=plan)


def plan(arguments: argparse.Namespace) -> int:
    """Plan a run, show it, and write what was asked for."""
    import os
    from pathlib import Path

    import torch

    from ds_remoe.commands.output import make_console, output_problem

    # DeepSpeed would warn of every machine without an accelerator, where a plan is as good as anywhere.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    from ds_remoe.bench.results_file import write_results
    from ds_remoe.planning.hardware import ACCELERATORS
    from ds_remoe.planning.report import as_figures, show, show_scaling

    output = Path(arguments.output) if arguments.output else None
    complaint = _usage_problem(arguments, list(ACCELERATORS), torch.cuda.is_available()) or output_problem(
        arguments.output, arguments.picture
    )
    if complaint:
        print(complaint, file=sys.stderr)
        return 2
    console = make_console()
    try:
        plans, refused = _plans(arguments)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    console.print(show(plans[0]), highlight=False)
    if len(arguments.nodes) > 1:
        console.print(show_scaling(plans, refused), highlight=False)
    figures: dict[str, Any] = {"plans": [as_figures(one) for one in plans], "refused": refused}
    if arguments.check:
        figures["check"] = _check(plans[0], arguments.check, console)
    try:
        if arguments.picture:
            from ds_remoe.planning.picture import plot_memory

            console.print(f"written: {plot_memory(plans[0], Path(arguments.picture))}", highlight=False)
        if output is not None:
            from ds_remoe.planning.check import WHAT as CHECKED

            what = (
                CHECKED
                if arguments.check
                else "The plan of a run: bytes and seconds by formula, nothing measured but rates."
            )
            write_results(output, what, ["ds-remoe", *sys.argv[1:]], figures)
            console.print(f"written: {output}", highlight=False)
    except OSError as error:
        print(f"{error.filename}: cannot be written ({error.strerror})", file=sys.stderr)
        return 1
    return 0


def _usage_problem(arguments: argparse.Namespace, known: Sequence[str], has_gpu: bool) -> str | None:
    if arguments.gpu is not None and arguments.gpu not in known:
        return f"--gpu {arguments.gpu}: unknown; known are {', '.join(known)}; another's figures can be given by option"
    if arguments.check and (arguments.nodes != [1] or arguments.gpus_per_node != 1):
        return "--check: trains on one rank; add --nodes 1 --gpus-per-node 1"
    measuring = "--calibrate" if arguments.calibrate else "--check" if arguments.check else None
    if measuring and arguments.gpu is not None and not has_gpu:
        return f"--gpu {arguments.gpu}: {measuring} plans with this machine's processor, as it has no GPU; leave it out"
    if measuring and arguments.gemm_efficiency is not None:
        return f"--gemm-efficiency {arguments.gemm_efficiency:g}: {measuring} measures it; leave it out"
    for name in ("gemm_efficiency", "density"):
        value = getattr(arguments, name)
        if value is not None and value > 1:
            return f"--{name.replace('_', '-')} {value:g}: must be a share, at most 1"
    return None


def _plans(arguments: argparse.Namespace) -> tuple[list[Plan], dict[int, str]]:
    """A plan of each number of nodes that the run can use, and why it cannot use the others.

    Raises:
        ConfigError: it can use none of them.
        ValueError: --density is none of a dense stage.
    """
    from ds_remoe.commands.config import read_vocab_size
    from ds_remoe.planning.hardware import Cluster
    from ds_remoe.planning.plan import DENSE_STAGE_DENSITY, make_plan, stage_densities

    runs: dict[int, RunConfig] = {}
    refused: dict[int, ConfigError] = {}
    for nodes in sorted(set(arguments.nodes)):
        try:
            world_size = nodes * arguments.gpus_per_node
            runs[nodes] = load_run(arguments.file, arguments.overrides, world_size=world_size)
        except ConfigError as error:
            refused[nodes] = error
    if not runs:
        raise next(iter(refused.values()))
    first, run = next(iter(runs.items()))
    vocabulary = read_vocab_size(run)
    hardware = _hardware(arguments, run, vocabulary, first)
    densities = stage_densities(run.remoe.moe, arguments.density or DENSE_STAGE_DENSITY)
    if arguments.density and arguments.density not in densities.values():
        settled = f"k/E = {densities['III']:g}"
        problem = "only a ReLU router has a dense stage" if "I" not in densities else f"less than the settled {settled}"
        raise ValueError(f"--density {arguments.density:g}: {problem}; leave it out")
    plans = [
        make_plan(run, vocabulary, Cluster(nodes, arguments.gpus_per_node, hardware), densities)
        for nodes, run in runs.items()
    ]
    return plans, {nodes: "; ".join(map(str, error.problems)) for nodes, error in refused.items()}


def _hardware(arguments: argparse.Namespace, run: RunConfig, vocab_size: int, nodes: int) -> Hardware:
    from ds_remoe.planning.hardware import ACCELERATORS, published, with_options
    from ds_remoe.planning.settings import EngineSettings

    settings = EngineSettings.of(run, nodes * arguments.gpus_per_node)
    hardware = published(
        ACCELERATORS[arguments.gpu or DEFAULT_GPU],
        settings.dtype,
        arguments.gpus_per_node,
        peak_tflops=arguments.peak_tflops,
        gemm_efficiency=arguments.gemm_efficiency,
    )
    if arguments.calibrate or arguments.check:
        import torch

        from ds_remoe.planning.calibrate import calibrated, measure_rates

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        rates = measure_rates(run, settings, vocab_size, device)
        hardware = calibrated(rates, hardware, device, arguments.gpus_per_node)
    return with_options(
        hardware,
        peak_tflops=arguments.peak_tflops,
        memory_gib=arguments.memory_gib,
        memory_gbs=arguments.bandwidth_memory,
        link_gbs=arguments.bandwidth_intra,
        network_gbs=arguments.bandwidth_inter,
    )


def _check(plan: Plan, steps: int, console: Console) -> dict[str, Any]:
    """Train here, show the comparison, and return it."""
    from ds_remoe.planning.check import compare, measure, one_rank, table
    from ds_remoe.planning.plan import make_plan

    with one_rank(plan.run.remoe.train.seed) as device:
        measured = measure(plan, device, steps)
    density = measured.density or plan.settled.load.density
    (stage,) = make_plan(plan.run, plan.vocab_size, plan.cluster, {"measured": density}).stages
    rows = compare(stage, measured)
    console.print(table(rows, density))
    figures = {name: {"planned": planned, "measured": found} for name, (planned, found) in rows.items()}
    return {"density": density, "step_seconds": measured.step_seconds, **figures}


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value
