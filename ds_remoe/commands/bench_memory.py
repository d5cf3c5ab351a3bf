"""`ds-remoe bench memory`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from ds_remoe.commands.arguments import add_run_arguments, positive
from ds_remoe.config import load_run
from ds_remoe.config.batch import MICRO
from ds_remoe.config.problems import MISSING, ConfigError, ConfigProblem
from ds_remoe.config.schema import TrainedTokenizer

if TYPE_CHECKING:
    from ds_remoe.bench.memory_rigs import Sizes
    from ds_remoe.commands.arguments import Commands
    from ds_remoe.config.load import RunConfig

KINDS = ("layer", "model")


def add_bench_memory(commands: Commands) -> None:
    """Parser of `ds-remoe bench memory`."""
    description = (
        "Measure the peak activation memory of one MoE layer and of the whole model of a run's file, forward and "
        "backward, against routing density, with and without remoe.moe.activation_budget, and of DeepSpeed's MOELayer "
        "with the same routing. All experts of a layer are in one process, unless --ep-size says otherwise."
    )
    parser = commands.add_parser("memory", help="activation memory against density", description=description)
    add_run_arguments(parser)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="default: both")
    parser.add_argument("--densities", nargs="+", type=_density, metavar="D", help="besides k/E; default: 0.05 to 1")
    parser.add_argument("--micro-batch", type=positive, metavar="N", help=f"sequences; default: the file's {MICRO}")
    parser.add_argument(
        "--ep-size",
        type=positive,
        default=1,
        metavar="N",
        help="spread the experts over N ranks of this machine; the fullest rank counts, DeepSpeed's layer is left out",
    )
    parser.add_argument("--vocab-size", type=positive, metavar="V", help="default: that of the file's tokenizer")
    parser.add_argument("--output", metavar="FILE", help="results file to write; it must not exist")
    parser.add_argument("--picture", metavar="FILE", help="PNG to write")
    parser.set_defaults(run=bench_memory)


def bench_memory(arguments: argparse.Namespace) -> int:
    """Measure, print the table and the verdict, and write results and picture."""
    from pathlib import Path

    from ds_remoe.commands.output import make_console, output_problem

    output = Path(arguments.output) if arguments.output else None
    problem = output_problem(arguments.output, arguments.picture)
    if arguments.vocab_size is not None and "model" not in arguments.kinds:
        problem = f"--vocab-size {arguments.vocab_size}: a layer has no vocabulary; add --kinds model, or leave it out"
    if problem:
        print(problem, file=sys.stderr)
        return 2
    sizes = _sizes(load_run(arguments.file, arguments.overrides, world_size=None), arguments)

    from ds_remoe.bench import memory
    from ds_remoe.bench.memory_ranks import measure_on_ranks
    from ds_remoe.bench.ranks import RankError
    from ds_remoe.bench.results_file import write_results

    console, points = make_console(), list[memory.Point]()
    densities = arguments.densities or memory.DENSITIES
    try:
        with console.status(f"measuring on {sizes.moe.ep_size} rank{'s' if sizes.moe.ep_size > 1 else ''}") as status:
            if sizes.moe.ep_size > 1:
                points = measure_on_ranks(sizes, arguments.kinds, densities)
            else:
                for point in memory.measure(sizes, arguments.kinds, densities):
                    points.append(point)
                    status.update(f"measured {point.kind}, {point.rival}, density {point.density:.3f}")
    except RankError as error:
        print(error, file=sys.stderr)
        return 1
    console.print(memory.table(points))
    stage_three = memory.stage_three_density(sizes)
    for verdict in memory.judge(points, stage_three):
        console.print(memory.sentence(verdict), highlight=False)
    if arguments.picture:
        from ds_remoe.bench.memory_plot import plot_memory

        experts, dtype = sizes.moe.total_experts, str(sizes.dtype).removeprefix("torch.")
        ranks = f" on {sizes.moe.ep_size} ranks" if sizes.moe.ep_size > 1 else ""
        title = f"T = {sizes.tokens}, D = {sizes.model.hidden_size}, {experts} experts{ranks}, {dtype}"
        console.print(f"drawn: {plot_memory(points, stage_three, Path(arguments.picture), title)}", highlight=False)
    if output is not None:
        write_results(output, memory.WHAT, _command(arguments), memory.figures(sizes, points))
        console.print(f"written: {output}", highlight=False)
    return 0


def _sizes(run: RunConfig, arguments: argparse.Namespace) -> Sizes:
    import torch

    from ds_remoe.bench.memory_rigs import Sizes

    moe, tokenizer = run.remoe.moe, run.remoe.data.tokenizer
    micro_batch: int | None = arguments.micro_batch or run.deepspeed.get(MICRO)
    vocab_size = arguments.vocab_size or (tokenizer.vocab_size if isinstance(tokenizer, TrainedTokenizer) else None)
    problems = []
    if moe.router != "relu":
        remedy = 'only ReLU routing has a density of its own; measure a file with router "relu"'
        problems.append(ConfigProblem("remoe.moe.router", moe.router, remedy))
    if micro_batch is None:
        problems.append(ConfigProblem(MICRO, MISSING, "the file leaves it to the number of ranks; give --micro-batch"))
    if vocab_size is None and "model" in arguments.kinds:
        remedy = "the file of a tokenizer that exists does not tell its size; give --vocab-size"
        problems.append(ConfigProblem("remoe.data.tokenizer.type", tokenizer.type, remedy))
    if moe.total_experts % arguments.ep_size:
        remedy = f"--ep-size {arguments.ep_size} does not divide the {moe.total_experts} experts of a layer"
        problems.append(ConfigProblem("remoe.moe.num_experts", moe.num_experts, remedy))
    if problems or micro_batch is None:
        raise ConfigError(arguments.file, problems)
    dtype = torch.float32
    for name, wanted in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if run.deepspeed.get(name, {}).get("enabled", False):
            dtype = wanted
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spread = moe.model_copy(update={"ep_size": arguments.ep_size})
    return Sizes(run.remoe.model, spread, vocab_size or 1, micro_batch, dtype, device)


def _density(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0 and at most 1")
    return value


def _command(arguments: argparse.Namespace) -> list[str]:
    command = ["ds-remoe", "bench", "memory", arguments.file, *(f"--set={text}" for text in arguments.overrides)]
    command += ["--kinds", *arguments.kinds]
    if arguments.densities:
        command += ["--densities", *map(str, arguments.densities)]
    for name, default in (("micro_batch", None), ("vocab_size", None), ("ep_size", 1)):
        if getattr(arguments, name) != default:
            command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    return command
