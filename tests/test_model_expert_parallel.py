"""The decoder on two ranks with the experts split between them computes what one rank computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from ds_remoe.config.schema import ModelConfig, MoEConfig
from ds_remoe.model.decoder import Decoder
from ds_remoe.model.generation import generate

RANKS, VOCAB, NEW_TOKENS = 2, 37, 6
pytestmark = pytest.mark.filterwarnings("ignore:a ReLU router is training without")


def decoder(ep_size: int, checkpointing: bool) -> Decoder:
    model = ModelConfig(
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        ffn_hidden_size=32,
        seq_length=12,
        init_std=0.3,
        activation_checkpointing=checkpointing,
    )
    return Decoder(model, MoEConfig(num_experts=4, k=1, ep_size=ep_size, num_shared_experts=1), VOCAB, seed=7).double()


def tokens_of(rank: int) -> Tensor:
    """A batch of its own for each rank, of a different size and length."""
    return torch.randint(VOCAB, (1 + rank, 6 - 2 * rank), generator=torch.Generator().manual_seed(rank))


def run(model: Decoder, ranks: list[int], eos_id: int) -> dict[str, Any]:
    """Logits and generated tokens of these ranks' batches, and the expert gradients of their losses together."""
    for rank in ranks:
        model(tokens_of(rank), tokens_of(rank)).loss.backward()
    model.eval()
    with torch.no_grad():
        logits = [model(tokens_of(rank)).logits for rank in ranks]
    return {
        "logits": logits,
        "generated": [generate(model, tokens_of(rank), NEW_TOKENS, eos_id=eos_id) for rank in ranks],
        "gradients": [layer.mlp.deepspeed_moe.experts.deepspeed_experts.gate_up.grad for layer in model.layers],
    }


def run_rank(eos_id: int) -> dict[str, Any]:
    model = decoder(ep_size=RANKS, checkpointing=True)
    for layer in model.layers:
        layer.mlp.set_deepspeed_parallelism()
    return run(model, [dist.get_rank()], eos_id)


def test_two_ranks_equal_one() -> None:
    # The one sequence of rank 0 ends at its first new token, while rank 1 goes on and needs the experts of rank 0.
    eos_id = int(generate(decoder(1, False), tokens_of(0), NEW_TOKENS)[0, 6])
    expected = run(decoder(1, False), [0, 1], eos_id)
    assert (expected["generated"][1][:, -1] != eos_id).any()
    for rank, measured in enumerate(run_ranks(run_rank, RANKS, eos_id)):
        torch.testing.assert_close(measured["logits"][0], expected["logits"][rank], rtol=0, atol=1e-11)
        assert torch.equal(measured["generated"][0], expected["generated"][rank])
        for part, whole in zip(measured["gradients"], expected["gradients"], strict=True):
            own = whole.chunk(RANKS)[rank]
            assert own.abs().max() > 1e-3
            torch.testing.assert_close(part, own, rtol=0, atol=1e-11)
