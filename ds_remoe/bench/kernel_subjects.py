"""What `ds-remoe bench kernels` times: for each kernel its implementations, on the sizes and routing of a workload.

To add a kernel, write a function that makes its `Subject` and enter it in `KERNELS`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ds_remoe.bench.workloads import Workload
from ds_remoe.kernels import grouped_swiglu, grouped_swiglu_cpu, grouped_swiglu_grouped_mm
from ds_remoe.kernels.backend import use_triton
from ds_remoe.kernels.pair_groups import PairGroups, RowOrder
from ds_remoe.kernels.swiglu import torch_weighted_swiglu, torch_weighted_swiglu_backward

TWIN, TRITON, CPP, GROUPED_MM = "torch", "Triton", "C++", "grouped_mm"

Work = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        device, dtype: of activations and weights; routing weights are fp32, or fp64 with fp64.
        repeats: timed rounds.
        warmup: rounds before them.
        seed: of all tensors and of the routing.
    """

    device: torch.device
    dtype: torch.dtype
    repeats: int
    warmup: int
    seed: int

    @property
    def weight_dtype(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)


@dataclass(frozen=True)
class Subject:
    """One kernel on one workload.

    Attributes:
        implementations: name → its work, whose results are compared with the twin's.
        left_out: implementations that do not run here → why.
        flops: FLOPs of its matrix products; 0 where there are none.
        moved_bytes: the least bytes that it reads and writes; 0 where its time is that of the matrix products.
    """

    implementations: dict[str, Work]
    left_out: dict[str, str]
    flops: int = 0
    moved_bytes: int = 0


