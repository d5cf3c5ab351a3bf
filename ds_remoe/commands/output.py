"""Where the subcommands print, and the files that they write."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console

FILE_WIDTH = 120


def make_console() -> Console:
    """Standard output; wide enough for whole tables where it is a file or a pipe, which have no width of their own."""
    console = Console()
    return console if console.is_terminal else Console(width=FILE_WIDTH)


def output_problem(output: str | None, picture: str | None = None) -> str | None:
    """Why the files of --output and --picture cannot be written, to be said before anything is measured; else None.

    The folder of each is made.
    """
    if picture and not picture.lower().endswith(".png"):
        return f"--picture {picture}: must be the name of a .png file"
    for option, name in (("--output", output), ("--picture", picture)):
        if name is None:
            continue
        path = Path(name)
        try:
            if path.is_dir():
                return f"{option} {name!r}: is a folder; name a file"
            if option == "--output" and path.exists():
                return f"--output {name}: exists; a file of results is never overwritten, choose another name"
            path.parent.mkdir(parents=True, exist_ok=True)
        except (NotADirectoryError, FileExistsError):
            return f"{option} {name}: cannot be written, as {path.parent} is no folder; choose another place"
        except OSError as error:
            return f"{option} {name}: cannot be written ({error.strerror}); choose another place"
        if not os.access(path.parent, os.W_OK | os.X_OK):
            return f"{option} {name}: cannot be written, for lack of rights in {path.parent}; choose another place"
    return None
