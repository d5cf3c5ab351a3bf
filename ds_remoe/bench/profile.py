"""A profile of training steps, its operators grouped by the kind of work they are."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import record_function

from ds_remoe.model.loss import LOSS_RANGE

ENGINE_RANGES = {"_take_model_step": "engine: model step", "allreduce_gradients": "engine: reduce gradients"}
"""Methods of DeepSpeed's engine that a profile shows as ranges, by these names."""

# Whatever runs inside an operator or range of such a name belongs to it: the experts' GEMMs to the experts.
PARTS: dict[str, tuple[str, ...]] = {
    "experts": ("ds_remoe::",),
    "loss": (LOSS_RANGE,),
    "optimizer": ("Optimizer.step",),
    "gradients: norm, clipping, flattening": ("engine: model step",),
    "gradients: hooks and reduction": ("engine: reduce gradients", "torch::autograd::AccumulateGrad"),
}
# Elsewhere the first kind that has a pattern in the operator's name takes it.
KINDS: dict[str, tuple[str, ...]] = {
    "attention": ("scaled_dot_product", "flash_attention", "efficient_attention"),
    "experts": ("grouped", "_up_kernel", "_down_kernel"),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "gemm", "cutlass"),
    "optimizer": ("_foreach", "_fused_adam", "addcdiv", "multi_tensor"),
    "communication": ("c10d::", "gloo:", "nccl", "record_param_comms"),
    "host reads": ("_local_scalar_dense", "aten::item", "cudastreamsynchronize", "memcpy dtoh"),
    "loss": ("log_softmax", "nll_loss", "cross_entropy"),
    "norms": ("rms_norm", "layer_norm", "native_norm", "aten::norm", "vector_norm"),
    "embedding": ("embedding",),
    "copies and zeros": ("copy_", "aten::cat", "clone", "zero_", "fill_", "contiguous", "memcpy", "memset"),
}
AUTOGRAD, VIEWS, OTHER = "autograd nodes", "views and allocation", "small operators"
_AUTOGRAD_NODE = re.compile(r"autograd::.*|_?[A-Z][A-Za-z]*\d*")
_VIEW = re.compile(
    r"(aten::)?_?(as_strided|reshape|view|unsafe_view|slice|select|narrow|chunk|split|unbind|t|transpose|permute|expand"
    r"|squeeze|unsqueeze|flatten|unflatten|detach|alias|resolve_conj|resolve_neg|to|to_copy|empty|result_type"
    r"|has_compatible_shallow_copy_type)(_as|_like|_strided|_alias|_copy|_)?"
)


@dataclass(frozen=True)
class Share:
    """One kind of work in a step.

    Attributes:
        kind: key of PARTS or KINDS, or one of the three others.
        share: of the step's time, 0 to 1.
        ms: a step.
        calls: of its operators, a step.
        largest: names of its up to three longest operators.
    """

    kind: str
    share: float
    ms: float
    calls: float
    largest: tuple[str, ...]


@contextlib.contextmanager
def engine_ranges(engine: Any) -> Iterator[None]:
    """Show what DeepSpeed's engine does with the gradients as ranges of its own."""

    def shown(method: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with record_function(name):
                return method(*args, **kwargs)

        return run

    kept = {method: vars(engine)[method] for method in ENGINE_RANGES if method in vars(engine)}
    for method, name in ENGINE_RANGES.items():
        setattr(engine, method, shown(getattr(engine, method), name))
    try:
        yield
    finally:
        for method in ENGINE_RANGES:
            delattr(engine, method)
        vars(engine).update(kept)


def kind_of(operator: str) -> str:
    """The kind of work that an operator or a GPU kernel of this name does, wherever it runs."""
    name = operator.lower()
    for kind, patterns in KINDS.items():
        if any(pattern in name for pattern in patterns):
            return kind
    if _AUTOGRAD_NODE.fullmatch(operator):
        return AUTOGRAD
    return VIEWS if _VIEW.fullmatch(operator) else OTHER


def time_by_kind(profiler: Any, device: torch.device, steps: int) -> list[Share]:
    """Self time of every operator of a `torch.profiler.profile`, by kind, longest first; each moment counts once.

    On the CPU these are the operators of the calling thread (other threads share its GEMMs and loops), Python's time
    between them being theirs that called: an autograd node's is that of its bookkeeping and of what Python it runs. On
    a GPU they are the kernels, by their names alone, so that time in which the GPU waits does not show.
    """
    cuda = device.type == "cuda"
    spent: dict[str, dict[str, list[float]]] = {}
    for event in profiler.events():
        if cuda != (event.device_type != DeviceType.CPU) or (cuda and event.is_user_annotation):
            continue
        micros = event.self_device_time_total if cuda else event.self_cpu_time_total
        if micros > 0:
            kind = kind_of(event.name) if cuda else _kind_in_place(event)
            total = spent.setdefault(kind, {}).setdefault(event.name, [0.0, 0.0])
            total[0] += micros
            total[1] += 1
    everything = sum(micros for found in spent.values() for micros, _ in found.values())
    shares = [
        Share(
            kind=kind,
            share=sum(micros for micros, _ in found.values()) / everything,
            ms=sum(micros for micros, _ in found.values()) / 1e3 / steps,
            calls=sum(calls for _, calls in found.values()) / steps,
            largest=tuple(sorted(found, key=lambda name: found[name], reverse=True)[:3]),
        )
        for kind, found in spent.items()
    ]
    return sorted(shares, key=lambda share: share.share, reverse=True)


def _kind_in_place(event: Any) -> str:
    """The part that the event or the nearest thing around it belongs to, else the kind of its name."""
    around = event
    while around is not None:
        for part, patterns in PARTS.items():
            if any(pattern in around.name for pattern in patterns):
                return part
        around = around.cpu_parent
    return kind_of(event.name)
