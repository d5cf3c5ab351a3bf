"""`ds-remoe`: the command line, put together from `ds_remoe.commands`.

To add a subcommand, write in a file of `ds_remoe/commands/` `def name(arguments) -> int`, returning the exit code, and
`def add_name(commands)`, which makes its parser and sets `run=name`; then call the latter in `build_parser`. Heavy
imports (torch, deepspeed) belong into the function, so that the others stay quick. Exit codes: 0 done, 1 failed,
2 wrong configuration or usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import ds_remoe
from ds_remoe.commands.bench_comm import add_bench_comm
from ds_remoe.commands.bench_kernels import add_bench_kernels
from ds_remoe.commands.bench_layer import add_bench_layer
from ds_remoe.commands.bench_memory import add_bench_memory
from ds_remoe.commands.bench_quality import add_bench_quality
from ds_remoe.commands.bench_record import add_bench_record
from ds_remoe.commands.bench_step import add_bench_step
from ds_remoe.commands.checkpoint import (
    add_checkpoint_export,
    add_checkpoint_list,
    add_checkpoint_prune,
    add_checkpoint_verify,
)
from ds_remoe.commands.config import add_config_check, add_config_schema
from ds_remoe.commands.data import add_data_prepare
from ds_remoe.commands.doctor import add_doctor
from ds_remoe.commands.parser import CommandParser
from ds_remoe.commands.plan import add_plan
from ds_remoe.commands.supervise import add_supervise
from ds_remoe.config import ConfigError
from ds_remoe.process_exit import run_and_exit

if TYPE_CHECKING:
    from ds_remoe.commands.arguments import Commands


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process) and return the exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        exit_code: int = arguments.run(arguments)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return exit_code


def run() -> NoReturn:
    """Run the process's command line and end the process: the script that pip installs."""
    run_and_exit(main)


def build_parser() -> argparse.ArgumentParser:
    """The parser of `ds-remoe` with all its subcommands."""
    parser = CommandParser(prog="ds-remoe", description="Train ReLU-routed MoE language models on DeepSpeed.")
    parser.add_argument("--version", action="version", version=f"ds-remoe {ds_remoe.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    config = _add_group(commands, "config", "look at configurations")
    add_config_check(config)
    add_config_schema(config)
    data = _add_group(commands, "data", "prepare corpora")
    add_data_prepare(data)
    checkpoint = _add_group(commands, "checkpoint", "look after a run's checkpoints")
    add_checkpoint_list(checkpoint)
    add_checkpoint_verify(checkpoint)
    add_checkpoint_prune(checkpoint)
    add_checkpoint_export(checkpoint)
    add_plan(commands)
    add_supervise(commands)
    add_doctor(commands)
    bench = _add_group(commands, "bench", "measure on this machine")
    add_bench_quality(bench)
    add_bench_step(bench)
    add_bench_layer(bench)
    add_bench_kernels(bench)
    add_bench_record(bench)
    add_bench_comm(bench)
    add_bench_memory(bench)
    return parser


def _add_group(commands: Commands, name: str, help_text: str) -> Commands:
    group = commands.add_parser(name, help=help_text, description=help_text)
    return group.add_subparsers(title="commands", required=True, metavar="COMMAND")


if __name__ == "__main__":
    run()
