"""`ds-remoe bench quality`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from ds_remoe.commands.arguments import add_run_arguments, idle_override, positive, seed
from ds_remoe.config import load_run

if TYPE_CHECKING:
    from ds_remoe.commands.arguments import Commands

SET_BY = {
    "remoe.moe.router": "both routers are trained",
    "remoe.moe.ep_size": "each run has one rank",
    "remoe.train.seed": "--seeds sets it",
    "remoe.train.output_dir": "--runs sets it",
}


def add_bench_quality(commands: Commands) -> None:
    """Parser of `ds-remoe bench quality`."""
    description = "Train ReMoE and dropless TopK at equal measured FLOPs for each seed and compare their valid losses."
    parser = commands.add_parser("quality", help="ReMoE against TopK at equal FLOPs", description=description)
    add_run_arguments(parser)
    parser.add_argument("--seeds", type=seed, nargs="+", default=[0, 1, 2], metavar="SEED", help="default: 0 1 2")
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="seeds trained at a time (default: 1)")
    parser.add_argument("--runs", default="runs/bench-quality", metavar="DIR", help="folder of the trained runs")
    parser.add_argument("--output", metavar="FILE", help="results file to write; it must not exist")
    parser.set_defaults(run=bench_quality)


def bench_quality(arguments: argparse.Namespace) -> int:
    """Compare ReMoE with TopK and write the results file."""
    from pathlib import Path

    from ds_remoe.bench import quality
    from ds_remoe.bench.results_file import write_results
    from ds_remoe.commands.output import make_console, output_problem

    output = Path(arguments.output) if arguments.output else None
    problem = idle_override(arguments.overrides, SET_BY) or output_problem(arguments.output)
    repeated = [one for one in arguments.seeds if arguments.seeds.count(one) > 1]
    if repeated:
        problem = f"--seeds {repeated[0]}: stands there twice, and would train the same run; leave one out"
    if problem:
        print(problem, file=sys.stderr)
        return 2
    load_run(arguments.file, arguments.overrides, world_size=None)
    console = make_console()
    try:
        with console.status("training; each run's output is in its .log beside it"):
            rows = quality.compare(
                Path(arguments.file), arguments.overrides, arguments.seeds, Path(arguments.runs), arguments.jobs
            )
    except quality.QualityError as error:
        print(error, file=sys.stderr)
        return 1
    console.print(quality.table(rows))
    if output is not None:
        command = ["ds-remoe", "bench", "quality", arguments.file, *(f"--set={text}" for text in arguments.overrides)]
        command += ["--seeds", *map(str, arguments.seeds), "--jobs", str(arguments.jobs)]
        write_results(output, quality.WHAT, command, quality.figures(rows))
        console.print(f"written: {output}", highlight=False)
    return 0
