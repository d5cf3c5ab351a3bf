"""Gradients kept flat train as DeepSpeed's own passes do: weights and gradients bit for bit, norms closely."""

from __future__ import annotations

import contextlib
import copy
import itertools
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup
from deepspeed.utils import safe_get_full_grad
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from torch import Tensor, nn

from ds_remoe import MoE, initialize
from ds_remoe.deepspeed_gradients import block_norms, restore_deepspeed_gradients

WIDTH, STEPS = 7, 3


class Case(NamedTuple):
    stage: int
    accumulation: int
    ep_size: int
    bucket: int
    dtype: str = "fp32"
    zero: tuple[tuple[str, bool], ...] = ()
    more: tuple[tuple[str, Any], ...] = ()
    event: str = ""

    @property
    def config(self) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
            "zero_optimization": {"stage": self.stage, "reduce_bucket_size": self.bucket, **dict(self.zero)},
            "bf16": {"enabled": self.dtype != "fp32"},
            "data_types": {"grad_accum_dtype": "fp32"} if self.dtype == "bf16 summed in fp32" else {},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
            **dict(self.more),
        }


def cases(world_size: int) -> list[Case]:
    """Buckets smaller than a parameter, of a few parameters, and larger than all."""
    found = [
        Case(stage, accumulation, ep_size, bucket)
        for stage, accumulation, ep_size in itertools.product((1, 2), (1, 3), sorted({1, world_size}))
        for bucket in ((40, 10_000) if stage == 2 else (300,))
    ]
    return [
        *found,
        Case(2, 3, world_size, 300, "bf16"),
        Case(2, 2, world_size, 300, "bf16 summed in fp32"),
        Case(2, 2, 1, 300, zero=(("round_robin_gradients", True),)),
        Case(2, 2, world_size, 300, zero=(("use_multi_rank_bucket_allreduce", False),)),
        *(Case(stage, 2, world_size, 300, zero=(("overlap_comm", True),)) for stage in (1, 2)),
        Case(2, 2, world_size, 300, zero=(("parameter_alignment", True),)),
        Case(2, 2, world_size, 300, more=(("communication_data_type", "bf16"),)),
        Case(2, 2, world_size, 300, more=(("gradient_clipping", 1e-3),)),
        *(Case(stage, 1, world_size, 300, event="a backward pass discarded") for stage in (1, 2)),
        *(Case(stage, 2, world_size, 300, event="gradients set by hand") for stage in (1, 2)),
        *(Case(stage, 2, world_size, 300, event="reductions coalesced") for stage in (1, 2)),
    ]


class Model(nn.Module):
    """Odd sizes, experts, and parameters that only every third micro-batch uses, that none does, without elements."""

    def __init__(self, ep_size: int) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.seldom = nn.Parameter(torch.randn(3))
        self.never = nn.Parameter(torch.randn(11))
        self.empty = nn.Parameter(torch.randn(0))
        expert = nn.Sequential(nn.Linear(WIDTH, 5), nn.GELU(), nn.Linear(5, WIDTH))
        self.moe = MoE(WIDTH, expert, num_experts=4, ep_size=ep_size, k=1)
        self.last = nn.Linear(WIDTH, 3, bias=False)

    def forward(self, x: Tensor, index: int) -> Tensor:
        hidden, l_aux, _ = self.moe(torch.tanh(self.first(x)))
        scores = self.last(hidden)
        loss: Tensor = scores.square().mean() + 0.01 * l_aux
        loss = loss + self.empty.sum()
        return loss + (scores * self.seldom).mean() if index % 3 == 0 else loss


