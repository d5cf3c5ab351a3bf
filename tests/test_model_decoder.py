"""The decoder as a whole: shapes, causality, initialisation, checkpointing, errors."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from ds_remoe.config.schema import ModelConfig, MoEConfig
from ds_remoe.model.decoder import Decoder
from ds_remoe.model.init import derive_seed
from ds_remoe.moe.experts import SwiGLU
from ds_remoe.moe.layer import MoE

VOCAB = 61
Router = Literal["relu", "topk", "dense"]
ROUTERS: tuple[Router, ...] = ("dense", "topk", "relu")
pytestmark = pytest.mark.filterwarnings("ignore:a ReLU router is training without")


def model_config(**changes: object) -> ModelConfig:
    sizes = {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "ffn_hidden_size": 48,
        "seq_length": 16,
        "init_std": 0.2,
    }
    return ModelConfig.model_validate(sizes | changes)


def moe_config(router: Router, **changes: object) -> MoEConfig:
    return MoEConfig.model_validate({"router": router, "num_experts": 4, "k": 1, "granularity": 2} | changes)


def decoder(router: Router, seed: int = 0, **changes: object) -> Decoder:
    return Decoder(model_config(**changes), moe_config(router), VOCAB, seed)


def token_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("router", ROUTERS)
def test_outputs_with_and_without_labels(router: Router) -> None:
    model = decoder(router)
    tokens, labels = token_ids(3, 16), token_ids(3, 16, seed=1)
    logits = model(tokens).logits
    assert logits.shape == (3, 16, VOCAB)
    out = model(tokens, labels)
    assert out.logits is None
    for loss in (out.loss, out.lm_loss, out.aux_loss):
        assert loss.shape == ()
        assert loss.dtype == torch.float32
    log_probs = logits.double().log_softmax(-1)
    expected = -log_probs.gather(-1, labels[..., None]).mean()
    torch.testing.assert_close(out.lm_loss.double(), expected)
    assert torch.equal(out.loss, out.lm_loss + out.aux_loss)
    assert (out.aux_loss == 0) if router == "dense" else (out.aux_loss > 0)


@pytest.mark.parametrize("router", ROUTERS)
def test_evaluation_reports_the_auxiliary_loss(router: Router) -> None:
    model, tokens = decoder(router), token_ids(2, 8)
    trained = model(tokens, tokens).aux_loss
    torch.testing.assert_close(model.eval()(tokens, tokens).aux_loss, trained)


@pytest.mark.parametrize("router", ROUTERS)
def test_bf16_model_stays_close_to_fp32(router: Router) -> None:
    tokens, labels = token_ids(2, 16), token_ids(2, 16, seed=1)
    wide, narrow = decoder(router, init_std=0.02), decoder(router, init_std=0.02).bfloat16()
    out = narrow(tokens, labels)
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.lm_loss, wide(tokens, labels).lm_loss, rtol=0, atol=0.02)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in narrow.parameters())


@pytest.mark.parametrize("router", ROUTERS)
def test_later_tokens_do_not_change_earlier_logits(router: Router) -> None:
    model = decoder(router).double().eval()
    tokens = token_ids(2, 12)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % VOCAB
    before, after = model(tokens).logits, model(changed).logits
    torch.testing.assert_close(after[:, :7], before[:, :7], rtol=0, atol=1e-12)
    assert (after[:, 7:] - before[:, 7:]).abs().amax(dim=-1).min() > 1e-6


@pytest.mark.parametrize(("frequency", "moe_layers"), [(1, [0, 1, 2, 3, 4]), (2, [1, 3]), (3, [2]), (5, [4])])
def test_the_last_of_each_n_layers_is_moe(frequency: int, moe_layers: list[int]) -> None:
    model = Decoder(model_config(num_layers=5), moe_config("relu", layer_frequency=frequency), VOCAB, 0)
    assert [i for i, layer in enumerate(model.layers) if isinstance(layer.mlp, MoE)] == moe_layers


def test_shared_experts_are_added_beside_the_routed_ones() -> None:
    model = Decoder(model_config(num_layers=1), moe_config("relu", num_shared_experts=3), VOCAB, 0).double()
    layer = model.layers[0]
    assert layer.shared_mlp.down_proj.weight.shape == (32, 3 * 24)
    assert isinstance(layer.mlp, MoE)
    assert not any("shared" in name for name, _ in layer.mlp.named_parameters())
    seen: dict[str, Tensor] = {}
    layer.mlp.deepspeed_moe.register_forward_hook(lambda *call: seen.update(input=call[1][0], routed=call[2][0]))
    layer.shared_mlp.register_forward_hook(lambda *call: seen.update(shared=call[2]))
    layer.mlp_norm.register_forward_pre_hook(lambda *call: seen.update(residual=call[1][0]))
    layer.register_forward_hook(lambda *call: seen.update(out=call[2][0]))
    model(token_ids(2, 8))
    w = layer.shared_mlp
    h = seen["input"]
    expected = (nn.functional.silu(h @ w.gate_proj.weight.T) * (h @ w.up_proj.weight.T)) @ w.down_proj.weight.T
    torch.testing.assert_close(seen["shared"], expected)
    torch.testing.assert_close(seen["out"], seen["residual"] + seen["routed"] + seen["shared"])


def test_dense_router_has_one_full_width_ffn_in_each_layer() -> None:
    model = Decoder(model_config(), moe_config("dense", num_shared_experts=2), VOCAB, 0)
    for layer in model.layers:
        assert isinstance(layer.mlp, SwiGLU)
        assert layer.mlp.gate_proj.weight.shape == (48, 32)
        assert layer.shared_mlp is None


@pytest.mark.parametrize("router", ROUTERS)
def test_weights_follow_from_the_seed_alone(router: Router) -> None:
    torch.manual_seed(1)
    first = decoder(router, seed=5).state_dict()
    torch.manual_seed(2)
    second = decoder(router, seed=5).state_dict()
    other = decoder(router, seed=6).state_dict()
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert torch.equal(weight, second[name])
        assert "norm" in name or not torch.equal(weight, other[name])


def test_initial_weights_are_normal_and_norms_are_one() -> None:
    state = decoder("relu", hidden_size=64, ffn_hidden_size=128, init_std=0.03).state_dict()
    matrices = {name: w for name, w in state.items() if w.ndim == 2}
    for name, weight in state.items():
        if name not in matrices:
            assert torch.equal(weight, torch.ones_like(weight))
    for weight in matrices.values():
        spread = 0.03 / math.sqrt(weight.numel())
        assert abs(float(weight.mean())) < 5 * spread
        assert abs(float(weight.std()) - 0.03) < 5 * spread


def test_no_two_matrices_share_a_stream() -> None:
    heads = [tuple(w.flatten()[:8].tolist()) for w in decoder("relu").state_dict().values() if w.ndim == 2]
    assert len(set(heads)) == len(heads)
    places = [f"layers.{i}.mlp" for i in range(1000)]
    assert len({derive_seed(seed, place) for seed in (0, 1) for place in places}) == 2000


@pytest.mark.parametrize("router", ROUTERS)
def test_activation_checkpointing_changes_no_bit(router: Router) -> None:
    tokens, labels = token_ids(2, 16), token_ids(2, 16, seed=1)
    plain, recomputed = decoder(router), decoder(router, activation_checkpointing=True)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    recomputed.layers[0].register_forward_hook(count)
    results = []
    for model in (plain, recomputed):
        out = model(tokens, labels)
        out.loss.backward()
        results.append((out, [p.grad for p in model.parameters()]))
    (out_a, grads_a), (out_b, grads_b) = results
    assert torch.equal(out_a.loss, out_b.loss)
    assert torch.equal(out_a.aux_loss, out_b.aux_loss)
    for a, b in zip(grads_a, grads_b, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)
    assert calls == 2


def test_activation_checkpointing_recomputes_only_in_training() -> None:
    model, tokens = decoder("dense", activation_checkpointing=True), token_ids(1, 4)
    calls: list[None] = []
    model.layers[0].register_forward_hook(lambda *_: calls.append(None))
    model.eval()(tokens, tokens).loss.backward()
    with torch.no_grad():
        model.train()(tokens, tokens)
    assert len(calls) == 2


@pytest.mark.parametrize("router", ["topk", "relu"])
def test_a_few_steps_learn_the_batch(router: Router) -> None:
    model = decoder(router, num_layers=1, init_std=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sample = token_ids(2, 17)
    losses = []
    for _ in range(25):
        out = model(sample[:, :-1], sample[:, 1:])
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.lm_loss.item())
    assert losses[0] > 3.9
    assert losses[-1] < 1.5


@pytest.mark.parametrize(
    ("tokens", "labels", "error", "message"),
    [
        (torch.zeros(1, 17).long(), None, ValueError, r"tokens_BS: 17 positions exceed model\.seq_length = 16"),
        (torch.zeros(1, 4), None, TypeError, r"tokens_BS: dtype is torch\.float32"),
        (torch.zeros(1, 4).int(), None, TypeError, r"tokens_BS: dtype is torch\.int32"),
        (torch.zeros(4).long(), None, ValueError, r"tokens_BS: shape is \(4,\)"),
        (torch.zeros(0, 4).long(), None, ValueError, r"tokens_BS: shape is \(0, 4\)"),
        (torch.zeros(1, 4).long(), torch.zeros(1, 4), TypeError, r"labels_BS: dtype is torch\.float32"),
        (torch.zeros(1, 4).long(), torch.zeros(1, 3).long(), ValueError, r"labels_BS: shape \(1, 3\)"),
    ],
)
def test_wrong_inputs_are_named(tokens: Tensor, labels: Tensor | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        decoder("dense")(tokens, labels)


@pytest.mark.parametrize(
    ("moe", "vocab_size", "message"),
    [
        (moe_config("relu", granularity=5), VOCAB, r"moe\.granularity = 5: must divide model\.ffn_hidden_size = 48"),
        (moe_config("relu", layer_frequency=3), VOCAB, r"moe\.layer_frequency = 3: leaves no MoE layer"),
        (moe_config("dense"), 0, "vocab_size = 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(moe: MoEConfig, vocab_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decoder(model_config(), moe, vocab_size, 0)
