"""The optimizer of a checkpoint, resharded for other ranks: another world size, ep_size or ZeRO stage.

A rank's parameter is a run of elements of a global tensor: all of it or, for stacked experts [L, ...] on
expert-parallel rank j, experts j * L and following of the tensor [E, ...] of all. ZeRO's partitions are runs again. So
resharding copies intervals: each rank reads the elements that it steps from the files that hold them, which are mapped
into memory and not loaded, one piece of a parameter at a time.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_remoe.deepspeed_checkpoint_io import load_values
from ds_remoe.deepspeed_optimizer_state import (
    MASTER,
    Cut,
    LiveSlab,
    SavedSlab,
    base_optimizer,
    live_cut,
    live_slabs,
    optimizer_files,
    saved_cut,
    saved_slabs,
    trained_names,
)

_EXPERTS = ".deepspeed_moe.experts."
_ONE_BY_ONE = re.compile(r"\.deepspeed_experts\.\d+\.")


def is_expert(name: str) -> bool:
    """Whether a parameter of this name holds experts, so that each expert-parallel rank has others."""
    return _EXPERTS in name


@dataclass(frozen=True)
class _Extent:
    """Elements start ... start + numel - 1 of a global tensor; they lie in a slab from `offset` on."""

    start: int
    numel: int
    slab: SavedSlab
    offset: int


class SavedOptimizer:
    """The fp32 masters and optimizer states of a checkpoint by global tensor, whatever ranks saved it.

    Args:
        checkpoint: its folder; the files were checked.
        saved_by: how it is cut.
        sizes: elements of each trained global tensor, in the optimizer's order: experts last.

    Attributes:
        keys: of what `read` can give of some tensor: the optimizer's states, and `MASTER` where masters were saved.

    Raises:
        OSError, KeyError, ValueError: a file is missing, not as DeepSpeed writes it, or of another model.
    """

    def __init__(self, checkpoint: Path, saved_by: Cut, sizes: Mapping[str, int]) -> None:
        ep_size, zero_stage = max(saved_by.ep_sizes, default=1), saved_by.zero_stage
        self.keys: set[str] = set()
        self._extents: dict[str, list[_Extent]] = defaultdict(list)
        local_sizes = {name: size // ep_size if is_expert(name) else size for name, size in sizes.items()}
        ends: dict[tuple[str, int], int] = defaultdict(int)
        for index, path in enumerate(optimizer_files(checkpoint, saved_by)):
            for slab in saved_slabs(load_values(path, "cpu", mmap=True), local_sizes):
                self.keys |= slab.tensors.keys()
                for piece in slab.pieces:
                    ep_rank = index % ep_size if is_expert(piece.name) else 0
                    if zero_stage == 0 and index != ep_rank:
                        continue  # the same as in the first file
                    end = ends[piece.name, ep_rank]
                    start = ep_rank * local_sizes[piece.name] + end
                    self._extents[piece.name].append(_Extent(start, piece.numel, slab, piece.offset))
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
            source = extent.slab.tensors[key].narrow(0, extent.offset + skipped, count)
            out[done : done + count].copy_(source)
            done += count

    def keys_of(self, name: str) -> set[str]:
        """Of what `read` can give of one tensor; none of a tensor that was never stepped, unless it has a master.

        Raises:
            ValueError: a part of the tensor has states that another lacks.
        """
        first, *others = (set(extent.slab.tensors) for extent in self._extents[name])
        for other in others:
            if other != first:
                raise ValueError(f"{name}: a part of it has the states {sorted(first)}, and another {sorted(other)}")
        return first

    def scalars(self, name: str) -> dict[str, Any]:
        """The states that are one number for the whole tensor, such as Adam's number of steps."""
        return self._extents[name][0].slab.scalars


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


