"""`ds-remoe bench comm`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from ds_remoe.commands.arguments import positive

if TYPE_CHECKING:
    from ds_remoe.commands.arguments import Commands

TOKENS, HIDDEN_SIZE, FFN_HIDDEN_SIZE = 4096, 512, 1024
WORKLOADS = ("stage3", "skew", "stage1")


def add_bench_comm(commands: Commands) -> None:
    """Parser of `ds-remoe bench comm`."""
    description = (
        "Count the bytes that one expert-parallel MoE layer sends, forward and backward, against DeepSpeed's stock "
        "layer and against the least possible, and time both layers. The ranks are processes of this machine."
    )
    parser = commands.add_parser("comm", help="bytes on the wire of an MoE layer", description=description)
    parser.add_argument("--ep-size", type=positive, nargs="+", default=[2, 4], metavar="N", help="default: 2 4")
    parser.add_argument("--trace", metavar="FILE", help="recorded routing to replay, see `ds-remoe bench record`")
    parser.add_argument(
        "--workloads",
        nargs="+",
        metavar="NAME",
        help=f"as in `ds-remoe bench layer`; default: {' '.join(WORKLOADS)}, and none with --trace",
    )
    parser.add_argument(
        "--tokens", type=positive, metavar="T", help=f"of the workloads, on each rank (default: {TOKENS})"
    )
    parser.add_argument(
        "--hidden-size", type=positive, metavar="D", help=f"default: {HIDDEN_SIZE}, with --trace that of the run"
    )
    parser.add_argument(
        "--ffn-hidden-size",
        type=positive,
        metavar="H",
        help=f"default: {FFN_HIDDEN_SIZE}, with --trace that of the run",
    )
    parser.add_argument("--repeats", type=positive, default=10, metavar="N", help="timed rounds (default: 10)")
    parser.add_argument("--output", metavar="FILE", help="results file to write; it must not exist")
    parser.set_defaults(run=bench_comm)


def bench_comm(arguments: argparse.Namespace) -> int:
    """Measure, show the table and write the results file."""
    from pathlib import Path

    from ds_remoe.bench import comm
    from ds_remoe.bench.ranks import RankError
    from ds_remoe.bench.results_file import write_results
    from ds_remoe.bench.trace import read_metadata
    from ds_remoe.commands.output import make_console, output_problem

    output = Path(arguments.output) if arguments.output else None
    problem = _usage_problem(arguments) or output_problem(arguments.output)
    if problem:
        print(problem, file=sys.stderr)
        return 2
    console = make_console()
    try:
        run = read_metadata(Path(arguments.trace)) if arguments.trace else None
        default_workloads = () if run else WORKLOADS
        request = comm.Request(
            trace=arguments.trace,
            workloads=tuple(default_workloads if arguments.workloads is None else arguments.workloads),
            tokens=arguments.tokens or TOKENS,
            hidden_size=arguments.hidden_size or (run.hidden_size if run else HIDDEN_SIZE),
            ffn_hidden_size=arguments.ffn_hidden_size or (run.expert_hidden_size if run else FFN_HIDDEN_SIZE),
            repeats=arguments.repeats,
        )
        with console.status("measuring"):
            rows = comm.measure(request, arguments.ep_size)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except RankError as error:
        print(error, file=sys.stderr)
        return 1
    console.print(comm.table(rows))
    if output is not None:
        write_results(output, comm.WHAT, _command(arguments), comm.figures(request, rows))
        console.print(f"written: {output}", highlight=False)
    return 0


def _usage_problem(arguments: argparse.Namespace) -> str | None:
    if arguments.tokens not in (None, TOKENS) and arguments.trace is not None and arguments.workloads is None:
        return f"--tokens {arguments.tokens}: a trace brings its own; add --workloads, or leave it out"
    return None


def _command(arguments: argparse.Namespace) -> list[str]:
    command = ["ds-remoe", "bench", "comm", "--ep-size", *map(str, arguments.ep_size)]
    for option in ("trace", "workloads", "tokens", "hidden_size", "ffn_hidden_size", "repeats"):
        value = getattr(arguments, option)
        if value is not None:
            command += [f"--{option.replace('_', '-')}", *(value if option == "workloads" else [str(value)])]
    return command
