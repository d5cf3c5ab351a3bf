"""The sparsity controller against the paper's arithmetic (eq. 6-11)."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ds_remoe.config.schema import SparsityConfig
from ds_remoe.moe import MoE, ReLUGate, SwiGLU
from ds_remoe.moe.routers import ReLURouter, TopKRouter
from ds_remoe.moe.sparsity import SignRule, SparsityController
from ds_remoe.moe.statistics import LayerRouting, RoutingReport, connect_all

D, T = 6, 11


def routers(*shapes: tuple[int, int]) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(ReLURouter(D, experts, k) for experts, k in shapes)


def tokens(seed: int, count: int = T) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("sparsity", "expected"),
    [(0.5, 1e-8 * 1.2), (0.9, 1e-8 / 1.2), (0.875, 1e-8)],
    ids=["dense", "sparse", "on target"],
)
def test_the_rule_is_equation_7(sparsity: float, expected: float) -> None:
    assert SignRule(1.2).next(1e-8, sparsity, 0.875) == expected


@pytest.mark.parametrize("regularizer", ["l1", "l1_load_balanced", "l1_load_balanced_squared"])
def test_layer_losses_add_up_to_the_regulariser(regularizer: str) -> None:
    """λ·L_reg of (9), (10) and the f² variant, written out over layers, tokens and experts."""
    model = routers((5, 2), (5, 2), (5, 2))
    config = SparsityConfig(lambda_init=0.3, regularizer=regularizer)
    controller = SparsityController(model, config)
    expected, losses = 0.0, torch.zeros(())
    for layer, router in enumerate(model):
        routing, loss = router(tokens(layer))
        losses = losses + loss
        weights = torch.relu(tokens(layer).double() @ router.wg.weight.detach().double().t())
        for e in range(5):
            active = int((weights[:, e] > 0).sum())
            f = {"l1": 1.0}.get(regularizer, 5 / (2 * T) * active)
            f = f * f if regularizer.endswith("squared") else f
            expected += 0.3 * f * float(weights[:, e].sum()) / (3 * T)
        assert routing.counts_E.tolist() == (weights > 0).sum(0).tolist()
    assert float(losses.detach()) == pytest.approx(expected, rel=1e-6)
    assert controller.coefficient == 0.3


def test_the_balance_weight_carries_no_gradient() -> None:
    model = routers((4, 1))
    controller = SparsityController(model, SparsityConfig(lambda_init=1.0))
    x = tokens(0)
    _, loss = model[0](x)
    (loss / controller.coefficient).backward()
    active = (x @ model[0].wg.weight.t() > 0).double()
    f = 4 / T * active.sum(0)
    expected = (f[:, None] * (active.t() @ x.double())) / T
    torch.testing.assert_close(model[0].wg.weight.grad.double(), expected.detach(), rtol=1e-5, atol=1e-7)


def test_sparsity_is_over_layers_and_micro_batches() -> None:
    model = routers((4, 1), (8, 2))
    controller = SparsityController(model)
    active = pairs = 0
    for seed, count in ((0, 3), (1, 17), (2, 0), (3, 8)):
        for router in model:
            routing, _ = router(tokens(seed, count))
            active += int(routing.counts_E.sum())
            pairs += count * router.num_experts
    report = controller.step()
    assert report is not None
    assert report.sparsity == pytest.approx(1 - active / pairs, abs=1e-12)
    assert controller.target_sparsity == 1 - 3 / 12
    assert [layer.tokens for layer in report.layers] == [28, 28]
    assert controller.history == [(1e-8, report.sparsity)]


def test_lambda_moves_once_a_step_and_not_on_a_skipped_one() -> None:
    model = routers((8, 1))
    controller = SparsityController(model, SparsityConfig(lambda_init=1.0, alpha=2.0))
    model[0](tokens(0))
    controller.step(applied=False)
    assert (controller.coefficient, controller.history) == (1.0, [])
    assert controller.step() is None, "the skipped step's counts stayed"
    model[0](tokens(0))
    model[0](tokens(1))
    controller.step()
    assert controller.coefficient in (0.5, 2.0)
    assert len(controller.history) == 1


def test_the_device_coefficient_follows() -> None:
    """The next forward pass uses the new λ, though the router never asks the host for it."""
    model = routers((4, 1))
    controller = SparsityController(model, SparsityConfig(lambda_init=1e-3, alpha=1.5))
    _, first = model[0](tokens(0))
    report = controller.step()
    assert report is not None
    _, second = model[0](tokens(0))
    ratio = 1.5 if report.sparsity < controller.target_sparsity else 1 / 1.5
    assert float(second / first) == pytest.approx(ratio, rel=1e-6)


def test_evaluation_and_recomputation_are_not_counted() -> None:
    model = routers((4, 1))
    controller = SparsityController(model)
    model.eval()
    model[0](tokens(0))
    assert controller.step() is None
    model.train()

    def routed(x: torch.Tensor) -> torch.Tensor:
        routing, loss = model[0](x)
        return routing.weights_TE.sum() + loss

    for reentrant in (False, True):
        x = tokens(0).requires_grad_()
        torch.utils.checkpoint.checkpoint(routed, x, use_reentrant=reentrant).backward()
        report = controller.step()
        assert report is not None
        assert report.layers[0].tokens == T, f"reentrant={reentrant}"


def test_an_evaluation_in_training_mode_is_told() -> None:
    """Its passes cannot be told from the first ones of reentrant checkpointing when they run."""
    model = routers((4, 1), (4, 1))
    controller = SparsityController(model)
    for reentrant in (False, True):
        x = tokens(0).requires_grad_()
        torch.utils.checkpoint.checkpoint(lambda x: model[0](x)[1], x, use_reentrant=reentrant).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        controller.step()
    with torch.no_grad():
        for router in model:
            router(tokens(0))
    with pytest.warns(UserWarning, match=r"2 forward passes .* no gradients.* Call model\.eval\(\)"):
        controller.step()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.filterwarnings("ignore:1 forward passes")
def test_an_evaluation_in_inference_mode_may_come_first(training: bool) -> None:
    model = routers((4, 1)).train(training)
    controller = SparsityController(model)
    with torch.inference_mode():
        model[0](tokens(0))
    model.train()
    model[0](tokens(0))[1].backward()
    controller.step()
    assert controller.coefficient != 1e-8
    assert len(controller.history) == 1


def test_state_survives_exactly() -> None:
    first = SparsityController(routers((4, 1)), SparsityConfig(lambda_init=1e-8 / 3))
    for sparsity in (0.1, 0.99, 0.5, 0.75):
        active = round((1 - sparsity) * 400)
        first.update(RoutingReport((LayerRouting(0, 100, (active, 0, 0, 0), (1.0,) * 4, 0.5),)))
    second = SparsityController(routers((4, 1)))
    second.load_state_dict(first.state_dict())
    assert second.coefficient == first.coefficient
    assert second.history == first.history
    with pytest.raises(KeyError, match="history"):
        second.load_state_dict({"coefficient": 1.0})


@pytest.mark.parametrize("router", [ReLURouter(D, 4, 1), TopKRouter(D, 4, 1)])
def test_a_step_that_is_not_finite_leaves_lambda(router: ReLURouter | TopKRouter) -> None:
    model = nn.ModuleList([*routers((4, 1)), router])
    controller = SparsityController(model)
    x = tokens(0)
    x[2, 1] = math.nan
    for module in model:
        module(x)
    report = controller.step()
    assert report is not None
    assert all(math.isnan(layer.aux_loss) for layer in report.layers)
    assert (controller.coefficient, controller.history) == (1e-8, [])
    model[0](tokens(0))
    controller.step()
    assert len(controller.history) == 1


def test_lambda_that_nothing_follows_does_not_become_infinite() -> None:
    controller = SparsityController(routers((4, 1)), SparsityConfig(lambda_init=1e37, alpha=10))
    dense = RoutingReport((LayerRouting(0, 100, (100,) * 4, (1.0,) * 4, 0.5),))
    controller.update(dense)
    with pytest.warns(
        UserWarning, match=r"λ stays at 1e\+38 from optimizer step 2 on.* add each layer's l_aux to the loss"
    ):
        controller.update(dense)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        controller.update(dense)
    assert controller.coefficient == pytest.approx(1e38)
    assert len(controller.history) == 3
    controller.load_state_dict({"coefficient": math.inf, "history": []})
    assert math.isfinite(controller.coefficient)
    with pytest.raises(ValueError, match="coefficient = nan"):
        controller.load_state_dict({"coefficient": math.nan, "history": []})


def test_lambda_that_falls_without_an_end_is_told_once() -> None:
    controller = SparsityController(routers((4, 1)), SparsityConfig(lambda_init=1e-29, alpha=100))
    without_tokens = RoutingReport((LayerRouting(0, 100, (0,) * 4, (0.0,) * 4, 0.5),))
    with pytest.warns(UserWarning, match=r"λ has fallen to 1e-31 by optimizer step 1.* still 1\.000 \(target 0\.750\)"):
        controller.update(without_tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        controller.update(without_tokens)


def test_lambda_comes_back_from_nearly_zero() -> None:
    rule, coefficient = SignRule(1e100), 1.0
    for _ in range(5):
        coefficient = rule.next(coefficient, 0.9, 0.5)
    assert rule.next(coefficient, 0.1, 0.5) > 0


def test_another_rule_can_stand_beside_the_papers() -> None:
    class Proportional:
        def next(self, coefficient: float, sparsity: float, target: float) -> float:
            return coefficient * math.exp(target - sparsity)

    model = routers((4, 1))
    controller = SparsityController(model, rule=Proportional())
    model[0](tokens(0))
    report = controller.step()
    assert report is not None
    assert controller.coefficient == 1e-8 * math.exp(0.75 - report.sparsity)


def test_a_router_without_controller_says_so_once() -> None:
    model = routers((4, 1))
    with pytest.warns(UserWarning, match=r"ds_remoe\.initialize"):
        model[0](tokens(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model[0](tokens(0))


def test_the_settings_may_be_a_dict() -> None:
    controller = SparsityController(routers((4, 1)), {"alpha": 1.5, "lambda_init": 0.25})
    assert controller.config == SparsityConfig(alpha=1.5, lambda_init=0.25)
    assert controller.rule == SignRule(1.5)
    with pytest.raises(ValueError, match=r"remoe\.sparsity\.alhpa = 1\.5: unknown key; did you mean alpha\?"):
        SparsityController(routers((4, 1)), {"alhpa": 1.5})
    with pytest.raises(TypeError, match=r"config = 1\.5: must be a dict"):
        SparsityController(routers((4, 1)), 1.5)


def test_a_model_without_relu_routers_is_refused() -> None:
    with pytest.raises(ValueError, match="no ReLU router"):
        SparsityController(nn.Linear(3, 3))


@pytest.mark.parametrize("k", [1, 3])
def test_topk_router_is_equation_2_with_the_switch_loss(k: int) -> None:
    torch.manual_seed(0)
    router = TopKRouter(D, 5, k, aux_loss_coefficient=0.01)
    statistics = connect_all([(router.statistics, 5)])
    x = tokens(0)
    routing, loss = router(x)
    probs = torch.softmax(x.double() @ router.wg.weight.double().t(), dim=-1)
    best = probs.topk(k, dim=-1).indices
    assert routing.mask_TE.sum(dim=1).eq(k).all()
    assert routing.mask_TE.gather(1, best).all()
    torch.testing.assert_close(routing.weights_TE.double(), probs, rtol=1e-5, atol=1e-7)
    share = torch.bincount(best.flatten(), minlength=5).double() / (k * T)
    assert float(loss) == pytest.approx(float(0.01 * 5 * (share * probs.mean(0)).sum()), rel=1e-5)
    report = statistics.reduce()
    assert report is not None
    assert report.active_experts_per_token == k


def test_unused_tokens_pass_no_expert() -> None:
    for router in (routers((4, 2))[0], TopKRouter(D, 4, 2)):
        router.eval()
        used = torch.tensor([1, 0] * 5 + [1])
        routing, _ = router(tokens(0), used)
        assert not routing.mask_TE[1::2].any()
        assert routing.mask_TE[0::2].any()


def test_unused_tokens_count_nowhere() -> None:
    """Padding changes neither the measured sparsity nor the losses."""
    model = nn.ModuleList([ReLURouter(D, 4, 2), TopKRouter(D, 4, 2)])
    controller = SparsityController(model)
    x, padded = tokens(0, 5), torch.cat([tokens(0, 5), tokens(1, 45)])
    used = torch.arange(50) < 5
    plain = [router(x)[1] for router in model]
    first = controller.step()
    masked = [router(padded, used)[1] for router in model]
    second = controller.step()
    assert first is not None
    assert second is not None
    assert [layer.active for layer in first.layers] == [layer.active for layer in second.layers]
    assert [layer.tokens for layer in second.layers] == [5, 5]
    torch.testing.assert_close(torch.stack(plain)[1], torch.stack(masked)[1])
    assert controller.history[1][1] == controller.history[0][1]


def test_a_layer_that_does_not_run_leaves_the_others_steered() -> None:
    model = routers((4, 1), (4, 1))
    controller = SparsityController(model)
    model[1](tokens(0))
    report = controller.step()
    assert report is not None
    assert [layer.index for layer in report.layers] == [1]
    assert controller.history == [(1e-8, report.sparsity)]


def test_only_relu_layers_are_steered_and_all_are_reported() -> None:
    model = nn.ModuleList([TopKRouter(D, 4, 1), *routers((4, 1))])
    controller = SparsityController(model)
    for router in model:
        router(tokens(0))
    report = controller.step()
    assert report is not None
    assert len(report.layers) == 2
    assert controller.history[0][1] == report.layers[1].sparsity
    assert report.layers[0].sparsity == 0.75


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_is_on_its_own(copied: Callable[[nn.Module], nn.ModuleList]) -> None:
    model = routers((4, 1))
    controller = SparsityController(model)
    twin = copied(model)
    with pytest.warns(UserWarning, match="without a SparsityController"):
        twin[0](tokens(0))
    assert controller.step() is None
    assert SparsityController(twin).target_sparsity == 0.75


def test_logits_stay_in_fp32_under_autocast() -> None:
    router = routers((4, 1))[0].eval()
    expected, _ = router(tokens(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, _ = router(tokens(0))
    assert torch.equal(got.weights_TE, expected.weights_TE)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((D, 4, 0), ValueError, "k = 0: must be at least 1"),
        ((D, 4, 5), ValueError, "k = 5: must be between 1 and num_experts = 4"),
        ((D, 4, 1.5), TypeError, r"k = 1\.5: must be a whole number, not float"),
        ((D, 4, "1"), TypeError, "k = '1': must be a whole number, not str"),
        ((D, 4, True), TypeError, "k = True: must be a whole number, not bool"),
        ((D, 4.0, 1), TypeError, r"num_experts = 4\.0: must be a whole number"),
        ((D, 0, 1), ValueError, "num_experts = 0: must be at least 1"),
        (("6", 4, 1), TypeError, "model_dim = '6': must be a whole number"),
    ],
)
def test_wrong_sizes_of_a_gate_are_refused(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ReLUGate(*arguments)


def test_a_whole_number_may_be_numpys() -> None:
    gate = ReLUGate(np.int64(D), np.int32(4), np.int64(1))
    assert [type(gate.num_experts), type(gate.k)] == [int, int]


def test_a_second_controller_of_the_same_routers_says_so() -> None:
    model = nn.ModuleList([MoE(4, SwiGLU(4, 3), num_experts=4)])
    first = SparsityController(model)
    with pytest.warns(UserWarning, match="have a SparsityController already"):
        SparsityController(model)
    del first
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SparsityController(model)


@pytest.mark.parametrize("router", [ReLURouter(4, 4, 1), TopKRouter(4, 4, 1)])
@pytest.mark.parametrize("length", [1, 4])
def test_used_token_of_another_length_is_refused(router: ReLURouter | TopKRouter, length: int) -> None:
    with pytest.raises(ValueError, match=rf"used_token has shape \({length},\).* each of the 3 tokens"):
        router(torch.randn(3, 4), torch.ones(length))
