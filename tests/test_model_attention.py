"""Rotary positions, grouped-query attention and the cache."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_remoe.config.schema import ModelConfig
from ds_remoe.kernels.rope import rotate
from ds_remoe.model.attention import Attention, KVCache, LayerCache, rope_tables

CPU = torch.device("cpu")


def config(**changes: object) -> ModelConfig:
    sizes = {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "seq_length": 16}
    return ModelConfig.model_validate(sizes | changes)


def attention(model: ModelConfig, seed: int = 0) -> Attention:
    torch.manual_seed(seed)
    return Attention(model).double()


@settings(deadline=None, max_examples=30)
@given(query=st.integers(0, 500), key=st.integers(0, 500), shift=st.integers(0, 500), half=st.sampled_from([1, 4, 32]))
def test_rope_scores_depend_on_the_distance_alone(query: int, key: int, shift: int, half: int) -> None:
    generator = torch.Generator().manual_seed(half)
    q, k = torch.randn(2, 1, 1, 1, 2 * half, dtype=torch.float64, generator=generator)

    def score(q_position: int, k_position: int) -> float:
        rotated_q = rotate(q, *rope_tables(q_position, 1, 2 * half, 1e4, CPU))
        rotated_k = rotate(k, *rope_tables(k_position, 1, 2 * half, 1e4, CPU))
        return float((rotated_q * rotated_k).sum())

    scale = float(q.norm() * k.norm())
    assert abs(score(query, key) - score(query + shift, key + shift)) < 1e-6 * scale


def test_rope_rotates_by_the_position_times_the_frequency() -> None:
    x = torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 1, 1, 4)
    rotated = rotate(x, *rope_tables(3, 1, 4, 100.0, CPU)).flatten()
    expected = torch.tensor([math.cos(3.0), math.cos(0.3), math.sin(3.0), math.sin(0.3)])
    torch.testing.assert_close(rotated, expected)


def test_rope_of_bf16_is_the_rounded_fp32_one() -> None:
    rope = rope_tables(1000, 8, 16, 1e6, CPU)
    x = torch.randn(1, 2, 8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    rotated = rotate(x, *rope)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, rotate(x.float(), *rope).bfloat16())


def test_grouped_query_attention_equals_repeated_heads() -> None:
    grouped, full = attention(config()), attention(config(num_kv_heads=4))
    with torch.no_grad():
        for name in ("q_proj", "o_proj"):
            getattr(full, name).weight.copy_(getattr(grouped, name).weight)
        for name in ("k_proj", "v_proj"):
            heads_KhD = getattr(grouped, name).weight.view(2, 8, 32)
            getattr(full, name).weight.copy_(heads_KhD.repeat_interleave(2, dim=0).flatten(0, 1))
    x = torch.randn(2, 10, 32, dtype=torch.float64)
    rope = rope_tables(0, 10, 8, 1e6, CPU)
    torch.testing.assert_close(grouped(x, rope), full(x, rope), rtol=0, atol=1e-12)


def test_attention_equals_the_formula() -> None:
    model = config(num_heads=2, num_kv_heads=1)
    layer, rope = attention(model), rope_tables(0, 5, 16, 1e6, CPU)
    x_SD = torch.randn(5, 32, dtype=torch.float64)
    k_Sh = rotate(layer.k_proj(x_SD)[None, None], *rope)[0, 0]
    q_HSh = rotate(layer.q_proj(x_SD).view(5, 2, 16).transpose(0, 1)[None], *rope)[0]
    scores_HSS = (q_HSh @ k_Sh.T / 4).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    out_HSh = scores_HSS.softmax(-1) @ layer.v_proj(x_SD)
    expected = layer.o_proj(out_HSh.transpose(0, 1).reshape(5, 32))
    torch.testing.assert_close(layer(x_SD[None], rope)[0], expected, rtol=0, atol=1e-12)


def test_half_precision_shares_heads_and_stays_close() -> None:
    layer, rope = attention(config()).float(), rope_tables(0, 12, 8, 1e6, CPU)
    x = torch.randn(1, 12, 32)
    torch.testing.assert_close(layer.bfloat16()(x.bfloat16(), rope).float(), layer.float()(x, rope), rtol=0, atol=0.02)


@settings(deadline=None, max_examples=20)
@given(cuts=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_any_split_over_calls_gives_the_same_attention(cuts: list[int]) -> None:
    layer, total = attention(config()), sum(cuts)
    x = torch.randn(2, total, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(total))
    cache = LayerCache(total)
    with torch.no_grad():
        expected = layer(x, rope_tables(0, total, 8, 1e6, CPU))
        parts = []
        for part in x.split(cuts, dim=1):
            parts.append(layer(part, rope_tables(cache.length, part.shape[1], 8, 1e6, CPU), cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-12)


def test_cache_refuses_what_it_cannot_hold() -> None:
    cache = KVCache(num_layers=2, capacity=3)
    assert cache.length == 0
    two = torch.zeros(1, 2, 2, 4)
    cache.layers[0].append(two, two)
    assert cache.length == 2
    with pytest.raises(ValueError, match=r"2 \+ 2 positions exceed its capacity = 3"):
        cache.layers[0].append(two, two)
    other_batch = torch.zeros(3, 2, 1, 4)
    with pytest.raises(ValueError, match="holds 1 sequences, but the call brings 3"):
        cache.layers[0].append(other_batch, other_batch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, r"model\.num_heads = 5: must divide model\.hidden_size = 32"),
        ({"num_heads": 32, "num_kv_heads": 32}, "even width"),
        ({"num_kv_heads": 3}, r"model\.num_kv_heads = 3: must divide model\.num_heads = 4"),
    ],
)
def test_head_counts_that_do_not_fit_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attention(config(**changes))
