"""Adaptive L1 control of ReLU routing (paper eq. 6-11)."""

from __future__ import annotations

import math
import sys
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_remoe.config.problems import ConfigError
from ds_remoe.config.schema import SparsityConfig
from ds_remoe.config.typed import parse_sparsity
from ds_remoe.moe.statistics import RoutingReport, RoutingStatistics, StatisticsSlot, connect_all

_MOST = torch.finfo(torch.float32).max  # beyond it the routers' loss is infinite
_LEAST = 1e-30  # below it no gradient of the routers' loss is felt, and the way back takes hundreds of steps


class CoefficientRule(Protocol):
    """How the L1 coefficient follows the measured sparsity."""

    def next(self, coefficient: float, sparsity: float, target: float) -> float:
        """The coefficient of the next optimizer step."""
        ...


@dataclass(frozen=True)
class SignRule:
    """λ_{i+1} = λ_i · α^{sign((1 − k/E) − S_i)}, the paper's rule (7)."""

    alpha: float = 1.2

    def next(self, coefficient: float, sparsity: float, target: float) -> float:
        """One step of (7)."""
        if sparsity < target:
            return coefficient * self.alpha
        # From zero no factor leads back.
        return max(coefficient / self.alpha, sys.float_info.min) if sparsity > target else coefficient


class SparsitySlot:
    """A ReLU router's view of its controller: the coefficient on the device and the layer's share of the loss."""

    def __init__(self) -> None:
        self._controller: weakref.ref[SparsityController] | None = None
        self._warned = False

    def __reduce__(self) -> tuple[type[SparsitySlot], tuple[()]]:
        return type(self), ()  # a copy of the model is not controlled with the original

    @property
    def controlled(self) -> bool:
        """Whether there is a controller."""
        return self._controller is not None and self._controller() is not None

    def connect(self, controller: SparsityController) -> None:
        """Take λ, the number of layers and the regulariser from `controller` from now on."""
        self._controller = weakref.ref(controller)

    def loss(
        self, weight_sums_E: Tensor, counts_E: Tensor, tokens: Tensor | int, k: int, training: bool
    ) -> tuple[Tensor, Tensor]:
        """This layer's share of λ·L_reg, and its L_reg.

        Args:
            weight_sums_E: Σ_t R(x_t)_e, differentiable.
            counts_E: active tokens of each expert.
            tokens: T, on the host or as an int64 scalar on the device.
            k: wanted mean number of active experts a token.
            training: False makes no collective and warns of no missing controller.

        Returns:
            (λ/L · L_reg,l, L_reg,l) with L_reg,l = (1/T) Σ_t Σ_e f_e R(x_t)_e, so that the layers' first values add
            up to λ·L_reg of eq. (10), or (9), or the f² variant. Without a controller λ is the default λ_0 and L is 1.
        """
        controller = self._controller() if self._controller is not None else None
        if controller is None:
            if training and not self._warned:
                self._warned = True
                warnings.warn(
                    "a ReLU router is training without a SparsityController, so its L1 coefficient stays at "
                    f"{SparsityConfig().lambda_init} and its routing stays dense; use ds_remoe.initialize in place of "
                    "deepspeed.initialize, or make a SparsityController(model) and call its step() after engine.step()",
                    stacklevel=2,
                )
            config, scale = SparsityConfig(), torch.full_like(weight_sums_E[0].detach(), SparsityConfig().lambda_init)
        else:
            config, scale = controller.config, controller.layer_coefficient(weight_sums_E.device)
        everywhere = training and config.balance_scope == "data_parallel"
        regulariser = _regulariser(weight_sums_E, counts_E, tokens, k, config.regularizer, everywhere)
        return scale.to(regulariser.dtype) * regulariser, regulariser.detach()


