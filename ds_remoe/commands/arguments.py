"""Arguments that several subcommands share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ds_remoe.commands.parser import CommandParser

    Commands = argparse._SubParsersAction[CommandParser]


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
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


def positive(text: str) -> int:
    """An argument's type: an integer of at least 1."""
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value
