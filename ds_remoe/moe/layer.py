"""The MoE layer: DeepSpeed's `MoE` by name, signature and results; ReMoE inside."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_remoe.deepspeed_compat import DeepSpeedMoE, launched_rank, mark_expert_parameters, require_ranks
from ds_remoe.deepspeed_groups import expert_parallel_group
from ds_remoe.moe.arguments import finite_number, whole_number
from ds_remoe.moe.budget import LEAST_BUDGET, ActivationBudget, settled_rows
from ds_remoe.moe.dispatch import LastDispatch, NodeGroups, combine, node_groups, start_dispatch
from ds_remoe.moe.experts import DOWN, GATE, UP, ModuleExperts, StackedSwiGLU, SwiGLU
from ds_remoe.moe.routers import ReLURouter, Router, TopKRouter
from ds_remoe.moe.routing import Routing

_CAPACITY_DEFAULTS: dict[str, Any] = {
    "capacity_factor": 1.0,
    "eval_capacity_factor": 1.0,
    "min_capacity": 4,
    "noisy_gate_policy": None,
    "use_rts": True,
    "use_tutel": False,
    "top2_2nd_expert_sampling": True,
}
_SWITCH_COEFFICIENT = 0.01
_WIRE_DTYPES = {"auto": None, "bf16": torch.bfloat16}


class MoE(DeepSpeedMoE):
    """A mixture-of-experts layer in place of `deepspeed.moe.layer.MoE` (eq. 1), never dropping a token.

    Args:
        hidden_size: D, of input and output.
        expert: the expert's module. A `ds_remoe.SwiGLU` as it is made becomes stacked parameters with grouped GEMMs;
            any other module [n, D] → [n, D] is copied per expert.
        num_experts: E.
        ep_size: ranks that share one set of experts; must divide num_experts.
        k: wanted mean number of active experts a token; with router "topk" the exact number.
        capacity_factor, eval_capacity_factor, min_capacity, noisy_gate_policy, use_rts, use_tutel,
            top2_2nd_expert_sampling: accepted for DeepSpeed's sake. Nothing is dropped here, so a value other than the
            default is answered with a warning.
        drop_tokens: accepted for DeepSpeed's sake; no token is ever dropped.
        use_residual: Residual MoE (arXiv 2201.05596): add a dense copy of the expert, mixed by a learnt coefficient.
        enable_expert_tensor_parallelism: not supported; True is refused.
        router: "relu" (ReMoE) or "topk" (dropless Softmax-TopK).
        aux_loss_coefficient: weight of the Switch loss of router "topk".
        expert_init: "redraw" draws each expert anew from a stream of its own, by `reset_parameters` of its submodules,
            so that experts start different from each other, and the same at any ep_size where the ranks' seeds agree
            and EP groups are consecutive ranks (DeepSpeed's default); "copy" keeps the weights of `expert`, as
            DeepSpeed does.
        activation_budget: pre-activations of the experts that exist at a time, as a multiple of the k·T pairs of T
            tokens; those of the pairs beyond it are recomputed in backward, and with expert parallelism the rows of a
            layer beyond it are sent again (see `ds_remoe.moe.budget`). None keeps all. The layers of a model may share
            theirs, see `forward`.
        wire_dtype: in which tokens, results and their gradients cross from rank to rank: "auto", as they are, or
            "bf16", rounded while everything is computed in the wider dtype. Needs ep_size > 1.
        hierarchical_all_to_all: a token crosses to another node once, and is spread there; for expert-parallel groups
            over several nodes. Needs ep_size > 1, and the ranks of a node in LOCAL_WORLD_SIZE or LOCAL_SIZE.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of its range; the message has name and value.
    """

    def __init__(
        self,
        hidden_size: int,
        expert: nn.Module,
        num_experts: int = 1,
        ep_size: int = 1,
        k: int = 1,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0,
        min_capacity: int = 4,
        use_residual: bool = False,
        noisy_gate_policy: str | None = None,
        drop_tokens: bool = True,
        use_rts: bool = True,
        use_tutel: bool = False,
        enable_expert_tensor_parallelism: bool = False,
        top2_2nd_expert_sampling: bool = True,
        *,
        router: Literal["relu", "topk"] = "relu",
        aux_loss_coefficient: float = _SWITCH_COEFFICIENT,
        expert_init: Literal["redraw", "copy"] = "redraw",
        activation_budget: float | None = 1.25,
        wire_dtype: Literal["auto", "bf16"] = "auto",
        hierarchical_all_to_all: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        hidden_size = whole_number("hidden_size", hidden_size)
        num_experts = whole_number("num_experts", num_experts)
        ep_size = whole_number("ep_size", ep_size)
        if not isinstance(expert, nn.Module):
            raise TypeError(f"expert = {expert!r}: must be a module, such as ds_remoe.SwiGLU(hidden_size, width)")
        if num_experts % ep_size:
            raise ValueError(f"ep_size = {ep_size}: must divide num_experts = {num_experts}")
        if enable_expert_tensor_parallelism:
            raise ValueError("enable_expert_tensor_parallelism = True: not supported; use a larger ep_size instead")
        given = {name: value for name, value in locals().items() if name in _CAPACITY_DEFAULTS}
        without_effect = [f"{n}={v!r}" for n, v in given.items() if v != _CAPACITY_DEFAULTS[n]]
        if without_effect:
            warnings.warn(
                f"ds_remoe.MoE drops no token and has no capacity, so {', '.join(without_effect)} has no effect",
                stacklevel=2,
            )
        self.use_residual = use_residual
        self.enable_expert_tensor_parallelism = False
        self.ep_size = ep_size
        self.expert_group_name = f"ep_size_{ep_size}"
        self.num_experts = num_experts
        self.num_local_experts = num_experts // ep_size

        gate: Router
        if router == "relu":
            gate = ReLURouter(hidden_size, num_experts, k)
            if aux_loss_coefficient != _SWITCH_COEFFICIENT:
                warnings.warn(
                    f"ds_remoe.MoE: aux_loss_coefficient={aux_loss_coefficient!r} has no effect with router='relu', "
                    "whose coefficient is λ of the SparsityController",
                    stacklevel=2,
                )
        elif router == "topk":
            gate = TopKRouter(hidden_size, num_experts, k, aux_loss_coefficient)
        else:
            raise ValueError(f"router = {router!r}: must be 'relu' or 'topk'")
        if expert_init not in ("redraw", "copy"):
            raise ValueError(f"expert_init = {expert_init!r}: must be 'redraw' or 'copy'")
        if activation_budget is not None:
            why = f", as {LEAST_BUDGET:.0%} of the expected pairs go through at once; None keeps every pre-activation"
            activation_budget = finite_number("activation_budget", activation_budget, LEAST_BUDGET, why)
        if expert_init == "copy" and any(p.is_meta for p in expert.parameters()):
            raise ValueError("expert_init = 'copy': the expert is on the meta device and has no weights to copy")
        if not isinstance(hierarchical_all_to_all, bool):
            raise TypeError(f"hierarchical_all_to_all = {hierarchical_all_to_all!r}: must be True or False")
        if wire_dtype not in _WIRE_DTYPES:
            raise ValueError(f"wire_dtype = {wire_dtype!r}: must be 'auto' or 'bf16'")
        if ep_size == 1 and wire_dtype != "auto":
            raise ValueError(f"wire_dtype = {wire_dtype!r}: with ep_size = 1 no token leaves its rank; use 'auto'")
        if ep_size == 1 and hierarchical_all_to_all:
            raise ValueError("hierarchical_all_to_all = True: with ep_size = 1 no token leaves its rank; use False")
        self.hierarchical_all_to_all = hierarchical_all_to_all
        experts = _build_experts(expert, hidden_size, self.num_local_experts)
        self.deepspeed_moe = RoutedExperts(gate, experts, activation_budget, _WIRE_DTYPES[wire_dtype])
        mark_expert_parameters(self.deepspeed_moe.experts, self.expert_group_name)
        if expert_init == "redraw":
            # From the global generator, so that the layers of a model differ and equally seeded ranks agree.
            self._init_experts(std=None, seed=int(torch.randint(2**62, (), device="cpu")))
        if use_residual:
            self.mlp = expert
            self.coefficient = nn.Linear(hidden_size, 2)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy's experts are marked again, as deepcopy drops the attributes of parameters; its group is looked up."""
        super().__setstate__(state)
        mark_expert_parameters(self.deepspeed_moe.experts, self.expert_group_name)
        group = expert_parallel_group(self.expert_group_name)
        # Groups for a hierarchical exchange may still have to be made, which all ranks do together.
        if group is not None and not self.hierarchical_all_to_all:
            self.deepspeed_moe._set_ep_group(group)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Make or find the process groups; the engine calls this on every rank."""
        require_ranks(self.ep_size)
        super().set_deepspeed_parallelism(use_data_before_expert_parallel_)
        if self.hierarchical_all_to_all:
            assert self.deepspeed_moe.ep_group is not None
            self.deepspeed_moe.nodes = node_groups(self.deepspeed_moe.ep_group)

    def forward(
        self,
        hidden_states: Tensor,
        used_token: Tensor | None = None,
        *,
        shared_expert: Callable[[Tensor], Tensor] | None = None,
        budget: ActivationBudget | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pass tokens through their active experts.

        Args:
            hidden_states: [..., D].
            used_token: one entry a token; where zero, the token passes no expert.
            shared_expert: [..., D] → [..., D], for every token; its result is added to the output. It is computed while
                tokens are on their way between ranks, and its backward while their gradients are.
            budget: what this layer's experts take their pre-activations and rows from in place of activation_budget,
                for layers that share one in a forward pass.

        Returns:
            output [..., D]; l_aux, the layer's share of the auxiliary loss, coefficient included (fp32 scalar): add
            the layers' values to the loss; exp_counts, int64 [E], active tokens of each expert on this rank.
        """
        dense: Tensor | None = None
        shared: Tensor | None = None

        def meanwhile() -> None:
            nonlocal dense, shared
            if self.use_residual:
                result = self.mlp(hidden_states)
                dense = result[0] if isinstance(result, tuple) else result
            if shared_expert is not None:
                shared = shared_expert(hidden_states)

        output, l_aux, exp_counts = self.deepspeed_moe(hidden_states, used_token, meanwhile, budget)
        if dense is not None:
            share = F.softmax(self.coefficient(hidden_states), dim=-1)
            output = output * share[..., 0:1] + dense * share[..., 1:]
        return output if shared is None else output + shared, l_aux, exp_counts

    @torch.no_grad()
    def init_weights(self, std: float, seed: int) -> None:
        """Draw router and experts from normal(0, std), the same at any ep_size and on any rank."""
        weight = self.deepspeed_moe.gate.wg.weight
        weight.copy_(torch.empty(weight.shape, device="cpu").normal_(0.0, std, generator=_stream(seed, 0)))
        self._init_experts(std, seed)

    def _init_experts(self, std: float | None, seed: int) -> None:
        # The engine copies experts from the first EP group to its replicas, so the global rank serves as EP rank.
        first = launched_rank() * self.num_local_experts if self.ep_size > 1 else 0
        for index in range(self.num_local_experts):
            self.deepspeed_moe.experts.deepspeed_experts.init_expert(index, std, _stream(seed, 1 + first + index))


class RoutedExperts(nn.Module):
    """Router, dispatch, experts and combine; named so that state dicts read as DeepSpeed's `MOELayer`'s."""

    def __init__(
        self,
        gate: Router,
        experts: Experts,
        activation_budget: float | None = None,
        wire_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gate = gate
        self.experts = experts
        self.activation_budget = activation_budget
        self.wire_dtype = wire_dtype
        self.ep_group: torch.distributed.ProcessGroup | None = None
        self.nodes: NodeGroups | None = None
        self._last = LastDispatch()

    def __getstate__(self) -> dict[str, Any]:
        """Process groups are of this process and cannot be copied."""
        return {**super().__getstate__(), "ep_group": None, "nodes": None}

    def _set_ep_group(self, group: torch.distributed.ProcessGroup) -> None:
        self.ep_group = group

    def forward(
        self,
        hidden_states: Tensor,
        used_token: Tensor | None = None,
        meanwhile: Callable[[], None] | None = None,
        budget: ActivationBudget | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[..., D] → (output [..., D], auxiliary loss, counts [E]); `meanwhile` runs while tokens are on their way."""
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        routing, aux_loss = self.gate(x_TD, used_token)
        if self.ep_group is None and routing.mask_TE.shape[1] != self.experts.num_local_experts:
            raise RuntimeError(
                f"MoE with ep_size = {routing.mask_TE.shape[1] // self.experts.num_local_experts}: the expert-parallel "
                "group does not exist yet; call ds_remoe.initialize (or layer.set_deepspeed_parallelism()) first"
            )
        finish = start_dispatch(
            x_TD, routing, self.ep_group, wire_dtype=self.wire_dtype, nodes=self.nodes, last=self._last
        )
        if meanwhile is not None:
            meanwhile()
        dispatched = finish()
        own = self._own_budget(routing) if budget is None else budget
        out_MD = self.experts.deepspeed_experts(dispatched, own)
        output = combine(out_MD, dispatched.plan, x_TD.shape[0])
        return output.view(hidden_states.shape), aux_loss, routing.counts_E

    def _own_budget(self, routing: Routing) -> ActivationBudget | None:
        if self.activation_budget is None:
            return None
        tokens, num_experts = routing.mask_TE.shape
        rows = settled_rows(self.gate.k, num_experts, num_experts // self.experts.num_local_experts)
        # With expert parallelism each rank has as many tokens as this one, so k·T pairs are an even share.
        return ActivationBudget.of(self.activation_budget, self.gate.k * tokens, expected_rows=rows)


class Experts(nn.Module):
    """Holds the experts under DeepSpeed's name for them."""

    def __init__(self, deepspeed_experts: StackedSwiGLU | ModuleExperts, num_local_experts: int) -> None:
        super().__init__()
        self.deepspeed_experts = deepspeed_experts
        self.num_local_experts = num_local_experts


def _build_experts(expert: nn.Module, hidden_size: int, num_local_experts: int) -> Experts:
    if type(expert) is not SwiGLU or not _is_plain(expert):
        return Experts(ModuleExperts(expert, num_local_experts), num_local_experts)
    down = expert.down_proj.weight
    if down.shape[0] != hidden_size:
        raise ValueError(f"expert: its width is {down.shape[0]}, but hidden_size = {hidden_size}")
    device = torch.get_default_device() if down.is_meta else down.device
    stacked = StackedSwiGLU(hidden_size, down.shape[1], num_local_experts, device, down.dtype)
    if not down.is_meta:
        stacked.copy_from(expert)
    return Experts(stacked, num_local_experts)


def _is_plain(expert: SwiGLU) -> bool:
    """Nothing was added that stacked weights would leave out: biases or adapters, frozen weights, hooks, a forward."""
    names = {name for name, parameter in expert.named_parameters() if parameter.requires_grad}
    changed = any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
        for module in expert.modules()
    )
    return names == {GATE, UP, DOWN} == dict(expert.named_parameters()).keys() and not changed


def _stream(seed: int, index: int) -> torch.Generator:
    """An independent random stream for one expert (or the router, index 0)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + index * 0xD1B54A32D192ED03) & (2**63 - 1)
    return torch.Generator().manual_seed(mixed)
