"""A profile of training steps, its operators grouped by the kind of work they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

# The first kind that has a pattern in the operator's name takes it.
KINDS: dict[str, tuple[str, ...]] = {
    "attention": ("scaled_dot_product", "flash_attention", "efficient_attention"),
    "experts": ("ds_remoe::", "grouped", "_up_kernel", "_down_kernel"),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "gemm", "cutlass"),
    "optimizer": ("optimizer.step", "_foreach", "_fused_adam", "addcdiv", "multi_tensor"),
    "communication": ("c10d::", "gloo:", "nccl", "record_param_comms"),
    "host reads": ("_local_scalar_dense", "aten::item", "cudastreamsynchronize", "memcpy dtoh"),
    "loss": ("log_softmax", "nll_loss", "cross_entropy"),
    "norms": ("rms_norm", "layer_norm", "native_norm", "aten::norm", "vector_norm"),
    "embedding": ("embedding",),
    "copies and zeros": ("copy_", "aten::cat", "clone", "zero_", "fill_", "contiguous", "memcpy", "memset"),
}
OTHER = "small operators"


@dataclass(frozen=True)
class Share:
    """One kind of work in a step.

    Attributes:
        kind: key of KINDS, or "small operators".
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


def kind_of(operator: str) -> str:
    """The kind of work that an operator or a GPU kernel of this name does."""
    name = operator.lower()
    for kind, patterns in KINDS.items():
        if any(pattern in name for pattern in patterns):
            return kind
    return OTHER


def time_by_kind(profiler: Any, device: torch.device, steps: int) -> list[Share]:
    """Self time of every operator of a `torch.profiler.profile`, by kind, longest first; each moment counts once.

    On the CPU these are the operators of the calling thread, Python's time between them being theirs that called; on a
    GPU the kernels, so that time in which the GPU waits does not show.
    """
    cuda = device.type == "cuda"
    operators: dict[str, list[tuple[float, int, str]]] = {}
    for event in profiler.key_averages():
        micros = event.self_device_time_total if cuda else event.self_cpu_time_total
        if micros > 0:
            operators.setdefault(kind_of(event.key), []).append((micros, event.count, event.key))
    total = sum(micros for found in operators.values() for micros, _, _ in found)
    shares = [
        Share(
            kind=kind,
            share=sum(micros for micros, _, _ in found) / total,
            ms=sum(micros for micros, _, _ in found) / 1e3 / steps,
            calls=sum(count for _, count, _ in found) / steps,
            largest=tuple(name for _, _, name in sorted(found, reverse=True)[:3]),
        )
        for kind, found in operators.items()
    ]
    return sorted(shares, key=lambda share: share.share, reverse=True)