def _regulariser(
    weight_sums_E: Tensor, counts_E: Tensor, tokens: Tensor | int, k: int, kind: str, all_ranks: bool
) -> Tensor:
    """(1/T) Σ_t Σ_e f_e R(x_t)_e with f of eq. (11), f² or 1; f over the tokens of all ranks where asked."""
    tokens = at_least_one(tokens)
    if kind == "l1":
        return weight_sums_E.sum() / tokens
    counts_E = counts_E.to(weight_sums_E.dtype)
    scope_tokens = tokens
    if all_ranks and dist.is_initialized():
        totals = torch.cat([counts_E, counts_E.new_ones(1) * tokens])
        dist.all_reduce(totals)
        counts_E, scope_tokens = totals[:-1], totals[-1]
    # f_e is counts_E · scale; the scale waits for the sum, where it is a number on the host or at least a scalar.
    scale = len(counts_E) / k / scope_tokens
    if kind == "l1_load_balanced_squared":
        counts_E, scale = counts_E.square(), scale * scale
    return (counts_E * weight_sums_E).sum() * (scale / tokens)


def at_least_one(tokens: Tensor | int) -> Tensor | int:
    """A number of tokens to divide by."""
    return tokens.clamp(min=1) if isinstance(tokens, Tensor) else max(tokens, 1)


