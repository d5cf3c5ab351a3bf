"""What `ds-remoe bench memory` measures: an MoE layer or a whole model whose routing has a given density.

The routing is made, not learnt: feature 0 of every token is positive, so that each router's weight for it sets how many
tokens an expert gets, the same share for each.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.moe.experts import Experts
from deepspeed.moe.sharded_moe import MOELayer
from torch import Tensor, nn

from ds_remoe.bench.memory_peak import Outputs
from ds_remoe.config.schema import ModelConfig, MoEConfig
from ds_remoe.model.decoder import Decoder
from ds_remoe.moe import MoE, ReLUGate, SparsityController, SwiGLU
from ds_remoe.moe.sparsity import find_routers

BUDGET, NO_BUDGET, STOCK = "with budget", "without budget", "DeepSpeed MOELayer, ReLUGate"
LAYER, MODEL = "layer", "model"
SEED = 0


@dataclass(frozen=True)
class Sizes:
    """Sizes of what is measured.

    Attributes:
        model, moe: as configured, with moe.router "relu" and moe.ep_size the number of ranks that measure.
        vocab_size: V, of the whole model.
        micro_batch: sequences of model.seq_length tokens.
        dtype: of parameters and activations.
        device: where it runs.
    """

    model: ModelConfig
    moe: MoEConfig
    vocab_size: int
    micro_batch: int
    dtype: torch.dtype
    device: torch.device

    @property
    def tokens(self) -> int:
        """T."""
        return self.micro_batch * self.model.seq_length


class Rig:
    """A module, its input, and a hold on its routing.

    Args:
        module: holds the routers and all parameters.
        forward: one forward pass.
        leaves: inputs with gradients.
    """

    def __init__(self, module: nn.Module, forward: Callable[[], Outputs], leaves: list[Tensor]) -> None:
        self.module, self.forward, self.leaves = module, forward, leaves
        self._controller, self._has_run = SparsityController(module), False

    def route(self, density: float) -> float:
        """Give every router the weights with which it activates this share of its pairs; the share that came out."""
        hooks = [
            router.register_forward_pre_hook(lambda module, inputs: _set_density(module.wg.weight, inputs[0], density))
            for router in find_routers(self.module)
        ]
        if self._has_run:
            self._controller.statistics.reduce()  # forget the passes before
        self._has_run = True
        with torch.no_grad():
            self.forward()
        for hook in hooks:
            hook.remove()
        report = self._controller.statistics.reduce()
        assert report is not None
        return 1.0 - report.sparsity


def rigs(kind: str, sizes: Sizes) -> Mapping[str, Callable[[], Rig]]:
    """Rival → what builds it, for a layer or a whole model; without a configured budget there is none "with".

    DeepSpeed's layer is a rival on one rank.
    """
    budgets = {BUDGET: sizes.moe.activation_budget, NO_BUDGET: None}
    if sizes.moe.activation_budget is None:
        del budgets[BUDGET]
    build = _layer if kind == LAYER else _model
    result: dict[str, Callable[[], Rig]] = {
        rival: lambda budget=budget: build(sizes, budget)  # type: ignore[misc]
        for rival, budget in budgets.items()
    }
    return {**result, STOCK: lambda: _stock_layer(sizes)} if kind == LAYER and sizes.moe.ep_size == 1 else result


def _layer(sizes: Sizes, budget: float | None) -> Rig:
    moe = sizes.moe
    torch.manual_seed(SEED)
    layer = MoE(
        sizes.model.hidden_size,
        _expert(sizes),
        moe.total_experts,
        moe.ep_size,
        k=moe.active_experts,
        activation_budget=budget,
    ).to(sizes.device, sizes.dtype)
    _spread_experts(layer, moe)
    x_TD, grad_TD = _tokens(sizes)

    def forward() -> Outputs:
        output_TD, aux_loss, _ = layer(x_TD)
        return [output_TD, aux_loss], [grad_TD, None]

    return Rig(layer, forward, [x_TD])


def _stock_layer(sizes: Sizes) -> Rig:
    experts, group = sizes.moe.total_experts, "ep_size_1"
    torch.manual_seed(SEED)
    gate = ReLUGate(sizes.model.hidden_size, experts, sizes.moe.active_experts)
    layer: Any = MOELayer(gate, Experts(_expert(sizes), experts, group), group, 1, experts)
    layer.to(sizes.device, sizes.dtype)
    x_TD, grad_TD = _tokens(sizes)

    def forward() -> Outputs:
        return [layer(x_TD, None), layer.l_aux], [grad_TD, None]

    return Rig(layer, forward, [x_TD])


def _model(sizes: Sizes, budget: float | None) -> Rig:
    moe = sizes.moe.model_copy(update={"activation_budget": budget})
    decoder = Decoder(sizes.model, moe, sizes.vocab_size, SEED)
    with torch.no_grad():
        decoder.embedding.weight[:, 0] = 1.0
    decoder.to(sizes.device, sizes.dtype)
    _spread_experts(decoder, moe)
    shape = (sizes.micro_batch, sizes.model.seq_length)
    tokens_BS, labels_BS = torch.randint(
        sizes.vocab_size, (2, *shape), generator=torch.Generator().manual_seed(SEED)
    ).to(sizes.device)

    def forward() -> Outputs:
        return [decoder(tokens_BS, labels_BS).loss], [None]

    return Rig(decoder, forward, [])


def _spread_experts(module: nn.Module, moe: MoEConfig) -> None:
    """Make the process groups, as the engine does."""
    for layer in module.modules():
        if moe.ep_size > 1 and isinstance(layer, MoE):
            with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints of each group that it makes
                layer.set_deepspeed_parallelism()


def _expert(sizes: Sizes) -> SwiGLU:
    return SwiGLU(sizes.model.hidden_size, sizes.model.d_ffn // sizes.moe.granularity)


def _tokens(sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Tokens and the gradient of the output, [T, D]."""
    shape = (2, sizes.tokens, sizes.model.hidden_size)
    x_TD, grad_TD = torch.randn(shape, generator=torch.Generator().manual_seed(SEED)).to(sizes.device, sizes.dtype)
    x_TD = x_TD.clone()
    x_TD[:, 0] = 1.0
    return x_TD.requires_grad_(), grad_TD.clone()


@torch.no_grad()
def _set_density(weight_ED: Tensor, x_TD: Tensor, density: float) -> None:
    """Set the weights for feature 0, positive in every token, so that each expert gets this share of the tokens."""
    weight_ED[:, 0] = 0
    scores_TE = (x_TD.float() @ weight_ED.float().t()) / x_TD[:, :1].float()
    descending = scores_TE.sort(dim=0, descending=True).values
    tokens, active = len(x_TD), round(density * len(x_TD))
    above = descending[active - 1] if active > 0 else descending[0] + 2
    below = descending[active] if active < tokens else descending[-1] - 2
    weight_ED[:, 0] = -(above + below) / 2
