"""`ds-remoe`: one function for each subcommand, its parser beside it.

To add a subcommand, write `def name(arguments) -> int`, returning the exit code, and `def add_name(commands)`, which
makes its parser and sets `run=name`; then call the latter in `build_parser`. Heavy imports (torch, deepspeed) belong
into the function, so that the others stay quick. Exit codes: 0 done, 1 failed, 2 wrong configuration or usage.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import ds_remoe
from ds_remoe.config import ConfigError, ConfigProblem, RunConfig, load_run

if TYPE_CHECKING:
    from rich.table import Table

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process) and return the exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        exit_code: int = arguments.run(arguments)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return exit_code


def build_parser() -> argparse.ArgumentParser:
    """The parser of `ds-remoe` with all its subcommands."""
    parser = argparse.ArgumentParser(prog="ds-remoe", description="Train ReLU-routed MoE language models on DeepSpeed.")
    parser.add_argument("--version", action="version", version=f"ds-remoe {ds_remoe.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    config = _add_group(commands, "config", "look at configurations")
    add_config_check(config)
    add_config_schema(config)
    data = _add_group(commands, "data", "prepare corpora")
    add_data_prepare(data)
    bench = _add_group(commands, "bench", "measure on this machine")
    add_bench_quality(bench)
    return parser


def _add_group(commands: Commands, name: str, help_text: str) -> Commands:
    group = commands.add_parser(name, help=help_text, description=help_text)
    return group.add_subparsers(title="commands", required=True, metavar="COMMAND")


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every subcommand that reads a run's file."""
    parser.add_argument("file", metavar="FILE", help="DeepSpeed JSON with a remoe section")
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="PATH=VALUE",
        action="append",
        default=[],
        help="change a value, for example remoe.moe.k=2; null takes a key out; may be given again",
    )


def add_config_check(commands: Commands) -> None:
    """Parser of `ds-remoe config check`."""
    parser = commands.add_parser("check", help="check a run's file", description="Check a run's file without starting.")
    _add_run_arguments(parser)
    parser.add_argument("--world-size", type=_positive, metavar="N", help="also check what depends on N ranks")
    parser.add_argument("--accelerator", choices=("cpu", "cuda"), help="also check what depends on the device")
    parser.set_defaults(run=config_check)


def config_check(arguments: argparse.Namespace) -> int:
    """Check a file and show what it amounts to."""
    from rich.console import Console

    run = load_run(
        arguments.file, arguments.overrides, world_size=arguments.world_size, accelerator=arguments.accelerator
    )
    summary = _summary(run, arguments.world_size)
    console = Console()
    console.print(f"{run.path}: ok", highlight=False, markup=False, soft_wrap=True)
    console.print(summary)
    return 0


def _summary(run: RunConfig, world_size: int | None) -> Table:
    """A table of a run's size: parameters, experts, batch."""
    from rich.table import Table

    from ds_remoe.model.flops import num_active_params, num_params

    model, moe, train = run.remoe.model, run.remoe.moe, run.remoe.train
    vocab_size = _vocab_size(run)
    table = Table(show_header=False)
    table.add_column(justify="left")
    table.add_column(justify="right")
    table.add_row("parameters", f"{num_params(model, moe, vocab_size):,}")
    table.add_row("active per token", f"{num_active_params(model, moe, vocab_size):,}")
    table.add_row("vocabulary", f"{vocab_size:,}")
    table.add_row("router", moe.router)
    if moe.router != "dense":
        table.add_row("experts per layer", f"{moe.total_experts}, {moe.active_experts} active")
        table.add_row("experts per rank", f"{moe.total_experts // moe.ep_size} (ep_size {moe.ep_size})")
    if moe.router == "relu":
        table.add_row("target sparsity", f"{moe.target_sparsity:.4f}")
    table.add_row("optimizer steps", f"{train.steps:,}")
    if world_size is None:
        table.add_row("batch", "give --world-size")
    else:
        sizes = run.batch_sizes(world_size)
        tokens = sizes.global_batch * model.seq_length
        batch = f"{sizes.global_batch} = {sizes.micro_batch} x {sizes.accumulation} x {world_size} ranks"
        table.add_row("batch (sequences)", batch)
        table.add_row("tokens per step", f"{tokens:,}")
        table.add_row("tokens in all", f"{tokens * train.steps:,}")
    return table


