"""`ds-remoe data prepare`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from ds_remoe.commands.arguments import add_run_arguments
from ds_remoe.config import load_run
from ds_remoe.config.leave import WRONG_INPUT

if TYPE_CHECKING:
    from ds_remoe.commands.arguments import Commands


def add_data_prepare(commands: Commands) -> None:
    """Parser of `ds-remoe data prepare`."""
    description = "Train or load the tokenizer and write the token store, unless that was done before."
    parser = commands.add_parser("prepare", help="tokenise a run's corpus", description=description)
    add_run_arguments(parser)
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
        return WRONG_INPUT
    Console().print(describe(prepared))
    return 0
