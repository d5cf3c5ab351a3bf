"""Pack, unpack and combine: the words against the definition, and the Triton kernels against their twins."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_remoe.kernels import exchange
from ds_remoe.kernels.exchange import Prefix, Room

# tokens, width, ranks, experts of a rank, share of active pairs
CASES = [(5, 3, 2, 1, 0.5), (13, 40, 4, 3, 0.3), (6, 5, 2, 34, 0.4), (2, 2050, 2, 32, 1.0)]


def make_case(tokens: int, width: int, experts: int, density: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, weights and mask, the last two expert-major in memory as the routers make them."""
    generator = torch.Generator().manual_seed(tokens * width)
    x_TD = torch.randn(tokens, width, generator=generator).to(dtype)
    weights_ET = torch.rand(experts, tokens, generator=generator, dtype=torch.promote_types(dtype, torch.float32))
    mask_ET = torch.rand(experts, tokens, generator=generator) < density
    return x_TD, weights_ET.t(), mask_ET.t()


def pack_for(me: int, ranks: int, case: tuple[Tensor, ...], wire: torch.dtype) -> tuple[exchange.Packed, Prefix]:
    x_TD, weights_TE, mask_TE = case
    prefix = Prefix.of(mask_TE, ranks, me)
    of_peers = prefix.of_peers()
    leaving = Room(*(int(n) for n in (of_peers.rows[-1], of_peers.pairs[-1], of_peers.rows[-2])))
    return exchange.pack(x_TD, weights_TE, mask_TE, prefix, me, leaving, wire), prefix


def unpack_own(packed: exchange.Packed, prefix: Prefix, local: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Let every peer's block arrive here: the experts of all peers in one."""
    arrived = prefix.of_peers()
    row_words = exchange.mask_words(local, packed.words.dtype)
    pairs, rows = len(packed.weight_ids_K), len(packed.row_tokens_N)
    assert len(packed.words) == pairs + rows * row_words
    dense, weights, _ = exchange.unpack_dense(packed.words, arrived, local, rows, pairs, dtype)
    row_ids, values, order = exchange.unpack(packed.words, arrived, local, rows, pairs, dtype)
    return dense, weights, row_ids, values, order.pairs_M, order.starts


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 12), st.integers(1, 4), st.integers(1, 70), st.sampled_from([0.0, 0.1, 0.6, 1.0]), st.data())
def test_twins_against_the_definition(tokens: int, ranks: int, local: int, density: float, data: st.DataObject) -> None:
    """Rows by peer and token, each once; pairs as the mask has them; rows summed at their tokens."""
    me = data.draw(st.integers(0, ranks - 1))
    case = make_case(tokens, 3, ranks * local, density, torch.float64)
    x_TD, weights_TE, mask_TE = case
    packed, prefix = pack_for(me, ranks, case, torch.float64)
    peers = [*(r for r in range(ranks) if r != me), me]
    expected = [(p, t) for p in peers for t in range(tokens) if mask_TE[t, p * local : (p + 1) * local].any()]
    assert packed.row_tokens_N.tolist() == [t for _, t in expected]
    remote = [t for p, t in expected if p != me]
    assert torch.equal(packed.rows, x_TD[remote])

    dense, weights, row_ids, values, by_row, starts = unpack_own(packed, prefix, local, torch.float64)
    block = [slice(p * local, (p + 1) * local) for p, _ in expected]
    for row, (columns, (_, t)) in enumerate(zip(block, expected, strict=True)):
        assert torch.equal(dense[row], mask_TE[t, columns])
        assert torch.equal(weights[row], weights_TE[t, columns] * mask_TE[t, columns])
    expert, row = torch.nonzero(dense.t(), as_tuple=True)
    assert torch.equal(row_ids, row)
    assert torch.equal(values, weights[row, expert])
    assert torch.equal(weights_TE.t().flatten()[packed.weight_ids_K], values[by_row])
    assert torch.equal(by_row, torch.sort(row_ids, stable=True).indices)
    assert starts.diff().tolist() == dense.sum(dim=1).tolist()

    rows = torch.randn(len(expected), 3, dtype=torch.float64)
    sizes = [sum(q == p for q, _ in expected) for p in peers]
    total = exchange.combine_rows(
        rows[: len(remote)], rows[len(remote) :], packed.row_tokens_N, prefix.rows, sizes, tokens
    )
    by_hand = torch.zeros(tokens, 3, dtype=torch.float64)
    for values_D, (_, t) in zip(rows, expected, strict=True):
        by_hand[t] += values_D
    torch.testing.assert_close(total, by_hand, rtol=0, atol=1e-12)


