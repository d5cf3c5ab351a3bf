"""Dispatch on four ranks: bytes on the wire, rounding on it, work behind it, rows sent again, the way between nodes."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_ranks
from torch import Tensor, nn

from ds_remoe.config.schema import ModelConfig, MoEConfig
from ds_remoe.launch_environment import ranks_per_node
from ds_remoe.model.decoder import Decoder
from ds_remoe.moe import MoE, SwiGLU
from ds_remoe.moe.budget import ActivationBudget
from ds_remoe.moe.dispatch import node_groups, wire
from ds_remoe.moe.dispatch.nodes import split_by_node

RANKS, NODE, D, H, E, TOKENS = 4, 2, 512, 4, 8, 40


def make_layer(ep_size: int, dtype: torch.dtype, **options: Any) -> MoE:
    torch.manual_seed(0)
    layer = MoE(D, SwiGLU(D, H), num_experts=E, ep_size=ep_size, k=1, **options).to(dtype).eval()
    with torch.no_grad():
        weight = torch.randn(E, D, generator=torch.Generator().manual_seed(1))
        weight[:, 0] = -20.0  # with x[:, 0] = 1 about a fifth of the pairs are active
        layer.deepspeed_moe.gate.wg.weight.copy_(weight)
    layer.set_deepspeed_parallelism()
    return layer


def make_tokens(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(10 + dist.get_rank())
    x = torch.randn(TOKENS + dist.get_rank(), D, generator=generator)
    x[:, 0] = 1.0
    return x.to(dtype).requires_grad_()


@contextlib.contextmanager
def sent_bytes() -> Iterator[list[int]]:
    """Bytes that this rank sends to each rank, by global rank."""
    real, sent = dist.all_to_all_single, [0] * dist.get_world_size()

    def spy(out: Tensor, given: Tensor, recv: Any = None, send: Any = None, group: Any = None, **rest: Any) -> Any:
        ranks = dist.get_process_group_ranks(group)
        lengths = send or [len(given) // len(ranks)] * len(ranks)
        for rank, length in zip(ranks, lengths, strict=True):
            sent[rank] += length * given[:1].nbytes if len(given) else 0
        return real(out, given, recv, send, group=group, **rest)

    dist.all_to_all_single = spy
    try:
        yield sent
    finally:
        dist.all_to_all_single = real


def least_bytes(mask_TE: Tensor, shares: dict[tuple[int, ...], range], element_size: int) -> float:
    """Least bytes, both ways, for one rank's tokens whose experts stand in shares elsewhere.

    Each token once for each share that wants it, four times over; the pairs' weights and their gradients in fp32; and
    a bit for each expert of the share.
    """
    total = 0.0
    for experts in shares.values():
        wanted = mask_TE[:, experts.start : experts.stop]
        rows, pairs = int(wanted.any(dim=1).sum()), int(wanted.sum())
        total += rows * (4 * D * element_size + len(experts) / 8) + pairs * 8
    return total


def check_bytes() -> list[str]:
    wrong = []
    for ep_size, dtype, hierarchical in [
        (2, torch.float32, False),
        (2, torch.bfloat16, False),
        (4, torch.float32, False),
        (4, torch.bfloat16, False),
        (4, torch.float32, True),
    ]:
        layer = make_layer(ep_size, dtype, hierarchical_all_to_all=hierarchical, activation_budget=None)
        x, rank = make_tokens(dtype), dist.get_rank()
        mask_TE = layer.deepspeed_moe.gate(x)[0].mask_TE
        with sent_bytes() as sent:
            layer(x)[0].sum().backward()
        ranks = dist.get_process_group_ranks(layer.deepspeed_moe.ep_group)
        width = NODE if hierarchical else 1  # ranks that a token reaches by crossing once
        units = [tuple(ranks[i : i + width]) for i in range(0, len(ranks), width)]
        experts = E // len(units)
        shares = {u: range(i * experts, (i + 1) * experts) for i, u in enumerate(units) if rank not in u}
        # Results and the gradients of tokens are sent by the other side, so only the sums over ranks compare.
        outside = sum(sent[other] for unit in shares for other in unit)
        both = torch.tensor([outside, least_bytes(mask_TE, shares, x.element_size())], dtype=torch.float64)
        dist.all_reduce(both)
        ratio = float(both[0] / both[1])
        if not 1.0 <= ratio <= 1.02:
            wrong.append(f"rank {rank}: {ratio} of the least, {ep_size=} {dtype} {hierarchical=}")
    return wrong


class Rounded(torch.autograd.Function):
    """What the wire does to a row and, on the way back, to its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.bfloat16().to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].bfloat16().to(grads[0].dtype)


