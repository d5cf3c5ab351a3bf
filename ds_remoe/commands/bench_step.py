"""`ds-remoe bench step`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from ds_remoe.commands.arguments import add_run_arguments, idle_override, positive
from ds_remoe.config import load_run

if TYPE_CHECKING:
    from ds_remoe.commands.arguments import Commands

SET_BY = {
    "remoe.moe.router": "all routers are measured",
    "remoe.moe.ep_size": "the benchmark runs on one rank",
    "remoe.train.output_dir": "the runs lie in a temporary folder",
}


def add_bench_step(commands: Commands) -> None:
    """Parser of `ds-remoe bench step`."""
    description = "Time whole optimizer steps of ReMoE, TopK and the dense model in turns, and profile ReMoE's."
    parser = commands.add_parser("step", help="whole training steps, and where they go", description=description)
    add_run_arguments(parser)
    parser.add_argument("--settle", type=positive, default=200, metavar="N", help="steps before timing (default: 200)")
    parser.add_argument("--repeats", type=positive, default=30, metavar="N", help="timed steps (default: 30)")
    parser.add_argument("--output", metavar="FILE", help="results file to write; it must not exist")
    parser.set_defaults(run=bench_step)


def bench_step(arguments: argparse.Namespace) -> int:
    """Time the steps and write the results file."""
    import tempfile
    from pathlib import Path

    from ds_remoe.bench import step
    from ds_remoe.bench.results_file import write_results
    from ds_remoe.commands.output import make_console, output_problem

    output = Path(arguments.output) if arguments.output else None
    if problem := idle_override(arguments.overrides, SET_BY) or output_problem(arguments.output):
        print(problem, file=sys.stderr)
        return 2
    load_run(arguments.file, arguments.overrides, world_size=None)
    console = make_console()
    status = f"training {arguments.settle} steps of each, then timing"
    try:
        with console.status(status), tempfile.TemporaryDirectory() as runs:
            result = step.measure(
                Path(arguments.file), arguments.overrides, arguments.settle, arguments.repeats, Path(runs)
            )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    console.print(step.table(result))
    console.print(step.profile_table(result))
    if output is not None:
        command = ["ds-remoe", "bench", "step", arguments.file, *(f"--set={text}" for text in arguments.overrides)]
        command += ["--settle", str(arguments.settle), "--repeats", str(arguments.repeats)]
        write_results(output, step.WHAT, command, step.figures(result))
        console.print(f"written: {output}", highlight=False)
    return 0