def weighted_swiglu(workload: Workload, settings: Settings) -> Subject:
    """w · silu(gate) · up of all pairs."""
    _, gate_up, weights = _swiglu_tensors(workload, settings)
    implementations: dict[str, Work] = {TWIN: lambda: (torch_weighted_swiglu(gate_up, weights),)}
    left_out = _left_out_of_swiglu(gate_up)
    if TRITON not in left_out:
        from ds_remoe.kernels import swiglu_triton

        implementations[TRITON] = lambda: (swiglu_triton.forward(gate_up, weights),)
    return Subject(implementations, left_out, moved_bytes=3 * gate_up.nbytes // 2)


def weighted_swiglu_backward(workload: Workload, settings: Settings) -> Subject:
    """Its gradients and the value again."""
    grad, gate_up, weights = _swiglu_tensors(workload, settings)
    implementations: dict[str, Work] = {TWIN: lambda: torch_weighted_swiglu_backward(grad, gate_up, weights)}
    left_out = _left_out_of_swiglu(gate_up)
    if TRITON not in left_out:
        from ds_remoe.kernels import swiglu_triton

        implementations[TRITON] = lambda: swiglu_triton.backward(grad, gate_up, weights)
    return Subject(implementations, left_out, moved_bytes=3 * gate_up.nbytes)


def grouped_forward(workload: Workload, settings: Settings) -> Subject:
    """The experts' FFNs over all pairs, summed per token; the sums' tensor is part of the time, their order is not."""
    case = _Experts.draw(workload, settings)
    modules, left_out = _grouped_implementations(case)
    works: dict[str, Work] = {TWIN: lambda: case.forward(grouped_swiglu.torch_forward)}
    works |= {name: functools.partial(case.forward, module.forward) for name, module in modules.items()}
    return Subject(works, left_out, flops=workload.flops(1))


def grouped_backward(workload: Workload, settings: Settings) -> Subject:
    """Gradients of tokens, weights and routing weights; their tensors are part of the time, the sums' order is not."""
    case = _Experts.draw(workload, settings)
    modules, left_out = _grouped_implementations(case)
    works: dict[str, Work] = {TWIN: lambda: case.backward(grouped_swiglu.torch_backward)}
    works |= {name: functools.partial(case.backward, module.backward) for name, module in modules.items()}
    return Subject(works, left_out, flops=2 * workload.flops(1))


KERNELS: Mapping[str, Callable[[Workload, Settings], Subject]] = {
    "swiglu": weighted_swiglu,
    "swiglu_backward": weighted_swiglu_backward,
    "grouped_swiglu": grouped_forward,
    "grouped_backward": grouped_backward,
}


def why_no_triton(tensor: Tensor) -> str | None:
    """What keeps Triton's kernels from running for real; the interpreter never counts."""
    if not tensor.is_cuda:
        return "Triton needs a CUDA device"
    return None if use_triton(tensor) else f"Triton's kernels do not take {tensor.dtype}, or DS_REMOE_KERNELS forbids"


@dataclass(frozen=True)
class _Experts:
    rows: Tensor
    groups: PairGroups
    gate_up: Tensor
    down: Tensor
    grad_out: Tensor
    pre_activation: Tensor

    @classmethod
    def draw(cls, workload: Workload, settings: Settings) -> _Experts:
        generator = torch.Generator().manual_seed(settings.seed)
        experts, d, h = workload.num_experts, workload.hidden_size, workload.expert_width
        expert_ids_N, token_ids_N = workload.mask_TE.t().nonzero(as_tuple=True)
        weights_N = workload.scores_TE[token_ids_N, expert_ids_N].to(settings.device, settings.weight_dtype)
        ids_N = token_ids_N.to(settings.device)
        groups = PairGroups(ids_N, weights_N, workload.counts, RowOrder.of(ids_N, workload.tokens))
        rows, grad_out = (_normal((workload.tokens, d), 1.0, settings, generator) for _ in range(2))
        gate_up = _normal((experts, 2 * h, d), d**-0.5, settings, generator)
        down = _normal((experts, d, h), h**-0.5, settings, generator)
        pre_activation = grouped_swiglu.torch_forward(rows, groups, gate_up, down, torch.empty_like(rows))
        return cls(rows, groups, gate_up, down, grad_out, pre_activation)

    def forward(self, function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        out = torch.empty_like(self.rows)
        return function(self.rows, self.groups, self.gate_up, self.down, out), out

    def backward(self, function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        grads = torch.empty_like(self.rows), torch.empty_like(self.gate_up), torch.empty_like(self.down)
        arguments = self.grad_out, self.rows, self.groups, self.gate_up, self.down, self.pre_activation
        return function(*arguments, *grads), *grads


def _grouped_implementations(case: _Experts) -> tuple[dict[str, ModuleType], dict[str, str]]:
    modules: dict[str, ModuleType] = {}
    left_out: dict[str, str] = {}
    if reason := why_no_triton(case.rows):
        left_out[TRITON] = reason
    else:
        from ds_remoe.kernels import grouped_swiglu_triton

        modules[TRITON] = grouped_swiglu_triton
    if grouped_swiglu_cpu.serves(case.rows, case.groups):
        modules[CPP] = grouped_swiglu_cpu
    else:
        left_out[CPP] = "the C++ kernel takes fp32 and fp64 on a CPU with a C++ compiler"
    if reason := grouped_swiglu_grouped_mm.why_not(case.rows, case.gate_up):
        left_out[GROUPED_MM] = reason
    else:
        modules[GROUPED_MM] = grouped_swiglu_grouped_mm
    return modules, left_out


def _swiglu_tensors(workload: Workload, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(settings.seed)
    grad = _normal((workload.pairs, workload.expert_width), 1.0, settings, generator)
    gate_up = _normal((workload.pairs, 2 * workload.expert_width), 1.0, settings, generator)
    weights = torch.rand(workload.pairs, generator=generator).to(settings.device, settings.weight_dtype)
    return grad, gate_up, weights


def _left_out_of_swiglu(gate_up: Tensor) -> dict[str, str]:
    reason = why_no_triton(gate_up)
    return {TRITON: reason} if reason else {}


def _normal(shape: tuple[int, ...], std: float, settings: Settings, generator: torch.Generator) -> Tensor:
    return (std * torch.randn(shape, generator=generator)).to(settings.device, settings.dtype)
