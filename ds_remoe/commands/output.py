"""Where the subcommands print."""

from __future__ import annotations

from rich.console import Console

FILE_WIDTH = 120


def make_console() -> Console:
    """Standard output; wide enough for whole tables where it is a file or a pipe, which have no width of their own."""
    console = Console()
    return console if console.is_terminal else Console(width=FILE_WIDTH)
