"""Generation: the cache changes nothing, sampling does what its parameters say, errors are named."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from ds_remoe.config.schema import ModelConfig, MoEConfig
from ds_remoe.model.attention import KVCache
from ds_remoe.model.decoder import Decoder
from ds_remoe.model.generation import generate

VOCAB = 41
Router = Literal["relu", "topk", "dense"]
ROUTERS: tuple[Router, ...] = ("dense", "topk", "relu")


def decoder(router: Router = "dense") -> Decoder:
    model = ModelConfig(
        hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_hidden_size=32, seq_length=24, init_std=0.3
    )
    return Decoder(model, MoEConfig(router=router, num_experts=4, k=1, num_shared_experts=1), VOCAB, 3).double()


def prompt(batch: int = 3, length: int = 5) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))


def greedy_without_cache(model: Decoder, ids: Tensor, new: int) -> Tensor:
    for _ in range(new):
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    return ids


@torch.no_grad()
@pytest.mark.parametrize("router", ROUTERS)
def test_logits_with_the_cache_equal_those_without(router: Router) -> None:
    model, ids = decoder(router).eval(), prompt(length=12)
    cache = KVCache(num_layers=2, capacity=12)
    parts = [model(part, cache=cache).logits for part in ids.split([4, 1, 1, 3, 2, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits, rtol=0, atol=1e-11)


@torch.no_grad()
@pytest.mark.parametrize("router", ROUTERS)
def test_greedy_equals_greedy_without_the_cache(router: Router) -> None:
    model = decoder(router)
    ids = generate(model, prompt(), 19)
    assert ids.shape == (3, 24)
    assert torch.equal(ids, greedy_without_cache(model.eval(), prompt(), 19))
    assert len(ids[:, 5:].unique()) > 3


def test_each_new_token_costs_one_position() -> None:
    model, lengths = decoder(), []
    model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    generate(model, prompt(), 4)
    assert lengths == [5, 1, 1, 1]


def test_the_mode_is_restored_and_engines_are_unwrapped() -> None:
    class Engine(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model = decoder().train()
    assert torch.equal(generate(Engine(Engine(model)), prompt(), 3), generate(model, prompt(), 3))
    assert model.training
    assert model.layers[0].training
    generate(model.eval(), prompt(), 1)
    assert not model.training
    with pytest.raises(TypeError, match="Linear is no Decoder"):
        generate(nn.Linear(2, 2), prompt(), 1)


def test_a_sequence_that_ended_is_filled_with_eos() -> None:
    model = decoder()
    plain = generate(model, prompt(), 12)
    eos = int(plain[0, 7])
    ended = generate(model, prompt(), 12, eos_id=eos)
    for row, reference in zip(ended, plain, strict=True):
        hits = (reference[5:] == eos).nonzero()
        end = 5 + int(hits[0]) if len(hits) else 17
        assert torch.equal(row[:end], reference[:end])
        assert (row[end:] == eos).all()


@pytest.mark.parametrize(("ep_size", "forwards"), [(1, 3), (2, 12)])
def test_only_a_model_on_one_rank_stops_early(ep_size: int, forwards: int) -> None:
    model, calls = decoder(), []
    eos = int(generate(model, prompt(batch=1), 3)[0, -1])
    assert eos not in generate(model, prompt(batch=1), 2)[0, 5:]
    # A dense model knows ep_size from its configuration alone, so the steps can be counted without other ranks.
    model.moe_config = model.moe_config.model_copy(update={"ep_size": ep_size})
    model.register_forward_hook(lambda *_: calls.append(None))
    ids = generate(model, prompt(batch=1), 12, eos_id=eos)
    assert len(calls) == forwards
    assert ids.shape == (1, 17)
    assert (ids[0, 7:] == eos).all()


def test_sampling_follows_the_generator_and_the_temperature() -> None:
    model = decoder()

    def sample(seed: int, **options: Any) -> Tensor:
        return generate(model, prompt(), 10, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(sample(0, temperature=1.0), sample(0, temperature=1.0))
    assert not torch.equal(sample(0, temperature=1.0), sample(1, temperature=1.0))
    greedy = generate(model, prompt(), 10)
    assert torch.equal(sample(0, temperature=1e-30), greedy)
    assert torch.equal(sample(0, temperature=5.0, top_p=1e-9), greedy)


def test_samples_have_the_distribution_of_the_nucleus() -> None:
    model, count, top_p, temperature = decoder(), 20_000, 0.6, 2.0
    probs = torch.softmax(model(prompt(batch=1)).logits[0, -1].detach() / temperature, dim=-1)
    ranked, order = probs.sort(descending=True)
    size = int((ranked.cumsum(0) < top_p).sum()) + 1
    assert 2 <= size < VOCAB
    expected = torch.zeros(VOCAB, dtype=torch.float64)
    expected[order[:size]] = ranked[:size] / ranked[:size].sum()
    many = prompt(batch=1).expand(count, -1)
    generator = torch.Generator().manual_seed(0)
    drawn = generate(model, many, 1, temperature=temperature, top_p=top_p, generator=generator)[:, -1]
    measured = torch.bincount(drawn, minlength=VOCAB) / count
    assert (measured[expected == 0] == 0).all()
    assert (measured - expected).abs().max() < 5 * 0.5 / count**0.5


def test_no_new_tokens_give_the_prompt_back() -> None:
    assert torch.equal(generate(decoder(), prompt(), 0), prompt())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 20}, r"max_new_tokens = 20: .* needs 25 positions, but model\.seq_length = 24"),
        ({"max_new_tokens": -1}, "max_new_tokens = -1"),
        ({"temperature": -0.5}, r"temperature = -0\.5"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_p": 0.0}, r"top_p = 0\.0"),
        ({"top_p": 1.1}, r"top_p = 1\.1"),
        ({"eos_id": VOCAB}, "eos_id = 41: must be between 0 and vocab_size - 1 = 40"),
        ({"prompt_ids": torch.zeros(3).long()}, r"prompt_ids: shape is \(3,\)"),
        ({"prompt_ids": torch.zeros(3, 0).long()}, r"prompt_ids: shape is \(3, 0\)"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(decoder(), **({"prompt_ids": prompt(), "max_new_tokens": 2} | arguments))


def test_wrong_uses_of_the_cache_are_named() -> None:
    model = decoder().eval()
    with pytest.raises(TypeError, match=r"prompt_ids: dtype is torch\.int32"):
        generate(model, prompt().int(), 2)
    with pytest.raises(RuntimeError, match=r"torch\.no_grad"):
        model(prompt(), cache=KVCache(2, 8))
    with torch.no_grad():
        with pytest.raises(ValueError, match="made for 3 layers, but the model has 2"):
            model(prompt(), cache=KVCache(3, 8))
        cache = KVCache(2, 30)
        model(prompt(length=20), cache=cache)
        with pytest.raises(ValueError, match=r"20 cached \+ 5 positions exceed model\.seq_length = 24"):
            model(prompt(), cache=cache)
