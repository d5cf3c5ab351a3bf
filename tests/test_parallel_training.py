"""The same micro-batches train alike, however ranks, accumulation, ZeRO and expert parallelism share them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from ds_remoe import initialize
from ds_remoe.config.schema import ModelConfig, MoEConfig
from ds_remoe.model.decoder import Decoder

MICRO_BATCHES, STEPS, VOCAB = 4, 6, 61
MODEL = ModelConfig(hidden_size=16, num_layers=2, num_heads=2, ffn_hidden_size=24, seq_length=10, init_std=0.2)


def deepspeed_config(stage: int, accumulation: int, bf16: bool) -> dict[str, Any]:
    """SGD and a small clipping norm, so that a wrong gradient norm shows in the next loss."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.2,
        "optimizer": {"type": "SGD", "params": {"lr": 2.0}},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
        "steps_per_print": 1_000_000_000,
        "remoe": {"sparsity": {"lambda_init": 1e-2, "alpha": 1.2}},
    }


def train(stage: int, ep_size: int, router: str, bf16: bool = False) -> list[float]:
    """Loss, auxiliary loss, λ, sparsity and gradient norm of each step in a row, over all ranks."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    accumulation = MICRO_BATCHES // world_size
    moe = MoEConfig(router=router, num_experts=4, k=1, ep_size=ep_size)
    model = Decoder(MODEL, moe, VOCAB, seed=3)
    config = deepspeed_config(stage, accumulation, bf16)
    engine, *_ = initialize(model=model, model_parameters=list(model.parameters()), config=config)
    trace: list[float] = []
    for step in range(STEPS):
        losses = torch.zeros(2, dtype=torch.float64)
        for index in range(accumulation):
            generator = torch.Generator().manual_seed(1000 * step + index * world_size + rank)
            tokens = torch.randint(VOCAB, (2, 11), generator=generator)
            output = engine(tokens[:, :-1], tokens[:, 1:])
            engine.backward(output.loss)
            engine.step()
            losses += torch.stack([output.lm_loss.detach(), output.aux_loss.detach()]).double()
        dist.all_reduce(losses)
        state = engine.remoe
        coefficient = state.controller.history[-1][0] if state.controller else 0.0
        sparsity = state.report.sparsity if state.report else 0.0
        assert engine.get_global_grad_norm() is not None
        trace += [*(losses / MICRO_BATCHES).tolist(), coefficient, sparsity, state.grad_norm]
    return trace


def cases(world_size: int) -> list[tuple[int, int, str, bool]]:
    ep_sizes = [size for size in (1, 2, 4) if size <= world_size]
    return [
        *((stage, ep_size, "relu", False) for stage in (0, 1, 2) for ep_size in ep_sizes),
        (1, ep_sizes[-1], "topk", False),
        (2, 1, "dense", False),
        *((stage, ep_sizes[-1], "relu", True) for stage in (0, 1, 2)),
    ]


def train_cases(world_size: int) -> dict[tuple[int, int, str, bool], list[float]]:
    return {case: train(*case) for case in cases(world_size)}


@pytest.mark.timeout(900)
def test_one_two_and_four_ranks_train_alike() -> None:
    (alone,) = run_ranks(train_cases, 1, 1, timeout=300)
    for stage in (1, 2):
        assert alone[stage, 1, "relu", False] == pytest.approx(alone[0, 1, "relu", False], rel=1e-5)
    norms = alone[0, 1, "relu", False][4::5]
    assert min(norms) > 0.2, "clipping was never at work, so the test would not see a wrong norm"
    for world_size in (2, 4):
        for rank, traces in enumerate(run_ranks(train_cases, world_size, world_size, timeout=400)):
            for (stage, ep_size, router, bf16), trace in traces.items():
                reference = alone[stage, 1, router, bf16]
                close = pytest.approx(reference, rel=3e-2 if bf16 else 2e-5, abs=1e-3 if bf16 else 1e-6)
                assert trace == close, f"{world_size} ranks, {rank=}, {stage=}, {ep_size=}, {router=}, {bf16=}"
