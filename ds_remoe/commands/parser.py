"""The command line's parser: what it does not know it refuses at the command that was meant, with the nearest name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ds_remoe.config.problems import suggestion


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser whose subcommands, of this class too, name the option that was probably meant."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]
        """Parse; a command without subcommands leaves nothing over."""
        known, left_over = super().parse_known_args(args, namespace)
        if left_over and self._subparsers is None:
            unknown = left_over[0].partition("=")[0]
            options = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
            remedy = suggestion(unknown, options) if unknown.startswith("-") else "quote it, or leave it out"
            self.error(f"unrecognized argument {unknown}: {remedy}")
        return known, left_over
