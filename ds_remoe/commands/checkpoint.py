"""`ds-remoe checkpoint list|verify|prune|export`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from ds_remoe.commands.arguments import positive

if TYPE_CHECKING:
    from rich.table import Table

    from ds_remoe.commands.arguments import Commands
    from ds_remoe.training.checkpoint_files import Advance
    from ds_remoe.training.checkpoint_folder import CheckpointFolder, Inspection

_MEBIBYTE = 1 << 20
_LINK = "; a link: what it points to stays"
_COLORS = {"good": "green", "damaged": "red", "incomplete": "yellow"}


def add_checkpoint_list(commands: Commands) -> None:
    """Parser of `ds-remoe checkpoint list`."""
    description = (
        "List a run's checkpoints; their state goes by the manifests and the files' sizes, no content is read."
    )
    parser = commands.add_parser("list", help="list a run's checkpoints", description=description)
    _add_folder(parser)
    parser.set_defaults(run=checkpoint_list)


def add_checkpoint_verify(commands: Commands) -> None:
    """Parser of `ds-remoe checkpoint verify`."""
    description = (
        "Read every byte of a run's checkpoints and compare it with the manifests (SHA-256); nothing is unpickled. "
        "Exit code 1 names what is wrong. One without a manifest (a save was killed, or is under way) is only reported."
    )
    parser = commands.add_parser("verify", help="check every byte of checkpoints", description=description)
    _add_folder(parser)
    parser.add_argument("--tag", metavar="TAG", help="this checkpoint only, for example step00000100")
    parser.set_defaults(run=checkpoint_verify)


def add_checkpoint_prune(commands: Commands) -> None:
    """Parser of `ds-remoe checkpoint prune`."""
    description = (
        "Keep the N newest good checkpoints and the latest one, and remove the others: older, damaged and incomplete "
        "ones. Contents are checked first; without a good one nothing is removed."
    )
    parser = commands.add_parser("prune", help="remove old and damaged checkpoints", description=description)
    _add_folder(parser)
    parser.add_argument("--keep", type=positive, required=True, metavar="N", help="good checkpoints that stay")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    parser.set_defaults(run=checkpoint_prune)


def add_checkpoint_export(commands: Commands) -> None:
    """Parser of `ds-remoe checkpoint export`."""
    description = (
        "Write the weights of a checkpoint as sharded safetensors, a tensor for each matrix of each expert, whatever "
        "number of ranks, ep_size and ZeRO stage saved it. ds_remoe.load_exported(OUT) makes a model of them. fp32 "
        "weights of a model trained in bf16 are the optimizer's masters. The checkpoint is verified first."
    )
    parser = commands.add_parser("export", help="write the weights as safetensors", description=description)
    _add_folder(parser)
    parser.add_argument("--tag", metavar="TAG", help="this checkpoint, for example step00000100; default: the latest")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights (default: fp32)")
    parser.add_argument(
        "--output", type=Path, metavar="OUT", help="folder to make; default: DIR/export-TAG-DTYPE, beside `checkpoints`"
    )
    parser.add_argument(
        "--max-shard-size",
        type=_shard_size,
        default="5GB",
        metavar="SIZE",
        help="of a file, with its unit KB, MB, GB or TB (default: 5GB)",
    )
    parser.set_defaults(run=checkpoint_export)


def _shard_size(text: str) -> str:
    size = re.fullmatch(r"(\d+(?:\.\d+)?)[KMGT]B", text.upper())
    if size is None or float(size[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text}: must be a positive size with its unit, for example 500MB or 5GB")
    return text


def checkpoint_list(arguments: argparse.Namespace) -> int:
    """Show a table of the checkpoints."""
    from rich.console import Console

    from ds_remoe.training.checkpoint_folder import inspect

    folder: CheckpointFolder = arguments.folder
    inspections = [inspect(path, contents=False) for path in folder.all()]
    console = Console()
    console.print(_table(inspections, _latest_name(folder)))
    for problem in _problems(inspections):
        console.print(problem, markup=False, highlight=False, soft_wrap=True)
    return 0


def checkpoint_verify(arguments: argparse.Namespace) -> int:
    """Check the contents of the checkpoints."""
    from ds_remoe.training.checkpoint_folder import inspect
    from ds_remoe.training.manifest import CheckpointError

    folder: CheckpointFolder = arguments.folder
    checkpoints = folder.all()
    if arguments.tag is not None:
        checkpoints = [path for path in checkpoints if path.name == arguments.tag]
        if not checkpoints:
            print(f"--tag {arguments.tag}: {folder.path} has no such checkpoint", file=sys.stderr)
            return 2
    with _progress("verified (MiB)", checkpoints) as advance:
        inspections = [inspect(path, contents=True, advance=advance) for path in checkpoints]
    wrong = _problems(inspections, damaged_only=arguments.tag is None)
    try:
        folder.latest()
    except CheckpointError as error:
        wrong.append(str(error))
    for found in inspections:
        note = "its save did not finish, or is under way" if found.state == "incomplete" else ""
        print(f"{found.path}: {found.state}{note and f': {note}'}")
    for text in wrong:
        print(text, file=sys.stderr)
    return 1 if wrong else 0


def checkpoint_prune(arguments: argparse.Namespace) -> int:
    """Remove what is not worth keeping."""
    from ds_remoe.training.checkpoint_folder import plan_pruning, prune
    from ds_remoe.training.manifest import CheckpointError
    from ds_remoe.training.run_lock import lock_folder

    folder: CheckpointFolder = arguments.folder
    lock = None
    try:
        lock = lock_folder(folder.path.parent)  # a save that is under way looks like one that was killed
        with _progress("checked (MiB)", folder.all()) as advance:
            plan = plan_pruning(folder, arguments.keep, advance)
        links = {path for path, _ in plan.removed if path.is_symlink()}
        if not arguments.dry_run:
            prune(folder, plan)
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        if lock is not None:
            lock.release()
    for path, state in plan.removed:
        why = f"{state or 'old'}{_LINK if path in links else ''}"
        print(f"{'would remove' if arguments.dry_run else 'removed'} {path} ({why})")
    for path in plan.kept:
        print(f"{'would keep' if arguments.dry_run else 'kept'} {path} (good)")
    if plan.latest is not None:
        print(f"latest {'would name' if arguments.dry_run else 'names'} {plan.latest.name} now")
    return 0


def checkpoint_export(arguments: argparse.Namespace) -> int:
    """Write a checkpoint's weights as safetensors."""
    from rich.filesize import decimal

    from ds_remoe.training.checkpoint_folder import inspect
    from ds_remoe.training.export import export
    from ds_remoe.training.manifest import CheckpointError

    folder: CheckpointFolder = arguments.folder
    try:
        checkpoint = folder.latest() if arguments.tag is None else folder.path / arguments.tag
        if checkpoint is None or not checkpoint.is_dir():
            print(f"{checkpoint or folder.path / 'latest'}: does not exist; {folder.what_exists()}", file=sys.stderr)
            return 2
        with _progress("verified (MiB)", [checkpoint]) as advance:
            found = inspect(checkpoint, contents=True, advance=advance)
        if found.manifest is None or found.state != "good":
            print("\n".join([*_problems([found]), "export another with --tag"]), file=sys.stderr)
            return 1
        output = arguments.output or folder.path.parent / f"export-{checkpoint.name}-{arguments.dtype}"
        files = export(checkpoint, found.manifest, output, arguments.dtype, max_shard_size=arguments.max_shard_size)
    except (CheckpointError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    for path in files:
        print(f"{path} ({decimal(path.stat().st_size)})")
    return 0


def _add_folder(parser: argparse.ArgumentParser) -> None:
    text = "a run's folder (remoe.train.output_dir), or its checkpoints"
    parser.add_argument("folder", type=_folder, metavar="DIR", help=text)


def _folder(text: str) -> CheckpointFolder:
    """An argument's type: the folder with checkpoints that was meant."""
    from ds_remoe.training.checkpoint_folder import CheckpointFolder

    for path in (Path(text) / "checkpoints", Path(text)):
        folder = CheckpointFolder(path)
        if folder.all():
            return folder
    raise argparse.ArgumentTypeError(f"{text} has no checkpoints; give a run's folder (remoe.train.output_dir)")


def _latest_name(folder: CheckpointFolder) -> str | None:
    from ds_remoe.training.manifest import CheckpointError

    try:
        latest = folder.latest()
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return None
    return latest.name if latest is not None else None


def _table(inspections: Sequence[Inspection], latest: str | None) -> Table:
    from rich.filesize import decimal
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1, 0, 0))
    for title in ("checkpoint", "saved", "size", "ranks", "ep", "ZeRO", "dtype", "state", ""):
        table.add_column(title, no_wrap=True, justify="right" if title in ("size", "ranks", "ep", "ZeRO") else "left")
    for found in inspections:
        row = ["", "", "", "", ""]
        if found.manifest is not None:
            identity = found.manifest.identity
            saved = _saved_at(found.path)
            row = [saved, str(identity.world_size), str(identity.ep_size), str(identity.zero_stage), identity.dtype]
        state = Text(found.state, style=_COLORS[found.state])
        mark = "latest" if found.path.name == latest else ""
        table.add_row(found.path.name, row[0], decimal(found.size), *row[1:], state, mark)
    return table


def _saved_at(checkpoint: Path) -> str:
    """When the manifest was written, to the minute, in local time."""
    from ds_remoe.training.manifest import MANIFEST

    written = datetime.fromtimestamp((checkpoint / MANIFEST).stat().st_mtime)
    return written.isoformat(sep=" ", timespec="minutes")


def _problems(inspections: Sequence[Inspection], *, damaged_only: bool = False) -> list[str]:
    return [
        f"{found.path.name} is {found.state}: {problem}"
        for found in inspections
        for problem in found.problems
        if found.state == "damaged" or not damaged_only
    ]


@contextmanager
def _progress(description: str, checkpoints: Sequence[Path]) -> Iterator[Advance]:
    """A bar over the bytes of checkpoints, on standard error."""
    from rich.console import Console

    from ds_remoe.training.progress import JobProgress

    total = sum(path.stat().st_size for folder in checkpoints for path in folder.rglob("*") if path.is_file())
    done = 0
    with JobProgress(description, -(-total // _MEBIBYTE), console=Console(stderr=True)) as progress:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress.advance_to(done // _MEBIBYTE)

        yield advance
        progress.advance_to(-(-done // _MEBIBYTE))
