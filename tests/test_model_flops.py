"""The formulas for parameters and FLOPs against the modules and the paper's table."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ds_remoe.config.schema import ModelConfig, MoEConfig
from ds_remoe.kernels.cpu_library import load_cpu_library
from ds_remoe.model.decoder import Decoder
from ds_remoe.model.flops import flops_per_token, num_active_params, num_params

VOCAB = 53
MODEL = ModelConfig(hidden_size=24, num_layers=4, num_heads=4, num_kv_heads=2, ffn_hidden_size=48, seq_length=16)
PAPER_VOCAB = 51200
# Hidden size, layers, heads, active parameters and total parameters at E = 8, in millions, digits cut off as printed.
PAPER = [(768, 12, 12, 182, 777), (1024, 24, 16, 469, 2580), (1536, 24, 16, 978, 5730)]
MOES = [
    MoEConfig(router="dense"),
    MoEConfig(num_experts=4),
    MoEConfig(router="topk", num_experts=4, k=2, granularity=3),
    MoEConfig(num_experts=4, layer_frequency=2, num_shared_experts=2, granularity=2),
    MoEConfig(num_experts=2, layer_frequency=3),
]


@pytest.mark.parametrize("moe", MOES)
def test_num_params_counts_the_modules(moe: MoEConfig) -> None:
    decoder = Decoder(MODEL, moe, VOCAB, seed=0)
    total = sum(p.numel() for p in decoder.parameters())
    assert num_params(MODEL, moe, VOCAB) == total
    ends = decoder.embedding.weight.numel() + decoder.lm_head.weight.numel()
    assert num_params(MODEL, moe, VOCAB, embeddings=False) == total - ends


@pytest.mark.parametrize("moe", MOES)
def test_num_active_params_leaves_out_the_inactive_experts(moe: MoEConfig) -> None:
    decoder = Decoder(MODEL, moe, VOCAB, seed=0)
    routed = sum(w.numel() for name, w in decoder.state_dict().items() if ".deepspeed_experts." in name)
    total = sum(p.numel() for p in decoder.parameters())
    assert (routed == 0) == (moe.router == "dense")
    assert num_active_params(MODEL, moe, VOCAB) == total - routed + routed * moe.k // moe.num_experts
    assert num_params(MODEL, moe, VOCAB) - num_active_params(MODEL, moe, VOCAB) == num_params(
        MODEL, moe, VOCAB, embeddings=False
    ) - num_active_params(MODEL, moe, VOCAB, embeddings=False)


@pytest.mark.parametrize(("hidden", "layers", "heads", "active", "total"), PAPER)
def test_the_papers_table_counts_embeddings_and_cuts_off_digits(
    hidden: int, layers: int, heads: int, active: int, total: int
) -> None:
    model = ModelConfig(hidden_size=hidden, num_layers=layers, num_heads=heads, num_kv_heads=4, seq_length=1024)
    dense = num_params(model, MoEConfig(router="dense"), PAPER_VOCAB)
    assert dense // 10**6 == active
    routed = num_params(model, MoEConfig(num_experts=8), PAPER_VOCAB)
    step = 1 if total < 1000 else 10
    assert routed // (step * 10**6) * step == total
    # The routers are all that active parameters at k = 1 have more than the dense model.
    assert num_active_params(model, MoEConfig(num_experts=8), PAPER_VOCAB) - dense == layers * hidden * 8


def counted_flops(moe: MoEConfig) -> tuple[int, int]:
    """FLOPs of one training step as torch counts them, and the step's tokens."""
    load_cpu_library()  # a counter knows the operators that exist when it is made
    decoder = Decoder(MODEL, moe, VOCAB, seed=0)
    tokens = torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))
    # The math kernel is made of matrix products that the counter sees; fused CPU kernels it does not know.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        decoder(tokens, tokens).loss.backward()
    return counter.get_total_flops(), tokens.numel()


def test_flops_of_a_dense_model_equal_what_torch_counts() -> None:
    moe = MoEConfig(router="dense")
    counted, tokens = counted_flops(moe)
    assert counted == tokens * flops_per_token(MODEL, moe, VOCAB, active_experts=0.0, halve_causal=False)


def test_flops_of_an_moe_model_equal_what_torch_counts() -> None:
    moe = MoEConfig(router="topk", num_experts=4, k=2, granularity=3, num_shared_experts=1)
    counted, tokens = counted_flops(moe)
    expected = tokens * flops_per_token(MODEL, moe, VOCAB, active_experts=6.0, halve_causal=False)
    # The gradient of a routing weight is a dot product of width d_ffn/G; torch may count it, the formula does not.
    assert expected <= counted <= expected + tokens * MODEL.num_layers * 6 * 2 * 16


def test_flops_follow_the_measured_number_of_experts() -> None:
    moe = MoEConfig(num_experts=4, granularity=2, layer_frequency=2)
    expert = 3 * 24 * 24
    dense_stage, sparse = (flops_per_token(MODEL, moe, VOCAB, active_experts=a) for a in (6.5, 2.0))
    assert dense_stage - sparse == pytest.approx(3 * 2 * 2 * 4.5 * expert)
    for wrong in (-0.1, 8.1, float("nan")):
        with pytest.raises(ValueError, match=r"active_experts = .*between 0 and num_experts \* granularity = 8"):
            flops_per_token(MODEL, moe, VOCAB, active_experts=wrong)


def test_attention_scores_are_halved_by_default() -> None:
    moe = MoEConfig(router="dense")
    half = flops_per_token(MODEL, moe, VOCAB, 0.0)
    full = flops_per_token(MODEL, moe, VOCAB, 0.0, halve_causal=False)
    assert full - half == 3 * 2 * 16 * 24 * 4
    assert flops_per_token(MODEL, moe, VOCAB, 0.0, seq_length=8, halve_causal=False) == half