def restore_optimizer(engine: Any, checkpoint: Path) -> None:
    """Give an engine the masters and states of a checkpoint that other ranks have saved; every rank calls it.

    Args:
        engine: its model already has the checkpoint's weights. Expert-parallel groups are neighbouring ranks.
        checkpoint: its folder.

    Raises:
        OSError, KeyError, TypeError, ValueError: the files are not as DeepSpeed writes them, of another model, or have
            experts that cannot be resharded.
    """
    saved_by, here = saved_cut(checkpoint), live_cut(engine)
    assert saved_by is not None
    parameters = dict(engine.module.named_parameters())
    names = trained_names(engine)
    local_sizes = {name: parameters[name].numel() for name in names}
    _check_experts(checkpoint, names, saved_by, here)
    ep_size = max(here.ep_sizes, default=1)
    sizes = {name: local_sizes[name] * (ep_size if is_expert(name) else 1) for name in names}
    saved = SavedOptimizer(checkpoint, saved_by, sizes)
    starts = {name: dist.get_rank() % ep_size * local_sizes[name] if is_expert(name) else 0 for name in names}
    base = base_optimizer(engine)
    scalar = _as_tensor if type(base).__module__.startswith("torch.") else _as_number
    state = {
        index: _restore_slab(slab, saved, starts, scalar)
        for index, slab in enumerate(live_slabs(engine))
        if slab.parameter.requires_grad  # a plain optimizer may have been given frozen parameters
    }
    base.load_state_dict({"state": state, "param_groups": base.state_dict()["param_groups"]})


def _check_experts(checkpoint: Path, names: Sequence[str], saved_by: Cut, here: Cut) -> None:
    """Experts are cut by one ep_size, and where it changes they are stacked tensors."""
    for cut in (saved_by, here):
        if len(cut.ep_sizes) > 1:
            raise ValueError(
                f"{checkpoint}: its layers have several ep_sizes, {sorted(cut.ep_sizes)}, which cannot be resharded; "
                "load it with the ranks and the ZeRO stage that saved it"
            )
    for name in filter(_ONE_BY_ONE.search, names) if saved_by.ep_sizes != here.ep_sizes else ():
        raise ValueError(
            f"{checkpoint}: {name} is of an expert that is a module of its own, and only experts that are "
            f"ds_remoe.SwiGLU can be resharded to another ep_size; load it with ep_size {max(saved_by.ep_sizes)}"
        )


@torch.no_grad()
def _restore_slab(
    slab: LiveSlab, saved: SavedOptimizer, starts: Mapping[str, int], scalar: Callable[[Any], Any]
) -> dict[str, Any]:
    """Fill a slab's master, and return its states; `scalar` makes the states that are one number the optimizer's."""
    state: dict[str, Any] = {}
    # A slice that is padding alone is stepped with the others.
    names = [piece.name for piece in slab.pieces] or [next(iter(starts))]
    keys = saved.keys_of(names[0])
    for name in names[1:]:
        if (other := saved.keys_of(name)) != keys:
            raise ValueError(
                f"{names[0]} and {name} have different states ({sorted(keys)}, {sorted(other)}), but ZeRO steps them "
                "as one tensor"
            )
    for key in keys:
        if key == MASTER and not slab.is_master:
            continue
        whole = slab.parameter if key == MASTER else torch.zeros_like(slab.parameter)
        for piece in slab.pieces:
            assert piece.start is not None
            out = whole.view(-1).narrow(0, piece.offset, piece.numel)
            saved.read(piece.name, key, starts[piece.name] + piece.start, out)
        if key != MASTER:
            state[key] = whole
    scalars = saved.scalars(names[0])
    for name in names[1:]:
        if saved.scalars(name) != scalars:
            raise ValueError(
                f"{names[0]} and {name} were stepped differently ({scalars}, {saved.scalars(name)}), but ZeRO steps "
                "them as one tensor"
            )
    return state | {key: scalar(value) for key, value in scalars.items()}


def _as_tensor(value: Any) -> Any:
    """A state as torch's optimizers keep it: a tensor that no other parameter shares."""
    if torch.is_tensor(value):
        return value.clone()
    return torch.tensor(float(value)) if isinstance(value, int) else value


def _as_number(value: Any) -> Any:
    """A state as DeepSpeed's fused and CPU optimizers keep it."""
    return int(value) if torch.is_tensor(value) and value.dim() == 0 and float(value).is_integer() else value
