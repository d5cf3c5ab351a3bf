"""Where DeepSpeed keeps each parameter's fp32 master and optimizer states: in a checkpoint's files and in an engine.

Checked against DeepSpeed 0.19.8. ZeRO 1 and 2 flatten each group of parameters and give each rank a slice of it; at
stage 0 the base optimizer steps the parameters themselves (fp32), or fp32 copies of them, one by one or group by group.
All of these are slabs here: one tensor that is stepped as a whole, and the runs of parameters' elements that it holds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_remoe.deepspeed_checkpoint_io import Reader, load_values

MASTER = "master"
"""Key of the fp32 masters, beside those of the optimizer's states."""
MODEL_FILE = "mp_rank_00_model_states.pt"
_STAGE_0_FILE = "expp_rank_{}_mp_rank_00_optim_states.pt"


@dataclass(frozen=True)
class Piece:
    """Elements of one parameter in a slab.

    Attributes:
        name: of the rank's parameter.
        offset: of the first of them in the slab.
        numel: their number.
        start: of the first of them in the flattened parameter; None where only the other ranks' slabs tell.
    """

    name: str
    offset: int
    numel: int
    start: int | None = None


@dataclass(frozen=True)
class SavedSlab:
    """A slab in a checkpoint file.

    Attributes:
        pieces: in it.
        tensors: flat, by key: the masters, where the file has them, and the states with a number per element.
        scalars: the other states, such as Adam's number of steps.
    """

    pieces: tuple[Piece, ...]
    tensors: dict[str, Tensor]
    scalars: dict[str, Any]


@dataclass(frozen=True)
class LiveSlab:
    """A slab of an engine.

    Attributes:
        pieces: in it, each with its start.
        parameter: what the base optimizer steps.
        is_master: False where that is the model's own parameter, so that there is no master besides.
    """

    pieces: tuple[Piece, ...]
    parameter: Tensor
    is_master: bool


@dataclass(frozen=True)
class Cut:
    """How the optimizer is cut into files.

    Attributes:
        zero_stage: 0, 1 or 2.
        partitions: ranks that share the parameters outside of experts; 1 at stage 0, where each has all.
        ep_sizes: of the layers with experts.
    """

    zero_stage: int
    partitions: int
    ep_sizes: frozenset[int]


def saved_cut(checkpoint: Path, read: Reader = load_values) -> Cut | None:
    """That of a checkpoint, whose files are read with `read`; None where it has no optimizer.

    Raises:
        OSError, KeyError: the files are not as DeepSpeed 0.19.8 writes them.
        UnsafeFileError: `load_values` refuses one of them.
    """
    sharded, whole = _zero_file(checkpoint, 0), checkpoint / _STAGE_0_FILE.format(0)
    if sharded.is_file():
        content = read(sharded, "cpu", mmap=True)
        optimizer, ep_sizes = content["optimizer_state_dict"], _ep_sizes(base_state(content)["param_groups"])
        # BF16_Optimizer, which serves stage 1 with fp32 gradients, does not write its stage.
        return Cut(int(optimizer.get("zero_stage", 1)), max(optimizer["partition_count"]), ep_sizes)
    if whole.is_file():
        return Cut(0, 1, _ep_sizes(base_state(read(whole, "cpu", mmap=True))["param_groups"]))
    # The optimizer of a model without experts stands in the file of its weights, the same for any number of ranks.
    return Cut(0, 1, frozenset()) if (checkpoint / MODEL_FILE).is_file() else None


def live_cut(engine: Any) -> Cut:
    """That of the checkpoints which an engine saves."""
    groups, stage = engine.optimizer.param_groups, int(engine.zero_optimization_stage())
    return Cut(stage, dist.get_world_size() if stage > 0 else 1, _ep_sizes(groups))


def _ep_sizes(groups: Iterable[Mapping[str, Any]]) -> frozenset[int]:
    """Of the groups of experts' parameters."""
    return frozenset(int(group["name"].removeprefix("ep_size_")) for group in groups if group.get("moe", False))


