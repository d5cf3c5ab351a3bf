"""Arguments that several subcommands share."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
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


def seed(text: str) -> int:
    """An argument's type: a seed, as remoe.train.seed takes it."""
    return _between(text, 0, 2**31 - 1)


def port(text: str) -> int:
    """An argument's type: a TCP port."""
    return _between(text, 1, 2**16 - 1)


def _between(text: str, low: int, high: int) -> int:
    value = int(text)
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{text}: must be between {low} and {high}")
    return value


def idle_override(overrides: Sequence[str], set_by: Mapping[str, str]) -> str | None:
    """Why a `--set` would change nothing; None if each would.

    Args:
        overrides: `path=value` texts.
        set_by: paths that the command sets by itself, and how the user sets them instead.
    """
    for path in (text.partition("=")[0] for text in overrides):
        if path in set_by:
            return f"--set {path}: {set_by[path]}; leave it out"
    return None
