"""`ds-remoe bench kernels`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from ds_remoe.commands.arguments import positive, seed

if TYPE_CHECKING:
    from ds_remoe.commands.arguments import Commands

DTYPES = ("float64", "float32", "bfloat16", "float16")
DEFAULT_WORKLOADS = ("e8", "e64", "g8", "skew", "stage1")


def add_bench_kernels(commands: Commands) -> None:
    """Parser of `ds-remoe bench kernels`."""
    description = (
        "Time each kernel's implementations (Triton, C++, torch's grouped_mm) against its plain-torch twin, each "
        "checked against it first. Only what really runs on the device takes part; the rest is named with the reason. "
        "Workloads: e<E> (E experts, k=1), g<G> (8·G experts of width H/G, k=G), skew, stage1, stage3."
    )
    parser = commands.add_parser("kernels", help="each kernel against its torch twin", description=description)
    parser.add_argument("--kernels", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument(
        "--workloads",
        nargs="+",
        default=list(DEFAULT_WORKLOADS),
        metavar="NAME",
        help=f"default: {' '.join(DEFAULT_WORKLOADS)}",
    )
    parser.add_argument("--tokens", type=positive, default=4096, metavar="T", help="tokens (default: 4096)")
    parser.add_argument("--hidden-size", type=positive, default=512, metavar="D", help="hidden size (default: 512)")
    parser.add_argument(
        "--ffn-hidden-size", type=positive, default=1024, metavar="H", help="width of an expert at G=1 (default: 1024)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on cpu, bfloat16 on cuda")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument("--repeats", type=positive, default=10, metavar="N", help="timed rounds (default: 10)")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="default: 0")
    parser.add_argument("--output", metavar="FILE", help="results file to write; it must not exist")
    parser.set_defaults(run=bench_kernels)


def bench_kernels(arguments: argparse.Namespace) -> int:
    """Measure, print the tables and write the results file; 1 where an implementation failed."""
    from pathlib import Path

    import torch
    from rich.progress import Progress

    from ds_remoe.bench import kernels
    from ds_remoe.bench.kernel_subjects import KERNELS, Settings
    from ds_remoe.bench.results_file import write_results
    from ds_remoe.bench.workloads import Sizes, WorkloadError, build_workload
    from ds_remoe.commands.output import make_console, output_problem

    output = Path(arguments.output) if arguments.output else None
    if problem := output_problem(arguments.output):
        return _refuse(problem)
    has_cuda = torch.cuda.is_available()
    device = torch.device(arguments.device or ("cuda" if has_cuda else "cpu"))
    if device.type == "cuda" and not has_cuda:
        return _refuse("--device cuda: torch finds no CUDA device; use --device cpu")
    names = arguments.kernels or list(KERNELS)
    if unknown := [name for name in names if name not in KERNELS]:
        return _refuse(f"--kernels {unknown[0]}: unknown; known are {', '.join(KERNELS)}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    settings = Settings(device, dtype, arguments.repeats, 2, arguments.seed)
    sizes = Sizes(arguments.tokens, arguments.hidden_size, arguments.ffn_hidden_size)
    try:
        workloads = [build_workload(name, sizes, arguments.seed) for name in arguments.workloads]
    except WorkloadError as error:
        return _refuse(str(error))

    console = make_console()
    measured = []
    with Progress(console=console, transient=True) as progress:
        rounds = len(workloads) * len(names) * (settings.warmup + settings.repeats)
        task = progress.add_task("", total=rounds)
        for workload in workloads:
            progress.update(task, description=workload.title)
            here = [kernels.measure(name, workload, settings, lambda: progress.advance(task)) for name in names]
            console.print(kernels.table(here))
            measured += here
    remarks = dict.fromkeys(kernels.remarks(measured))
    console.print(*remarks, sep="\n", highlight=False, markup=False, soft_wrap=True)
    if output is not None:
        write_results(output, kernels.WHAT, _command(arguments), kernels.figures(measured, settings))
        console.print(f"written: {output}", highlight=False)
    return 1 if any(one.failed for one in measured) else 0


def _refuse(message: str) -> int:
    print(message, file=sys.stderr)
    return 2


def _command(arguments: argparse.Namespace) -> list[str]:
    """The command line with every option that has a value."""
    command = ["ds-remoe", "bench", "kernels"]
    for name, value in vars(arguments).items():
        if name != "run" and value is not None:
            command += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return command
