"""Experts: stacked SwiGLU with one GEMM per expert and projection, and any other module one by one.

Both take a `Dispatched` and return the weighted results summed per row; both give every parameter a gradient in every
step, zeros where no token came, so that no rank waits for a gradient that another does not have.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_remoe.kernels.pair_groups import PairGroups, sum_dtype
from ds_remoe.moe.arguments import whole_number
from ds_remoe.moe.budget import ActivationBudget
from ds_remoe.moe.budgeted_swiglu import budgeted_swiglu
from ds_remoe.moe.dispatch import Dispatched

GATE, UP, DOWN = "gate_proj.weight", "up_proj.weight", "down_proj.weight"


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)), no biases: the dense FFN, and the shape of one stacked expert.

    Args:
        hidden_size: D.
        ffn_hidden_size: H.
    """

    def __init__(self, hidden_size: int, ffn_hidden_size: int) -> None:
        super().__init__()
        hidden_size = whole_number("hidden_size", hidden_size)
        ffn_hidden_size = whole_number("ffn_hidden_size", ffn_hidden_size)
        self.gate_proj = nn.Linear(hidden_size, ffn_hidden_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, ffn_hidden_size, bias=False)
        self.down_proj = nn.Linear(ffn_hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class StackedSwiGLU(nn.Module):
    """The SwiGLU experts of one rank as two stacked parameters.

    In a state dict they stand as DeepSpeed names experts: `{i}.gate_proj.weight` [H, D], `{i}.up_proj.weight` [H, D]
    and `{i}.down_proj.weight` [D, H].

    Args:
        hidden_size: D.
        ffn_hidden_size: H.
        num_local_experts: L.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        num_local_experts: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.gate_up = nn.Parameter(torch.empty(num_local_experts, 2 * ffn_hidden_size, hidden_size, **kwargs))
        self.down = nn.Parameter(torch.empty(num_local_experts, hidden_size, ffn_hidden_size, **kwargs))

    def forward(self, dispatched: Dispatched, budget: ActivationBudget | None = None) -> Tensor:
        """Σ over the active local experts of w · FFN_e(x), for each row: [M_rows, D].

        Args:
            dispatched: tokens and pairs of this rank.
            budget: pre-activations and received rows to keep for backward at most, taken from here; those of the
                pairs beyond it are recomputed, and a layer's rows beyond it sent again.

        Raises:
            TypeError: the tokens' dtype is not the experts', and no autocast says what to compute in.
        """
        rows: Tensor = dispatched.rows
        gate_up: Tensor = self.gate_up
        down: Tensor = self.down
        if torch.is_autocast_enabled(rows.device.type):
            dtype = torch.get_autocast_dtype(rows.device.type)
            rows, gate_up, down = rows.to(dtype), gate_up.to(dtype), down.to(dtype)
        elif rows.dtype != gate_up.dtype:
            raise TypeError(f"hidden_states are {rows.dtype}, but the experts {gate_up.dtype}; cast one of them")
        groups = PairGroups(dispatched.row_ids_M, dispatched.weights_M, dispatched.counts_L, dispatched.order)
        plan = dispatched.plan
        again = plan is not None and budget is not None and not budget.keep_rows(plan.rows_per_token)
        return budgeted_swiglu(rows, groups, gate_up, down, budget, resend=plan if again else None)

    @torch.no_grad()
    def copy_from(self, expert: SwiGLU) -> None:
        """Give every expert the weights of one."""
        self.gate_up.copy_(torch.cat([expert.gate_proj.weight, expert.up_proj.weight]).expand_as(self.gate_up))
        self.down.copy_(expert.down_proj.weight.expand_as(self.down))

    @torch.no_grad()
    def init_expert(self, index: int, std: float | None, generator: torch.Generator) -> None:
        """Draw one expert anew: normal(0, std), or uniform as nn.Linear does where std is None."""
        for matrix in (self.gate_up[index], self.down[index]):
            bound = 1 / math.sqrt(matrix.shape[-1])
            draw = torch.empty(matrix.shape, dtype=torch.float32, device="cpu")
            if std is None:
                draw.uniform_(-bound, bound, generator=generator)
            else:
                draw.normal_(0.0, std, generator=generator)
            matrix.copy_(draw)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        gate_up, down = (p if keep_vars else p.detach() for p in (self.gate_up, self.down))
        width = down.shape[-1]
        for i in range(down.shape[0]):
            destination[f"{prefix}{i}.{GATE}"] = gate_up[i, :width]
            destination[f"{prefix}{i}.{UP}"] = gate_up[i, width:]
            destination[f"{prefix}{i}.{DOWN}"] = down[i]

    @torch.no_grad()
    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        width = self.down.shape[-1]
        targets: dict[str, Tensor] = {}
        for i in range(self.down.shape[0]):
            targets[f"{prefix}{i}.{GATE}"] = self.gate_up[i, :width]
            targets[f"{prefix}{i}.{UP}"] = self.gate_up[i, width:]
            targets[f"{prefix}{i}.{DOWN}"] = self.down[i]
        for name, target in targets.items():
            if name not in state_dict:
                missing_keys.append(name)
            elif target.is_meta:
                error_msgs.append(
                    f"{name}: stacked experts on the meta device take no weights; call to_empty(device=...) before"
                )
            elif state_dict[name].shape != target.shape:
                error_msgs.append(
                    f"size mismatch for {name}: the checkpoint has {tuple(state_dict[name].shape)}, "
                    f"the model {tuple(target.shape)}"
                )
            else:
                target.copy_(state_dict[name])
        if strict:
            unexpected_keys.extend(k for k in state_dict if k.startswith(prefix) and k not in targets)


class ModuleExperts(nn.ModuleList):
    """Any expert module, one copy per local expert, weighted after its output.

    An expert without tokens is run on an empty batch, so its parameters have zero gradients.

    Args:
        expert: template; [n, D] → [n, D], or a tuple with that first.
        num_local_experts: L.
    """

    def __init__(self, expert: nn.Module, num_local_experts: int) -> None:
        super().__init__(copy.deepcopy(expert) for _ in range(num_local_experts))

    def forward(self, dispatched: Dispatched, budget: ActivationBudget | None = None) -> Tensor:
        """Σ over the active local experts of w · expert_e(x), for each row: [M_rows, D].

        Args:
            dispatched: tokens and pairs of this rank.
            budget: experts, in order, whose pairs no longer fit in it are run again in backward instead of keeping
                their activations. An expert is never cut, as it may look at all its tokens together.
        """
        rows = dispatched.rows
        out = rows.new_zeros(rows.shape, dtype=sum_dtype(rows))
        start = 0
        for expert, count in zip(self, dispatched.counts_L, strict=True):
            span = slice(start, start + count)
            start += count
            arguments = expert, rows, dispatched.row_ids_M[span], dispatched.weights_M[span]
            if budget is None or budget.take(count):
                weighted = _run_weighted(*arguments)
            else:
                weighted = checkpoint(_run_weighted, *arguments, use_reentrant=False)
            out = out.index_add(0, dispatched.row_ids_M[span], weighted.to(out.dtype))
        return out.to(rows.dtype)

    @torch.no_grad()
    def init_expert(self, index: int, std: float | None, generator: torch.Generator) -> None:
        """Draw one expert anew: normal(0, std) for matrices, or by its submodules' reset_parameters if std is None."""
        expert = self[index]
        if std is not None:
            for parameter in expert.parameters():
                if parameter.dim() > 1:
                    draw = torch.empty(parameter.shape, device="cpu")
                    parameter.copy_(draw.normal_(0.0, std, generator=generator))
            return
        resettable = [m for m in expert.modules() if callable(getattr(m, "reset_parameters", None))]
        covered = {id(p) for m in resettable for p in m.parameters()}
        left = [name for name, p in expert.named_parameters() if id(p) not in covered]
        if left and index == 0:
            warnings.warn(
                f"expert: nothing draws {', '.join(left)} anew, so all experts start with the same values there; "
                "give its module a reset_parameters() method, or say expert_init='copy'",
                stacklevel=2,
            )
        device = next((p.device for p in expert.parameters()), torch.device("cpu"))
        with _seeded(generator.initial_seed(), device):
            for module in resettable:
                cast(Any, module).reset_parameters()


def _run_weighted(expert: nn.Module, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    tokens = rows.index_select(0, ids)
    result = expert(tokens)
    result = result[0] if isinstance(result, tuple) else result
    if result.shape != tokens.shape:
        raise ValueError(
            f"expert: turns {list(tokens.shape)} into {list(result.shape)}; a row of hidden_size must come of each row"
        )
    return cast(Tensor, result * weights.unsqueeze(-1))


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Global random state from `seed` inside, on the CPU and on `device`; as it was afterwards."""
    cuda = [torch.cuda.default_generators[device.index]] if device.type == "cuda" else []
    generators = [torch.default_generator, *cuda]
    states = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