def compare_with_twins(device: str) -> None:
    """The public functions, which take the Triton kernels here, against the twins."""
    from ds_remoe.kernels import exchange_triton
    from ds_remoe.kernels.backend import use_triton

    exchange_triton.ROWS_AT_ONCE = 4  # so that there are several blocks
    for (tokens, width, ranks, local, density), dtype, me in [
        (case, dtype, me) for case in CASES for dtype, me in ((torch.float32, 0), (torch.bfloat16, case[2] - 1))
    ]:
        case = tuple(t.to(device) for t in make_case(tokens, width, ranks * local, density, dtype))
        assert use_triton(case[0]), "the kernel would not run"
        x_TD, weights_TE, mask_TE = case
        for wire in {dtype, torch.bfloat16}:
            packed, prefix = pack_for(me, ranks, case, wire)
            leaving = Room(len(packed.row_tokens_N), len(packed.weight_ids_K), len(packed.rows))
            twin = exchange.torch_pack(x_TD, weights_TE, mask_TE, prefix, me, leaving, wire)
            assert_same(packed.rows, twin.rows, rounded=wire != dtype)
            for name in ("words", "row_tokens_N", "weight_ids_K"):
                assert torch.equal(getattr(packed, name), getattr(twin, name)), name
            if wire != torch.bfloat16:
                check_rooms(packed, case, prefix, me, wire, exchange.mask_words(local, torch.int32))
        sizes = prefix.of_peers().rows.diff().tolist()
        rows, remote = leaving.rows, leaving.remote_rows
        back = torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        got = exchange.combine_rows(back[:remote], back[remote:], packed.row_tokens_N, prefix.rows, sizes, tokens)
        expected = exchange.torch_combine_rows(back[:remote], back[remote:], packed.row_tokens_N, sizes, tokens)
        assert_same(got, expected, rounded=dtype == torch.bfloat16)
        if dtype == torch.float32:  # the words are the same whatever the rows' dtype is
            check_unpack(packed, prefix, local)


def check_rooms(
    packed: exchange.Packed, case: tuple[Tensor, ...], prefix: Prefix, me: int, wire: torch.dtype, row_words: int
) -> None:
    """More room changes nothing; less leaves out what has no place, and nothing else."""
    leaving = Room(len(packed.row_tokens_N), len(packed.weight_ids_K), len(packed.rows))
    ahead = exchange.pack_ahead(*case, prefix, me, leaving.widened(), wire)
    assert ahead is not None
    for name, expected in vars(packed).items():
        assert torch.equal(getattr(ahead.cut(leaving, row_words), name), expected), name
    for size in ("rows", "pairs", "remote_rows"):
        small = replace(leaving, **{size: getattr(leaving, size) // 2})
        assert leaving.holds(small)
        assert small.holds(leaving) == (small == leaving)
        part = exchange.pack_ahead(*case, prefix, me, small, wire)
        assert part is not None
        for name, expected in vars(packed).items():
            kept = getattr(part, name)
            assert torch.equal(kept, expected[: len(kept)]), name


def check_unpack(packed: exchange.Packed, prefix: Prefix, local: int) -> None:
    arrived, pairs, rows = prefix.of_peers(), len(packed.weight_ids_K), len(packed.row_tokens_N)
    _, _, *got = unpack_own(packed, prefix, local, torch.float32)
    row_ids, weights, order = exchange.torch_unpack(packed.words, arrived, local, rows, pairs, torch.float32)
    expected = row_ids, weights, order.pairs_M, order.starts
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def assert_same(got: Tensor, expected: Tensor, rounded: bool) -> None:
    """Equal; where fp32 was rounded to bf16, to its last bit, as Triton's interpreter rounds towards zero."""
    tolerance = 2.0**-7 if rounded else 0.0
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_triton_kernels_under_the_interpreter() -> None:
    """In a process of its own, as Triton reads TRITON_INTERPRET when its kernels are defined."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    program = "from test_kernels_exchange import compare_with_twins; compare_with_twins('cpu')"
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the interpreter covers the logic")
def test_triton_kernels_on_the_gpu() -> None:
    compare_with_twins("cuda")