def optimizer_files(checkpoint: Path, cut: Cut) -> list[Path]:
    """The files that hold the optimizer, by rank; file i is of expert-parallel rank i modulo ep_size.

    At stage 0 there is one for each expert-parallel rank only, as its replicas hold the same.
    """
    if cut.zero_stage > 0:
        return [_zero_file(checkpoint, rank) for rank in range(cut.partitions)]
    if not cut.ep_sizes:
        return [checkpoint / MODEL_FILE]
    return [checkpoint / _STAGE_0_FILE.format(rank) for rank in range(max(cut.ep_sizes))]


def _zero_file(checkpoint: Path, rank: int) -> Path:
    name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    of_bf16 = checkpoint / f"bf16_{name}"
    return of_bf16 if of_bf16.is_file() else checkpoint / name


def base_state(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The base optimizer's own state, `state` and `param_groups`, in one of these files."""
    if "optimizer_state_dict" in content:
        base: Mapping[str, Any] = content["optimizer_state_dict"]["base_optimizer_state"]
    else:
        base = content["optimizer"].get("optimizer_state_dict", content["optimizer"])
    return base


def saved_slabs(content: Mapping[str, Any], sizes: Mapping[str, int]) -> Iterator[SavedSlab]:
    """The slabs of one of these files.

    Args:
        content: of the file.
        sizes: elements of each parameter of the rank that wrote it, in the optimizer's order: experts last.

    Raises:
        KeyError, ValueError: the file is not as DeepSpeed 0.19.8 writes it, or of other parameters.
    """
    if "optimizer_state_dict" in content:
        yield from _saved_by_zero(content["optimizer_state_dict"], base_state(content))
    else:
        yield from _saved_at_stage_0(content["optimizer"], base_state(content), sizes)


def _saved_by_zero(optimizer: Mapping[str, Any], base: Mapping[str, Any]) -> Iterator[SavedSlab]:
    _check_not_muon(base["param_groups"])
    for index, mapping in enumerate(optimizer["param_slice_mappings"]):
        (parameter,) = base["param_groups"][index]["params"]
        pieces = tuple(Piece(name, address.start, address.numel) for name, address in mapping.items())
        yield _slab(pieces, optimizer["single_partition_of_fp32_groups"][index], base["state"].get(parameter, {}))


def _saved_at_stage_0(
    optimizer: Mapping[str, Any], base: Mapping[str, Any], sizes: Mapping[str, int]
) -> Iterator[SavedSlab]:
    flat: list[Tensor] = list(optimizer.get("fp32_groups_flat", []))
    masters: list[Tensor | None] = [*flat] or [master for group in optimizer.get("fp32_groups", []) for master in group]
    parameters = [index for group in base["param_groups"] for index in group["params"]]
    if not flat and len(parameters) > len(sizes):
        # A plain optimizer may have been given frozen parameters as well, which have no state.
        parameters = [index for index in parameters if index in base["state"]] or parameters[: len(sizes)]
    if not flat and len(parameters) != len(sizes):
        raise ValueError(
            f"the optimizer has states of {len(parameters)} parameters, but {len(sizes)} are trained here; freeze the "
            "same ones, and see that each had a gradient before the checkpoint"
        )
    unplaced = deque(sizes.items())
    for index, (parameter, master) in enumerate(zip(parameters, masters or [None] * len(parameters), strict=True)):
        pieces: list[Piece] = []
        offset = 0
        while unplaced and (not pieces or (flat and offset < flat[index].numel())):
            name, numel = unplaced.popleft()
            pieces.append(Piece(name, offset, numel))
            offset += numel
        slab = _slab(tuple(pieces), master, base["state"].get(parameter, {}))
        for key, tensor in slab.tensors.items():
            if tensor.numel() != offset:
                raise ValueError(
                    f"{key} of {pieces[-1].name} has {tensor.numel()} elements, but it has {offset}; the optimizer's "
                    "parameters stood in another order"
                )
        yield slab
    if unplaced:
        raise ValueError(f"the optimizer has no state of {unplaced[0][0]}")


def _slab(pieces: tuple[Piece, ...], master: Tensor | None, state: Mapping[str, Any]) -> SavedSlab:
    tensors = {} if master is None else {MASTER: master.detach().flatten()}
    scalars = {}
    for key, value in state.items():
        if torch.is_tensor(value) and value.dim() > 0:
            tensors[key] = value.flatten()
        else:
            scalars[key] = value
    end = max((piece.offset + piece.numel for piece in pieces), default=0)
    for key, tensor in tensors.items():
        if tensor.numel() < end:
            raise ValueError(f"{key} has {tensor.numel()} elements, but {pieces[-1].name} ends at {end}")
    return SavedSlab(pieces, tensors, scalars)


def live_slabs(engine: Any) -> list[LiveSlab]:
    """The slabs of this rank, in the order of the base optimizer's parameters.

    Raises:
        TypeError: for an optimizer that no configuration of a run leads to.
    """
    optimizer, names = engine.optimizer, engine.param_names
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        _check_not_muon(optimizer.param_groups)
        groups = zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True)
        return [LiveSlab(tuple(_fragments(group, names)), flat, True) for group, flat in groups]
    if hasattr(optimizer, "fp32_groups_flat_partition"):
        _check_not_muon(optimizer.param_groups)
        groups = zip(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, strict=True)
        return [LiveSlab(tuple(_fragments(group, names)), flat, True) for group, flat in groups]
    if hasattr(optimizer, "fp32_groups_flat"):
        groups = zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True)
        return [LiveSlab(tuple(_in_a_row(group, names)), flat, True) for group, flat in groups]
    if hasattr(optimizer, "fp32_groups"):
        both = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        pairs = (pair for models, masters in both for pair in zip(models, masters, strict=True))
        return [LiveSlab((Piece(names[model], 0, model.numel(), 0),), master, True) for model, master in pairs]
    if isinstance(optimizer, torch.optim.Optimizer):
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        return [LiveSlab((Piece(names[p], 0, p.numel(), 0),), p, False) for p in parameters]
    raise TypeError(f"{type(optimizer).__name__}: where this optimizer keeps its states is not known")