def check_bf16_wire() -> list[str]:
    """Against each rank's share of the sum, computed here from rows rounded by hand where they would cross."""
    layer, rank = make_layer(RANKS, torch.float64, wire_dtype="bf16"), dist.get_rank()
    x = make_tokens(torch.float64)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    output, _, _ = layer(x)
    output.backward(upstream)

    experts = layer.deepspeed_moe.experts.deepspeed_experts
    gathered: list[Any] = [None] * RANKS
    dist.all_gather_object(gathered, (experts.gate_up.detach(), experts.down.detach()))
    x_ref, expected = x.detach().clone().requires_grad_(), torch.zeros_like(x)
    for owner, (gate_up, down) in enumerate(gathered):
        rows = x_ref if owner == rank else Rounded.apply(x_ref)
        weights_TL = F.relu(x_ref @ layer.deepspeed_moe.gate.wg.weight.t()).chunk(RANKS, dim=1)[owner]
        share = torch.zeros_like(x)
        for e in range(E // RANKS):
            gate, up = (rows @ gate_up[e].t()).chunk(2, dim=1)
            share = share + weights_TL[:, e : e + 1] * ((F.silu(gate) * up) @ down[e].t())
        expected = expected + (share if owner == rank else Rounded.apply(share))
    expected.backward(upstream)
    exact = make_layer(RANKS, torch.float64)(x)[0]
    differences = {"output": output - expected, "gradient": x.grad - x_ref.grad}
    wrong = [f"rank {rank} {name}: {d.abs().max()}" for name, d in differences.items() if not d.abs().max() < 1e-10]
    return wrong if (output - exact).abs().max() > 1e-6 else [*wrong, "nothing was rounded"]


class Witness(nn.Module):
    """A shared expert that notes when it runs, forward and backward."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events, self.inner = events, nn.Linear(D, D).double()

    def forward(self, x: Tensor) -> Tensor:
        self.events.append("shared")
        y: Tensor = self.inner(x)
        y.register_hook(lambda grad: self.events.append("shared backward"))
        return y


def check_shared_expert() -> list[str]:
    """The same numbers as after the layer, and computed while words and rows are between the ranks."""
    layer, rank, events = make_layer(RANKS, torch.float64, activation_budget=None), dist.get_rank(), list[str]()
    shared = Witness(events)
    x = make_tokens(torch.float64)
    apart = layer(x)[0] + shared(x)
    apart.sum().backward()
    gradient, x.grad = x.grad, None
    start, wait = wire.Transfer.__init__, wire.Transfer.wait

    def noted_start(self: Any, *args: Any, **kwargs: Any) -> None:
        events.append("start")
        start(self, *args, **kwargs)

    def noted_wait(self: Any) -> Tensor:
        events.append("wait")
        return wait(self)

    wire.Transfer.__init__, wire.Transfer.wait = noted_start, noted_wait  # type: ignore[method-assign]
    try:
        events.clear()
        together = layer(x, shared_expert=shared)[0]
        forward = list(events)
        events.clear()
        together.sum().backward()
    finally:
        wire.Transfer.__init__, wire.Transfer.wait = start, wait  # type: ignore[method-assign]
    exchange = ["start", "wait"]
    wrong = []
    if forward != ["start", "start", "shared", "wait", "wait", *exchange]:
        wrong.append(f"rank {rank}: forward {forward}")
    if events != [*exchange, "start", "start", "shared backward", "wait", "wait"]:
        wrong.append(f"rank {rank}: backward {events}")
    if not torch.equal(together, apart) or not torch.allclose(x.grad, gradient, rtol=0, atol=1e-12):
        wrong.append(f"rank {rank}: the shared expert's place changes the result")
    return wrong


def check_rows_sent_again() -> list[str]:
    """A layer without room for its rows: the same bits, one exchange of rows more, and no rows kept."""
    wrong, rank = [], dist.get_rank()
    everything = 10**6
    for ep_size, options in [(2, {}), (4, {}), (4, {"wire_dtype": "bf16"}), (4, {"hierarchical_all_to_all": True})]:
        layer = make_layer(ep_size, torch.float32, **options)
        found: list[tuple[list[Tensor], int, set[int], float]] = []
        for rows_per_token in (math.inf, 0.0):
            layer.zero_grad()
            x = make_tokens(torch.float32)
            x.data[:, 0] = 0.05  # about half of the pairs are active
            budget = ActivationBudget(everything, everything, everything, rows_per_token=rows_per_token)
            kept: set[int] = set()

            def note(tensor: Tensor, kept: set[int] = kept) -> Tensor:
                kept.add(len(tensor) if tensor.dim() == 2 and tensor.shape[1] == D else 0)
                return tensor

            with sent_bytes() as sent:
                with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                    output = layer(x, budget=budget)[0]
                output.square().sum().backward()
            gradients = [x.grad, *(parameter.grad for parameter in layer.parameters())]
            found.append(([output.detach(), *gradients], sum(sent), kept, budget.rows_per_token))
        (values, bytes_once, kept_once, _), (again, bytes_again, kept_again, left) = found
        case = f"rank {rank} {ep_size=} {options}"
        wrong += [f"{case}: {i}" for i, pair in enumerate(zip(values, again, strict=True)) if not torch.equal(*pair)]
        if not bytes_again > bytes_once:
            wrong.append(f"{case}: {bytes_again} bytes after {bytes_once}")
        received = max(kept_once)
        if not (received > len(x) and max(kept_again) == len(x)):
            wrong.append(f"{case}: kept {kept_once} rows, then {kept_again}")
        if left != 0.0:
            wrong.append(f"{case}: {left} left of nothing")
    return wrong


def check_group_agrees() -> list[str]:
    """Ranks with unlike numbers of tokens, one with none: the same mean of rows a token on all, from the masks."""
    wrong, rank = [], dist.get_rank()
    for hierarchical in (False, True):
        layer = make_layer(RANKS, torch.float32, hierarchical_all_to_all=hierarchical)
        for tokens in (7 * rank, 0):
            x = torch.randn(tokens, D, generator=torch.Generator().manual_seed(rank))
            mask_TE = layer.deepspeed_moe.gate(x)[0].mask_TE
            rows = mask_TE.unflatten(1, (RANKS, -1)).any(dim=-1).sum()
            both = torch.tensor([int(rows), tokens], dtype=torch.float64)
            dist.all_reduce(both)
            budget = ActivationBudget(10**6, 10**6, 10**6, rows_per_token=100.0)
            layer(x, budget=budget)
            expected = 100.0 - float(both[0]) / max(float(both[1]), 1.0)
            if budget.rows_per_token != expected:
                wrong.append(f"rank {rank} {hierarchical=} {tokens=}: {budget.rows_per_token}, not {expected}")
    return wrong


def check_node_groups() -> list[str]:
    """One node is no hierarchy; without a clear number of ranks a node the groups are refused on every rank."""
    wrong, rank = [], dist.get_rank()
    sizes = {"": "needs the number of ranks on a node", f"{2 + rank % 2}": "different numbers of ranks, [2, 3]"}
    for said, message in sizes.items():
        with environment(LOCAL_WORLD_SIZE=said, LOCAL_SIZE=""):
            try:
                wrong.append(f"rank {rank}: {said!r} gave {node_groups(dist.new_group())}")
            except ValueError as error:
                wrong += [] if message in str(error) else [f"rank {rank}: {error}"]
    for said in ("1", f"{RANKS}"):
        with environment(LOCAL_WORLD_SIZE=said):
            wrong += [] if node_groups(dist.new_group()) is None else [f"rank {rank}: {said} ranks a node gave groups"]
    return wrong


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """These variables, unset where empty."""
    before = {name: os.environ.get(name, "") for name in values}
    for name, value in values.items():
        os.environ.pop(name, None)
        os.environ.update({name: value} if value else {})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({name: value} if value else {})


def check_all() -> list[str]:
    os.environ["LOCAL_WORLD_SIZE"] = str(NODE)
    checks = (
        *(check_bytes, check_bf16_wire, check_shared_expert),
        *(check_rows_sent_again, check_group_agrees, check_node_groups),
    )
    return [line for check in checks for line in check()]


def test_four_ranks() -> None:
    wrong = [line for lines in run_ranks(check_all, RANKS) for line in lines]
    assert not wrong, "\n".join(wrong)


def test_ranks_by_node() -> None:
    assert split_by_node(range(4, 12), 4) == [[4, 5, 6, 7], [8, 9, 10, 11]]
    assert split_by_node([1, 3, 5, 7], 4) == [[1, 3], [5, 7]]
    with pytest.raises(ValueError, match=r"hierarchical_all_to_all = True: nodes of 4 ranks cut .* unevenly"):
        split_by_node(range(6), 4)


def test_ranks_per_node(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert ranks_per_node() is None
    monkeypatch.setenv("LOCAL_SIZE", "8")
    assert ranks_per_node() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "none")
    with pytest.raises(ValueError, match="LOCAL_WORLD_SIZE = 'none': must be the number of ranks"):
        ranks_per_node()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wire_dtype": "bf16"}, "wire_dtype = 'bf16': with ep_size = 1"),
        ({"wire_dtype": "fp8", "ep_size": 2}, "wire_dtype = 'fp8': must be 'auto' or 'bf16'"),
        ({"hierarchical_all_to_all": True}, "hierarchical_all_to_all = True: with ep_size = 1"),
    ],
)
def test_options_without_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoE(D, SwiGLU(D, H), num_experts=E, **options)


def test_the_configuration_reaches_the_layers() -> None:
    model = ModelConfig(hidden_size=8, num_layers=1, num_heads=2, seq_length=4)
    moe = MoEConfig(num_experts=4, ep_size=2, wire_dtype="bf16", hierarchical_all_to_all=True)
    layer = Decoder(model, moe, 11, seed=0).layers[0].mlp
    assert (layer.deepspeed_moe.wire_dtype, layer.hierarchical_all_to_all) == (torch.bfloat16, True)
