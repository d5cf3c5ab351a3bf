"""Gradients of ZeRO 1 and 2, kept where the optimizer steps them.

Checked against DeepSpeed 0.19.8. It copies each reduced gradient, of the whole parameter, out of its bucket, keeps the
last micro-batch's beside the sum of those before, converts them one by one to measure their norm, and at the step
concatenates those of a partition. Its step also takes a partition that is flat already, as its own fp32 accumulation
makes it; here every partition is, from the first reduced gradient on. And where one rank alone has a group's
parameters, as experts at ep_size = world size, their gradients go there without a bucket.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer, GradPartitionBufferGroup
from deepspeed.runtime.zero.utils import get_norm_dtype
from torch import Tensor

_FLAT = (
    "reduce_ready_partitions_and_remove_grads",
    "copy_grads_in_partition",
    "get_all_grad_tensors",
    "get_flat_partition",
)
_NORM = "get_grad_norm_direct"
_NORM_BLOCK = 4096


def keep_gradients_flat(engine: Any) -> None:
    """Have a ZeRO 1 or 2 engine put each reduced gradient where its optimizer steps it.

    Weights stay bit for bit those of DeepSpeed's own passes, but for the last digits of the norm by which gradients are
    clipped. `.grad` is None once a gradient is there, so a hook on it has to be registered before. An engine that steps
    otherwise (another stage, offloading, Muon, gradients outside of buckets, model parallelism) is left as it is.
    """
    optimizer = engine.optimizer
    if type(optimizer) is not DeepSpeedZeroOptimizer or engine.mpu is not None:
        return
    if optimizer.cpu_offload or optimizer.zenflow or not optimizer.contiguous_gradients:
        return
    if "muon" in type(optimizer.optimizer).__name__.lower():
        return
    setattr(optimizer, _NORM, _flat_norm(getattr(optimizer, _NORM)))
    # Gradients with a dtype of their own are flat in DeepSpeed, too.
    if optimizer.gradient_accumulation_dtype == optimizer.dtype:
        gradients = _Gradients(optimizer)
        for name in _FLAT:
            setattr(optimizer, name, getattr(gradients, name))


def restore_deepspeed_gradients(engine: Any) -> bool:
    """Undo `keep_gradients_flat` between two steps, for a benchmark of both; False where it had done nothing."""
    undone = [vars(engine.optimizer).pop(name, None) for name in (_NORM, *_FLAT)]
    return any(undone)


def block_norms(flat: Tensor) -> Tensor:
    """L2 norms of blocks of a vector, whose norm is the vector's: summed in at least fp32 in a block.

    Args:
        flat: [N], any floating dtype.

    Returns:
        [N // 4096 + 1] in fp64, in fp32 on a device without.
    """
    dtype = torch.promote_types(flat.dtype, torch.float32)
    whole = flat.numel() // _NORM_BLOCK * _NORM_BLOCK
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, _NORM_BLOCK), dim=1, dtype=dtype)
    rest = torch.linalg.vector_norm(flat[whole:], dtype=dtype)
    return torch.cat([rows, rest.view(1)]).to(get_norm_dtype())


@dataclass(frozen=True)
class _Slice:
    """Elements of one parameter in this rank's partition: from `source` in the parameter, from `start` there."""

    source: int
    start: int
    numel: int
    shape: torch.Size


class _Partition:
    """This rank's share of a parameter group's gradients."""

    def __init__(self, optimizer: Any, group: int) -> None:
        self._size, self._dtype = int(optimizer.partition_size[group]), optimizer.dtype
        rank = dist.get_rank(optimizer.real_dp_process_group[group])
        self._slices: dict[int, _Slice] = {}
        for parameter in optimizer.params_in_partition[group]:
            key = optimizer.get_param_id(parameter)
            source = int(optimizer.grad_start_offset[group][rank][key])
            start = int(optimizer.grad_partition_insertion_offset[group][rank][key])
            numel = min(parameter.numel() - source, self._size - start)
            self._slices[key] = _Slice(source, start, numel, parameter.shape)
        self._sum: GradPartitionBufferGroup | None = None
        self._flat = torch.empty(0)
        self._filled: set[int] = set()

    def add(self, key: int, gradient: Tensor, divisor: float = 1.0) -> None:
        """Add a parameter's gradient, divided, to those of the step's earlier micro-batches."""
        if self._sum is None:
            self._begin()
        piece = self._slices[key]
        place = self._flat.narrow(0, piece.start, piece.numel)
        gradient = gradient.reshape(-1).narrow(0, piece.source, piece.numel)
        if key in self._filled:
            place.add_(gradient if divisor == 1 else gradient / divisor)
        elif divisor == 1:
            place.copy_(gradient)
        else:
            torch.div(gradient, divisor, out=place)
        self._filled.add(key)

    def take(self) -> GradPartitionBufferGroup:
        """The sum for the optimizer's step, zero where nothing came; the next micro-batch begins another one."""
        if self._sum is None:
            self._begin()
        for key in self._slices.keys() - self._filled:
            self._flat.narrow(0, self._slices[key].start, self._slices[key].numel).zero_()
        taken, self._sum, self._flat = self._sum, None, torch.empty(0)
        return taken

    def _begin(self) -> None:
        device = get_accelerator().current_device_name()
        self._flat, self._filled = torch.empty(self._size, dtype=self._dtype, device=device), set()
        views, end = [], 0
        for piece in self._slices.values():
            views += self._padding(end, piece.start)
            view, end = self._flat.narrow(0, piece.start, piece.numel), piece.start + piece.numel
            views.append(view.view(piece.shape) if piece.numel == piece.shape.numel() else view)
        views += self._padding(end, self._size)
        self._sum = GradPartitionBufferGroup(views, self._flat)

    def _padding(self, start: int, end: int) -> list[Tensor]:
        if start == end:
            return []
        padding = self._flat.narrow(0, start, end - start).zero_()
        padding._zero_padding = True  # type: ignore[attr-defined]
        return [padding]


class _Gradients:
    """The partitions of all groups, behind the names of the methods of DeepSpeed's that they stand in for."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._partitions = [_Partition(optimizer, group) for group in range(len(optimizer.params_in_partition))]
        in_buckets = not optimizer.reduce_scatter or optimizer.autoep_folding_tp_group is not None
        groups = zip(optimizer.real_dp_process_group, optimizer.bit16_groups, strict=True)
        self._alone = [
            dist.get_world_size(group) == 1
            and not in_buckets
            and all(optimizer.get_param_comm_dtype(parameter) == parameter.dtype for parameter in parameters)
            for group, parameters in groups
        ]
        ranks = dist.get_world_size(optimizer.dp_process_group) / optimizer.sequence_parallel_size
        self._divisor = ranks if optimizer.gradient_average else 1.0
        self._reduce = optimizer.reduce_ready_partitions_and_remove_grads

    def reduce_ready_partitions_and_remove_grads(self, param: Tensor, i: int) -> None:
        """Put a gradient that no other rank has into group i's partition, any other into DeepSpeed's bucket."""
        optimizer, key = self._optimizer, self._optimizer.get_param_id(param)
        if not self._alone[i]:
            self._reduce(param, i)
            return
        # DeepSpeed's tiled computations run hooks before a gradient is whole.
        whole = param.numel() > 0 and getattr(param, "ds_grad_is_ready", True)
        if whole and (optimizer.partition_gradients or optimizer.is_gradient_accumulation_boundary()):
            if optimizer.params_already_reduced[key]:
                raise RuntimeError(
                    f"parameter {tuple(param.shape)}: a second gradient in one backward pass; either several segments "
                    "with reentrant checkpointing use it (pass use_reentrant=False), or an earlier backward pass broke "
                    "off, whose gradients are incomplete (start again from a checkpoint)"
                )
            optimizer.params_already_reduced[key] = True
            self._keep(param, i, self._divisor)

    def copy_grads_in_partition(self, param: Tensor, group_idx: int | None = None) -> None:
        """Keep a gradient that was reduced; it stands in a bucket that is used again."""
        self._keep(param, self._optimizer._get_param_group_idx(param) if group_idx is None else group_idx)

    def _keep(self, parameter: Tensor, group: int, divisor: float = 1.0) -> None:
        assert parameter.grad is not None
        self._partitions[group].add(self._optimizer.get_param_id(parameter), parameter.grad, divisor)
        parameter.grad = None

    def get_all_grad_tensors(self, tensor_list: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Gradients of a micro-batch to be summed with those before: they are, but what no hook has taken."""
        for parameter in tensor_list:
            if parameter.grad is not None:
                self.copy_grads_in_partition(parameter)
        return []

    def get_flat_partition(
        self,
        tensor_list: Sequence[Tensor],
        first_offset: int,
        partition_size: int,
        dtype: torch.dtype,
        device: Any,
        param_group_idx: int,
        return_tensor_list: bool = False,
    ) -> list[Tensor] | Tensor:
        """The sum over the step's micro-batches."""
        taken = self._partitions[param_group_idx].take()
        return taken if return_tensor_list else taken.flat_partition


def _flat_norm(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Measure a flat partition at once; the sum over ranks stays DeepSpeed's."""

    @functools.wraps(original)
    def get_grad_norm_direct(gradients: Any, params: Sequence[Tensor], norm_type: float = 2) -> Tensor:
        flat = getattr(gradients, "flat_partition", None)
        if flat is not None and norm_type == 2:
            gradients, params = [block_norms(flat)], params[:1]
        return original(gradients, params, norm_type)

    return get_grad_norm_direct