class SparsityController:
    """Steers the ReLU routers of one model to the sparsity 1 − k/E with one L1 coefficient λ.

    It connects to every router of `model`, and steers the ReLU ones. The routers count on the device; `step`, once per
    optimizer step, sums the counts over all ranks and moves λ. `ds_remoe.initialize` does all that.

    Args:
        model: module that holds at least one ReLU router (in a `ds_remoe.MoE` or as a `ds_remoe.ReLUGate`).
        config: λ_0, α, regulariser and scope of the balance weight; also as a dict, as in `remoe.sparsity` of a JSON.
        rule: how λ moves; default: the paper's rule with config.alpha.

    Attributes:
        coefficient: λ that the next forward pass uses.
        history: (λ, S) of each optimizer step so far that moved λ by the rule, λ as it was in that step.
        target_sparsity: 1 − Σ_l k_l / Σ_l E_l.

    Raises:
        TypeError: config is of another kind.
        ValueError: config has an unknown key or a wrong value; the model has no ReLU router, or one in an `MOELayer` of
            another number of experts.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SparsityConfig | Mapping[str, Any] | None = None,
        *,
        rule: CoefficientRule | None = None,
    ) -> None:
        routers = find_routers(model)
        steered = [(index, router) for index, router in enumerate(routers) if hasattr(router, "control")]
        if not steered:
            raise ValueError(
                "SparsityController: the model has no ReLU router; build it with ds_remoe.MoE(router='relu') or "
                "put a ds_remoe.ReLUGate into its MOELayer"
            )
        for layer in model.modules():
            _check_gate(layer)
        self.config = _typed(config)
        self.rule: CoefficientRule = rule if rule is not None else SignRule(self.config.alpha)
        self.coefficient = self.config.lambda_init
        self.history: list[tuple[float, float]] = []
        self._at_limit = self._is_low = False
        self.num_layers = len(steered)
        self.target_sparsity = 1.0 - sum(r.k for _, r in steered) / sum(r.num_experts for _, r in steered)
        self._steered = {index for index, _ in steered}
        self.statistics: RoutingStatistics = connect_all((r.statistics, r.num_experts) for r in routers)
        self._device_coefficient: Tensor | None = None
        if any(router.control.controlled for _, router in steered):
            warnings.warn(
                "the model's ReLU routers have a SparsityController already; they follow the new one from now on, and "
                "λ of the other no longer moves. ds_remoe.initialize makes one: engine.remoe.controller",
                stacklevel=2,
            )
        for _, router in steered:
            router.control.connect(self)

    def layer_coefficient(self, device: torch.device) -> Tensor:
        """λ/L as an fp64 scalar on `device`; it changes in place, so no router ever reads λ from the host."""
        if self._device_coefficient is None or self._device_coefficient.device != device:
            with torch.inference_mode(False):  # an evaluation may come first
                self._device_coefficient = torch.tensor(
                    self.coefficient / self.num_layers, dtype=torch.float64, device=device
                )
        return self._device_coefficient

    def step(self, *, applied: bool = True, group: dist.ProcessGroup | None = None) -> RoutingReport | None:
        """Close one optimizer step: sum the statistics over all ranks and move λ.

        Args:
            applied: False where the optimizer skipped the step (overflow): the counts are dropped, λ stays.
            group: ranks that train together; default: the world. All of them must call.

        Returns:
            The step's routing report; None where nothing was routed.
        """
        report = self.statistics.reduce(group)
        if report is not None and applied:
            self.update(report)
        return report

    def update(self, report: RoutingReport) -> None:
        """Move λ by the rule for a step with this routing.

        It stays where a regulariser is NaN or infinite, and where it would become too large for fp32. The latter, and
        a λ that falls too low to be felt, is warned of.
        """
        layers = tuple(layer for layer in report.layers if layer.index in self._steered)
        if not layers or not all(math.isfinite(layer.aux_loss) for layer in layers):
            return
        sparsity = RoutingReport(layers).sparsity
        coefficient = self.rule.next(self.coefficient, sparsity, self.target_sparsity)
        if not abs(coefficient) <= _MOST:
            if not self._at_limit:
                warnings.warn(
                    f"λ stays at {self.coefficient:g} from optimizer step {len(self.history) + 1} on: the routing does "
                    f"not follow it (sparsity {sparsity:.3f}, target {self.target_sparsity:.3f}); add each layer's "
                    "l_aux to the loss, and leave the routers' weights (wg.weight) trainable",
                    stacklevel=2,
                )
            self._at_limit, coefficient = True, self.coefficient
        if 0 < coefficient < _LEAST and not self._is_low:
            self._is_low = True
            warnings.warn(
                f"λ has fallen to {coefficient:g} by optimizer step {len(self.history) + 1}, and the sparsity is still "
                f"{sparsity:.3f} (target {self.target_sparsity:.3f}): experts that get no token have no gradient that "
                "brings them back. Go back to an earlier checkpoint, with a lower learning rate, gradient clipping, "
                "or a smaller remoe.sparsity.alpha",
                stacklevel=2,
            )
        self.history.append((self.coefficient, sparsity))
        self._set_coefficient(coefficient)

    def state_dict(self) -> dict[str, Any]:
        """λ and its history at full precision."""
        return {"coefficient": self.coefficient, "history": list(self.history)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        missing = {"coefficient", "history"} - state.keys()
        if missing:
            raise KeyError(f"SparsityController.load_state_dict: the state lacks {sorted(missing)}")
        coefficient = float(state["coefficient"])
        if math.isnan(coefficient):
            raise ValueError("SparsityController.load_state_dict: coefficient = nan: must be a number")
        self.history = [(float(coefficient), float(sparsity)) for coefficient, sparsity in state["history"]]
        self._set_coefficient(max(-_MOST, min(coefficient, _MOST)))

    def _set_coefficient(self, coefficient: float) -> None:
        self.coefficient = coefficient
        if self._device_coefficient is not None:
            self._device_coefficient.fill_(coefficient / self.num_layers)


def _typed(config: Any) -> SparsityConfig:
    if config is None or isinstance(config, SparsityConfig):
        return config or SparsityConfig()
    if not isinstance(config, Mapping):
        raise TypeError(f'SparsityController: config = {config!r}: must be a dict, for example {{"alpha": 1.2}}')
    typed, problems = parse_sparsity(dict(config))
    if typed is None:
        raise ConfigError("SparsityController", problems)
    return typed


def _check_gate(layer: nn.Module) -> None:
    """DeepSpeed's `MOELayer` cuts whatever its gate routes into the experts that it has."""
    gate: Any = getattr(layer, "gate", None)
    local, ranks = (getattr(layer, name, None) for name in ("num_local_experts", "ep_size"))
    if not isinstance(getattr(gate, "control", None), SparsitySlot) or local is None or ranks is None:
        return
    if gate.num_experts != local * ranks:
        raise ValueError(
            f"{type(layer).__name__}: its {type(gate).__name__} has num_experts = {gate.num_experts}, but the layer "
            f"{local * ranks} (num_local_experts = {local} on each of ep_size = {ranks} ranks); make them equal"
        )


def find_routers(model: nn.Module) -> list[Any]:
    """The routers of a model, in its order: those that carry a `StatisticsSlot`."""
    return [m for m in model.modules() if isinstance(getattr(m, "statistics", None), StatisticsSlot)]