def _vocab_size(run: RunConfig) -> int:
    from ds_remoe.config.schema import FileTokenizer

    tokenizer = run.remoe.data.tokenizer
    if isinstance(tokenizer, FileTokenizer):
        from ds_remoe.data.documents import DataError
        from ds_remoe.data.tokenizer import configured_tokenizer

        try:
            return configured_tokenizer(tokenizer).vocab_size
        except DataError as error:
            problem = ConfigProblem("remoe.data.tokenizer.path", tokenizer.path, str(error))
            raise ConfigError(str(run.path), [problem]) from None
    return tokenizer.vocab_size


def add_config_schema(commands: Commands) -> None:
    """Parser of `ds-remoe config schema`."""
    description = "Print the JSON Schema (draft 2020-12) of the remoe section."
    parser = commands.add_parser("schema", help="print the JSON Schema of the remoe section", description=description)
    parser.set_defaults(run=config_schema)


def config_schema(arguments: argparse.Namespace) -> int:
    """Print the JSON Schema of the remoe section."""
    from ds_remoe.config.schema import ReMoEConfig

    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **ReMoEConfig.model_json_schema()}
    print(json.dumps(schema, indent=2, ensure_ascii=False))
    return 0


def add_data_prepare(commands: Commands) -> None:
    """Parser of `ds-remoe data prepare`."""
    description = "Train or load the tokenizer and write the token store, unless that was done before."
    parser = commands.add_parser("prepare", help="tokenise a run's corpus", description=description)
    _add_run_arguments(parser)
    parser.set_defaults(run=data_prepare)


def data_prepare(arguments: argparse.Namespace) -> int:
    """Prepare a run's data and show what is there."""
    from rich.console import Console

    from ds_remoe.data.documents import DataError
    from ds_remoe.data.prepare import describe, prepare

    run = load_run(arguments.file, arguments.overrides, world_size=None)
    try:
        prepared = prepare(run.remoe.data, run.remoe.model.seq_length, progress=True)
    except DataError as error:
        print(error, file=sys.stderr)
        return 1
    Console().print(describe(prepared))
    return 0


def add_bench_quality(commands: Commands) -> None:
    """Parser of `ds-remoe bench quality`."""
    description = "Train ReMoE and dropless TopK at equal measured FLOPs for each seed and compare their valid losses."
    parser = commands.add_parser("quality", help="ReMoE against TopK at equal FLOPs", description=description)
    _add_run_arguments(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help="default: 0 1 2")
    parser.add_argument("--jobs", type=_positive, default=1, metavar="N", help="seeds trained at a time (default: 1)")
    parser.add_argument("--runs", default="runs/bench-quality", metavar="DIR", help="folder of the trained runs")
    parser.add_argument("--output", metavar="FILE", help="results file to write; it must not exist")
    parser.set_defaults(run=bench_quality)


def bench_quality(arguments: argparse.Namespace) -> int:
    """Compare ReMoE with TopK and write the results file."""
    from pathlib import Path

    from rich.console import Console

    from ds_remoe.bench import quality
    from ds_remoe.bench.results_file import write_results

    output = Path(arguments.output) if arguments.output else None
    if output is not None and output.exists():
        print(f"--output {output}: exists; a measurement is never overwritten, choose another name", file=sys.stderr)
        return 2
    load_run(arguments.file, arguments.overrides, world_size=None)
    console = Console()
    with console.status("training; each run's output is in its .log beside it"):
        rows = quality.compare(
            Path(arguments.file), arguments.overrides, arguments.seeds, Path(arguments.runs), arguments.jobs
        )
    console.print(quality.table(rows))
    if output is not None:
        command = ["ds-remoe", "bench", "quality", arguments.file, *(f"--set={text}" for text in arguments.overrides)]
        command += ["--seeds", *map(str, arguments.seeds), "--jobs", str(arguments.jobs)]
        write_results(output, quality.WHAT, command, quality.figures(rows))
        console.print(f"written: {output}", highlight=False)
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


if __name__ == "__main__":
    sys.exit(main())
