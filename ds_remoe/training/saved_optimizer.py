"""The optimizer of a checkpoint by global tensor, whatever ranks saved it; its files are opened where they are read."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_remoe.deepspeed_checkpoint_io import Reader, load_values
from ds_remoe.deepspeed_loss_scale import LossScale, saved_loss_scale
from ds_remoe.deepspeed_optimizer_state import Cut, Piece, SavedSlab, base_state, optimizer_files, saved_slabs
from ds_remoe.training.agreement import shared_out

_EXPERTS = ".deepspeed_moe.experts."


def is_expert(name: str) -> bool:
    """Whether a parameter of this name holds experts, so that each expert-parallel rank has others."""
    return _EXPERTS in name


@dataclass(frozen=True)
class _Outline:
    """A `SavedSlab` without its tensors: the keys that they have."""

    pieces: tuple[Piece, ...]
    keys: frozenset[str]
    scalars: dict[str, Any]


@dataclass(frozen=True)
class _FileOutline:
    """What a file of the optimizer has besides tensors."""

    slabs: list[_Outline]
    loss_scale: LossScale | None
    groups: list[dict[str, Any]]


@dataclass(frozen=True)
class _Extent:
    """Elements start ... start + numel - 1 of a global tensor, which lie in a file's slab from `offset` on."""

    start: int
    numel: int
    file: int
    slab: int
    offset: int


class SavedOptimizer:
    """The fp32 masters and optimizer states of a checkpoint by global tensor, whatever ranks saved it.

    Args:
        checkpoint: its folder; the files were checked.
        saved_by: how it is cut.
        sizes: elements of each trained global tensor, in the optimizer's order: experts last.
        read_file: `load_values`, or `load_objects` where the source is trusted.
        together: whether every rank makes one; each then opens its share of the files to see what is in them, and
            those that it reads from. A single process opens all.

    Attributes:
        checkpoint: its folder.
        keys: of what `read` can give of some tensor: the optimizer's states, and `MASTER` where masters were saved.
        loss_scale: fp16's, where it was dynamic.
        groups: the base optimizer's, with the learning rates and other settings of the last step.

    Raises:
        OSError, KeyError, ValueError: a file is missing, not as DeepSpeed writes it, or of another model.
    """

    def __init__(
        self,
        checkpoint: Path,
        saved_by: Cut,
        sizes: Mapping[str, int],
        read_file: Reader = load_values,
        *,
        together: bool = False,
    ) -> None:
        ep_size, zero_stage = max(saved_by.ep_sizes, default=1), saved_by.zero_stage
        self.checkpoint = checkpoint
        self._files, self._read_file = optimizer_files(checkpoint, saved_by), read_file
        self._local_sizes = {name: size // ep_size if is_expert(name) else size for name, size in sizes.items()}
        self._open: dict[int, list[SavedSlab]] = {}
        indices = range(len(self._files))
        outlines = shared_out(indices, self._outline) if together else [self._outline(index) for index in indices]
        self.loss_scale, self.groups = outlines[0].loss_scale, outlines[0].groups  # the same in all
        self.keys = {key for outline in outlines for slab in outline.slabs for key in slab.keys}
        self._outlines = [outline.slabs for outline in outlines]
        self._extents: dict[str, list[_Extent]] = defaultdict(list)
        ends: dict[tuple[str, int], int] = defaultdict(int)
        for file, slabs in enumerate(self._outlines):
            for at, piece in ((at, piece) for at, slab in enumerate(slabs) for piece in slab.pieces):
                ep_rank = file % ep_size if is_expert(piece.name) else 0
                if zero_stage == 0 and file != ep_rank:
                    continue  # the same as in the first file
                end = ends[piece.name, ep_rank]
                start = ep_rank * self._local_sizes[piece.name] + end
                self._extents[piece.name].append(_Extent(start, piece.numel, file, at, piece.offset))
                ends[piece.name, ep_rank] = end + piece.numel
        for name, size in sizes.items():
            self._extents[name].sort(key=lambda extent: extent.start)
            found = sum(extent.numel for extent in self._extents[name])
            if found != size:
                raise ValueError(f"{checkpoint}: holds {found} elements of {name}, but it has {size}")

    def read(self, name: str, key: str, start: int, out: Tensor) -> None:
        """Copy elements start ... start + len(out) - 1 of a global tensor into a flat one."""
        extents = self._extents[name]
        done = 0
        for index, skipped, count in overlaps([extent.start for extent in extents], start, out.numel()):
            extent = extents[index]
            tensor = self._slabs(extent.file)[extent.slab].tensors[key]
            out[done : done + count].copy_(tensor.narrow(0, extent.offset + skipped, count))
            done += count

    def keys_of(self, name: str) -> set[str]:
        """Of what `read` can give of one tensor; none of a tensor that was never stepped, unless it has a master.

        Raises:
            ValueError: a part of the tensor has states that another lacks.
        """
        first, *others = (set(self._outlines[extent.file][extent.slab].keys) for extent in self._extents[name])
        for other in others:
            if other != first:
                raise ValueError(f"{name}: a part of it has the states {sorted(first)}, and another {sorted(other)}")
        return first

    def scalars(self, name: str) -> dict[str, Any]:
        """The states that are one number for the whole tensor, such as Adam's number of steps."""
        first = self._extents[name][0]
        return self._outlines[first.file][first.slab].scalars

    def _outline(self, file: int) -> _FileOutline:
        content = self._content(file)
        slabs = [_Outline(slab.pieces, frozenset(slab.tensors), slab.scalars) for slab in self._open[file]]
        return _FileOutline(slabs, saved_loss_scale(content), base_state(content)["param_groups"])

    def _slabs(self, file: int) -> list[SavedSlab]:
        if file not in self._open:
            self._content(file)
        return self._open[file]

    def _content(self, file: int) -> Mapping[str, Any]:
        """Open a file, its tensors mapped and not loaded."""
        content: Mapping[str, Any] = self._read_file(self._files[file], "cpu", mmap=True)
        self._open[file] = list(saved_slabs(content, self._local_sizes))
        return content


def overlaps(starts: Sequence[int], start: int, count: int) -> Iterator[tuple[int, int, int]]:
    """Where elements start ... start + count - 1 lie, of a tensor that is cut at `starts` (rising, the first is 0).

    Yields:
        Index of a part, how many of its elements come before the wanted ones, and how many are wanted; in order.
    """
    end = start + count
    index = bisect_right(starts, start) - 1
    while start < end:
        part_end = min(end, starts[index + 1]) if index + 1 < len(starts) else end
        if part_end > start:
            yield index, start - starts[index], part_end - start
        start, index = part_end, index + 1
