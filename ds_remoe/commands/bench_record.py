"""`ds-remoe bench record`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from ds_remoe.commands.arguments import add_run_arguments, idle_override, positive

if TYPE_CHECKING:
    from ds_remoe.commands.arguments import Commands

SET_BY = {
    "remoe.train.output_dir": "the run lies in a temporary folder",
    "remoe.logging.wandb.mode": "the run is not logged",
}


def add_bench_record(commands: Commands) -> None:
    """Parser of `ds-remoe bench record`."""
    description = "Train a run and record what its routers decide in some steps, for the other benchmarks to replay."
    parser = commands.add_parser("record", help="record a routing trace", description=description)
    add_run_arguments(parser)
    parser.add_argument("--output", required=True, metavar="FILE.npz", help="trace to write; it must not exist")
    parser.add_argument(
        "--steps",
        type=_steps,
        required=True,
        metavar="STEP,...",
        help="optimizer steps to record, counted from 1; the training ends after the last",
    )
    parser.add_argument("--ranks", type=positive, metavar="N", help="ranks to train on (default: the run's ep_size)")
    parser.set_defaults(run=bench_record)


def _steps(text: str) -> list[int]:
    return sorted({positive(step) for step in text.split(",")})


def bench_record(arguments: argparse.Namespace) -> int:
    """Record a trace."""
    from pathlib import Path

    from ds_remoe.bench.ranks import RankError
    from ds_remoe.bench.record import record
    from ds_remoe.commands.output import make_console, output_problem

    output = Path(arguments.output)
    if problem := idle_override(arguments.overrides, SET_BY) or output_problem(arguments.output):
        print(problem, file=sys.stderr)
        return 2
    console = make_console()
    try:
        with console.status(f"training to step {arguments.steps[-1]}"):
            routings = record(Path(arguments.file), arguments.overrides, arguments.steps, arguments.ranks, output)
    except RankError as error:
        print(error, file=sys.stderr)
        return 1
    size = output.stat().st_size / 1024
    console.print(f"written: {output}, {routings} routings, {size:.0f} KiB", highlight=False, soft_wrap=True)
    return 0
