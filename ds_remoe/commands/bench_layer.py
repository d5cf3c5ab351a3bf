"""`ds-remoe bench layer`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from ds_remoe.commands.arguments import positive, seed

if TYPE_CHECKING:
    from ds_remoe.bench.workloads import Workload
    from ds_remoe.commands.arguments import Commands

DTYPES = ("float32", "bfloat16", "float16")
TOKENS, TRACE_RECORDS = 4096, 3


def add_bench_layer(commands: Commands) -> None:
    """Parser of `ds-remoe bench layer`."""
    description = (
        "Time one MoE layer against the dense FFN, DeepSpeed's MOELayer, a loop over experts and other rivals, all "
        "with the same weights and the same routing, each checked against ours first. Workloads: e<E> (E experts, "
        "k=1), g<G> (8·G experts of width H/G, k=G), skew, stage1, stage3."
    )
    parser = commands.add_parser("layer", help="one MoE layer against its rivals", description=description)
    parser.add_argument("--workloads", nargs="+", metavar="NAME", help="default: those that have a bar")
    parser.add_argument("--trace", metavar="FILE", help="replay routings of `ds-remoe bench record`, alone by default")
    parser.add_argument(
        "--trace-records", type=positive, metavar="N", help=f"routings of it, evenly spaced (default: {TRACE_RECORDS})"
    )
    parser.add_argument("--tokens", type=positive, metavar="T", help=f"tokens of the workloads (default: {TOKENS})")
    parser.add_argument(
        "--hidden-size", type=positive, metavar="D", help="hidden size (default: 512, of a trace: as recorded)"
    )
    parser.add_argument(
        "--ffn-hidden-size",
        type=positive,
        metavar="H",
        help="width of an expert at G=1, of a trace: of an expert (default: 1024, of a trace: as recorded)",
    )
    parser.add_argument(
        "--widths",
        nargs="+",
        choices=("182M", "469M", "978M"),
        help="widths of the paper's models, in place of D and H",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on cpu, bfloat16 on cuda")
    parser.add_argument(
        "--memory",
        choices=("kept", "returned"),
        default="kept",
        help="freed CPU memory: kept for the next tensor, as training with ds_remoe does (default), or returned to the "
        "system and mapped anew, as the C library does by itself",
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument("--repeats", type=positive, default=10, metavar="N", help="timed rounds (default: 10)")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="default: 0")
    parser.add_argument("--output", metavar="FILE", help="results file to write; it must not exist")
    parser.set_defaults(run=bench_layer)


def bench_layer(arguments: argparse.Namespace) -> int:
    """Measure, print the tables and write the results file; 1 where a rival failed."""
    from pathlib import Path

    import torch
    from rich.progress import Progress

    from ds_remoe.bench import layer, layer_bars, layer_report
    from ds_remoe.bench.results_file import write_results
    from ds_remoe.commands.output import make_console, output_problem
    from ds_remoe.training.host_memory import reuse_freed_memory

    output = Path(arguments.output) if arguments.output else None
    if problem := _usage_problem(arguments) or output_problem(arguments.output):
        print(problem, file=sys.stderr)
        return 2
    has_cuda = torch.cuda.is_available()
    device = torch.device(arguments.device or ("cuda" if has_cuda else "cpu"))
    if device.type == "cuda" and not has_cuda:
        print("--device cuda: torch finds no CUDA device; use --device cpu", file=sys.stderr)
        return 2
    if device.type == "cpu" and arguments.memory == "kept" and not reuse_freed_memory():
        print("--memory kept: the C library is not glibc; use --memory returned", file=sys.stderr)
        return 2
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    settings = layer.Settings(device, dtype, arguments.repeats, 2, arguments.seed)
    try:
        workloads = _workloads(arguments)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2

    console = make_console()
    measured = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(workloads) * 2 * (settings.warmup + settings.repeats))
        for workload in workloads:
            progress.update(task, description=workload.title)
            one = layer.measure(workload, settings, after_round=lambda: progress.advance(task))
            console.print(layer_report.table(one))
            console.print(*layer_report.remarks(one), sep="\n", highlight=False, markup=False, soft_wrap=True)
            measured.append(one)
    outcomes = layer_bars.outcomes(measured, settings)
    if outcomes:
        console.print(layer_report.bars_table(outcomes))
    if output is not None:
        figures = layer_report.figures(measured, outcomes, settings)
        write_results(output, layer_report.WHAT, _command(arguments), figures)
        console.print(f"written: {output}", highlight=False)
    return 1 if any(one.failed for one in measured) else 0


def _usage_problem(arguments: argparse.Namespace) -> str | None:
    if arguments.trace_records not in (None, TRACE_RECORDS) and arguments.trace is None:
        return f"--trace-records {arguments.trace_records}: there is no trace; add --trace FILE, or leave it out"
    if arguments.tokens not in (None, TOKENS) and arguments.trace is not None and arguments.workloads is None:
        return f"--tokens {arguments.tokens}: a trace brings its own; add --workloads, or leave it out"
    for name in ("hidden_size", "ffn_hidden_size"):
        value = getattr(arguments, name)
        if value is not None and arguments.widths is not None:
            return f"--{name.replace('_', '-')} {value}: --widths gives both widths; leave one of the two out"
    return None


def _workloads(arguments: argparse.Namespace) -> list[Workload]:
    from pathlib import Path

    from ds_remoe.bench.layer_bars import DEFAULT_WORKLOADS
    from ds_remoe.bench.workloads import Sizes, build_workload, replay

    names = arguments.workloads or (() if arguments.trace else DEFAULT_WORKLOADS)
    records = arguments.trace_records or TRACE_RECORDS
    workloads = []
    for hidden_size, ffn_hidden_size, label in _widths(arguments):
        sizes = Sizes(arguments.tokens or TOKENS, hidden_size or 512, ffn_hidden_size or 1024, label)
        workloads += [build_workload(name, sizes, arguments.seed) for name in names]
        if arguments.trace:
            workloads += replay(Path(arguments.trace), records, hidden_size, ffn_hidden_size, label)
    return workloads


def _widths(arguments: argparse.Namespace) -> list[tuple[int | None, int | None, str]]:
    """Hidden size, FFN width and label of each pair of widths; None where the user leaves it open."""
    from ds_remoe.bench.workloads import PAPER_WIDTHS

    if arguments.widths:
        return [(*PAPER_WIDTHS[label], label) for label in arguments.widths]
    return [(arguments.hidden_size, arguments.ffn_hidden_size, "")]


def _command(arguments: argparse.Namespace) -> list[str]:
    """The command line with every option that has a value."""
    command = ["ds-remoe", "bench", "layer"]
    for name, value in vars(arguments).items():
        if name != "run" and value is not None:
            command += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return command