def trained_names(engine: Any) -> list[str]:
    """This rank's trained parameters in the order of the optimizer's groups: experts last."""
    optimizer, names = engine.optimizer, engine.param_names
    for groups in ("bit16_groups", "bf16_groups", "fp16_groups"):
        if hasattr(optimizer, groups):
            return [names[parameter] for group in getattr(optimizer, groups) for parameter in group]
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return [names[parameter] for parameter in parameters if parameter.requires_grad]


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The one that steps the slabs."""
    optimizer = engine.optimizer
    base: torch.optim.Optimizer = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer
    return base


@contextmanager
def configured_hyperparameters(engine: Any) -> Iterator[None]:
    """Keep weight decay, betas and the like as configured over a load, which would bring those of the checkpoint.

    The learning rate is as configured where no scheduler is to set it, else the checkpoint's until then.
    """
    base = base_optimizer(engine)
    configured = base.state_dict()["param_groups"]
    yield
    loaded = base.state_dict()
    for old, new in zip(loaded["param_groups"], configured, strict=True):
        old.update(new if engine.lr_scheduler is None else {**new, "lr": old["lr"]})
    # Through the optimizer's own load, which puts the states where its settings (fused) want them.
    base.load_state_dict(loaded)


def _check_not_muon(groups: Iterable[Mapping[str, Any]]) -> None:
    """ZeRO lays Muon's momenta out by whole matrices, not as it does the partition."""
    if any(group.get("use_muon", False) for group in groups):
        raise TypeError("Muon's states cannot be resharded at ZeRO stages 1 and 2")


def _fragments(group: Iterable[Any], names: Mapping[Any, str]) -> Iterator[Piece]:
    for parameter in group:
        fragment = parameter._hp_mapping
        if fragment is not None:
            inside, flat = fragment.lp_fragment_address, fragment.hp_fragment_address
            yield Piece(names[parameter], flat.start, flat.numel, inside.start)


def _in_a_row(group: Iterable[Tensor], names: Mapping[Any, str]) -> Iterator[Piece]:
    offset = 0
    for parameter in group:
        yield Piece(names[parameter], offset, parameter.numel(), 0)
        offset += parameter.numel()