def train(case: Case, flat: bool) -> dict[str, Any]:
    """Weights, gradients before each step, and norms."""
    model = Model(case.ep_size)
    engine, *_ = initialize(model=model, model_parameters=list(model.parameters()), config=copy.deepcopy(case.config))
    if not flat:
        restore_deepspeed_gradients(engine)
    gradients: list[Tensor | None] = []
    norms, kinds = [], set()
    dtype = torch.float32 if case.dtype == "fp32" else torch.bfloat16

    def backward(index: int) -> None:
        generator = torch.Generator().manual_seed(100 * index + dist.get_rank())
        engine.backward(engine(torch.randn(6, WIDTH, generator=generator).to(dtype), index))

    for index in range(STEPS * case.accumulation):
        if case.event == "a backward pass discarded":
            backward(50 + index)
            engine.zero_grad()
            engine.optimizer.zero_grad()
        if case.event == "gradients set by hand":
            model.never.grad = torch.full_like(model.never, 0.5 + index)
        with engine.coalesce_grad_reduction() if "coalesced" in case.event else contextlib.nullcontext():
            for part in range(2 if "coalesced" in case.event else 1):
                backward(index + 20 * part)
        if engine.is_gradient_accumulation_boundary():
            # With round_robin_gradients and several ranks DeepSpeed's own look-up takes one parameter for another.
            if "round_robin_gradients" not in dict(case.zero):
                gradients += [safe_get_full_grad(parameter) for parameter in model.parameters()]
            kinds |= {type(group) for group in engine.optimizer.averaged_gradients.values()}
        engine.step()
        if engine.get_global_grad_norm() is not None:
            norms.append(float(engine.get_global_grad_norm()))
    return {
        "weights": [p.detach().float() for p in model.parameters()],
        "gradients": gradients,
        "norms": norms,
        "is flat": kinds == {GradPartitionBufferGroup},
    }


def on_a_rank(world_size: int) -> list[dict[str, dict[str, Any]]]:
    return [{"flat": train(case, True), "stock": train(case, False)} for case in cases(world_size)]


@pytest.mark.parametrize("world_size", [1, 2])
def test_trains_as_deepspeed_does(world_size: int) -> None:
    for rank in run_ranks(on_a_rank, world_size, world_size):
        for case, found in zip(cases(world_size), rank, strict=True):
            flat, stock = found["flat"], found["stock"]
            is_clipped = "gradient_clipping" in dict(case.more)
            assert flat["is flat"], case
            assert stock["is flat"] == (case.dtype == "bf16 summed in fp32"), case
            for mine, theirs in zip(flat["weights"], stock["weights"], strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6 if is_clipped else 0, msg=str(case))
            for mine, theirs in zip(flat["gradients"], stock["gradients"], strict=True):
                assert (mine is None) == (theirs is None), case
                torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6 if is_clipped else 0, msg=str(case))
            assert len(flat["norms"]) >= STEPS
            assert flat["norms"] == pytest.approx(stock["norms"], rel=1e-6), case


def after_an_interruption() -> list[str]:
    """What the next backward pass says after one that broke off, with experts that this rank alone has."""
    said = []
    for stage in (1, 2):
        case = Case(stage, 1, 1, 10_000)
        model = Model(1)
        engine, *_ = initialize(model=model, model_parameters=list(model.parameters()), config=case.config)
        handle = model.first.weight.register_hook(lambda gradient: 1 / 0)
        with contextlib.suppress(ZeroDivisionError):
            engine.backward(engine(torch.ones(6, WIDTH), 0))
        handle.remove()
        try:
            engine.backward(engine(torch.ones(6, WIDTH), 0))
            said.append("nothing")
        except RuntimeError as error:
            said.append(str(error))
    return said


def test_what_a_broken_backward_pass_left_is_not_stepped() -> None:
    """At stage 1 it stands at the parameters, where `zero_grad` reaches it."""
    ((stage_1, stage_2),) = run_ranks(after_an_interruption, 1)
    assert stage_1 == "nothing"
    assert "an earlier backward pass broke off" in stage_2


@given(st.integers(0, 20_000), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.integers(0, 5))
def test_blocks_have_the_norm_of_the_vector(size: int, dtype: torch.dtype, seed: int) -> None:
    vector = torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    norm = torch.linalg.vector_norm(block_norms(vector))
    assert norm.dtype == torch.float64
    torch.testing.assert_close(norm, torch.linalg.vector_norm(vector.double()), rtol=1e-6, atol=0)


def test_a_value_that_is_not_finite_shows_in_the_norm() -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        for place in (0, 4096, 9000):
            vector = torch.ones(9001)
            vector[place] = value
            assert not torch.linalg.vector_norm(block_norms(vector)).isfinite()
