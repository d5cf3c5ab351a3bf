"""The optimizer of a checkpoint, resharded for other ranks: another world size, ep_size or ZeRO stage.

A rank's parameter is a run of elements of a global tensor: all of it or, for stacked experts [L, ...] on
expert-parallel rank j, experts j * L and following of the tensor [E, ...] of all. ZeRO's partitions are runs again. So
resharding copies intervals: each rank reads the elements that it steps from the files that hold them, which are mapped
into memory and not loaded, one piece of a parameter at a time.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ds_remoe.deepspeed_checkpoint_io import Reader, load_values
from ds_remoe.deepspeed_loss_scale import restore_loss_scale
from ds_remoe.deepspeed_optimizer_state import (
    MASTER,
    Cut,
    LiveSlab,
    base_optimizer,
    live_cut,
    live_slabs,
    saved_cut,
    trained_names,
)
from ds_remoe.training.agreement import agreed
from ds_remoe.training.saved_optimizer import SavedOptimizer, is_expert

_log = logging.getLogger(__name__)

_OF_THE_CUT = frozenset({"params", "name", "moe", "fused", "foreach", "capturable"})
"""Keys of an optimizer's group that say what it steps and how, and not by how much."""
_ONE_BY_ONE = re.compile(r"\.deepspeed_experts\.\d+\.")


def open_optimizer(engine: Any, checkpoint: Path, read_file: Reader = load_values) -> SavedOptimizer | None:
    """The optimizer of a checkpoint that other ranks have saved; None where these ranks would cut it as it is.

    Every rank calls it, before DeepSpeed loads anything: the engine does not change, and an error is raised on all.

    Args:
        engine: its expert-parallel groups are neighbouring ranks.
        checkpoint: its folder.
        read_file: `load_values`, or `load_objects` where the source is trusted.

    Raises:
        OSError, KeyError, TypeError, ValueError: the files are not as DeepSpeed writes them, of another model, or have
            experts that cannot be resharded.
    """
    saved_by, here = agreed(partial(saved_cut, checkpoint, read_file)), live_cut(engine)
    if saved_by is None or saved_by == here:
        return None
    sizes = _local_sizes(engine)
    _check_experts(checkpoint, list(sizes), saved_by, here)
    ep_size = max(here.ep_sizes, default=1)
    whole = {name: size * (ep_size if is_expert(name) else 1) for name, size in sizes.items()}
    return SavedOptimizer(checkpoint, saved_by, whole, read_file, together=True)


def restore_optimizer(engine: Any, saved: SavedOptimizer) -> None:
    """Give an engine, whose model already has the checkpoint's weights, the masters and states of the same checkpoint.

    Raises:
        OSError, TypeError, ValueError: the states are not such as this engine's optimizer has.
    """
    local_sizes, ep_size = _local_sizes(engine), max(live_cut(engine).ep_sizes, default=1)
    starts = {name: dist.get_rank() % ep_size * size if is_expert(name) else 0 for name, size in local_sizes.items()}
    base = base_optimizer(engine)
    scalar = _as_tensor if type(base).__module__.startswith("torch.") else _as_number
    state = {
        index: _restore_slab(slab, saved, starts, scalar)
        for index, slab in enumerate(live_slabs(engine))
        if slab.parameter.requires_grad  # a plain optimizer may have been given frozen parameters
    }
    groups, own_settings = _with_saved_settings(base.state_dict()["param_groups"], saved.groups)
    base.load_state_dict({"state": state, "param_groups": groups})
    for note in (own_settings, restore_loss_scale(engine, saved.loss_scale)):
        if note is not None and dist.get_rank() == 0:
            _log.warning("%s: %s", saved.checkpoint, note)


def _with_saved_settings(
    here: list[dict[str, Any]], saved: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], str | None]:
    """Groups with the saved learning rates and other settings, as DeepSpeed loads them where the cut is the same.

    Returns:
        The groups, and what the user should know.
    """
    if len(here) != len(saved):
        note = (
            f"its optimizer has {len(saved)} groups, and this one {len(here)}; learning rates and the like stay as here"
        )
        return here, note
    both = zip(here, saved, strict=True)
    return [g | {k: v for k, v in s.items() if k in g and k not in _OF_THE_CUT} for g, s in both], None


def _local_sizes(engine: Any) -> dict[str, int]:
    """Elements of this rank's trained parameters, in the optimizer's order."""
    parameters = dict(engine.module.named_parameters())
    return {name: parameters[name].numel() for name in trained_names(engine)}


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
