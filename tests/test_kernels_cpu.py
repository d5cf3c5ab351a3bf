"""The C++ kernel against the plain-torch twin, its build, and what serves where it cannot be built."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_remoe.kernels import grouped_swiglu, grouped_swiglu_cpu
from ds_remoe.kernels.cpu_library import load_cpu_library
from ds_remoe.kernels.pair_groups import PairGroups
from ds_remoe.kernels.rms_norm import rms_norm
from ds_remoe.kernels.rope import rotate, torch_rotate
from ds_remoe.model.attention import rope_tables

IMPLEMENTATIONS = (grouped_swiglu_cpu, grouped_swiglu)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    assert load_cpu_library(), "this machine has no working C++ compiler"


def all_gradients(
    module: object, case: tuple[Tensor, ...], counts: list[int], accumulate: tuple[bool, bool]
) -> list[Tensor]:
    """Forward and backward of one implementation; results start at 1 so that it shows which are added to."""
    rows, ids, weights, gate_up, down, grad_out = case
    groups = PairGroups(ids, weights, counts)
    prefix = "torch_" if module is grouped_swiglu else ""
    out = torch.ones_like(rows)
    pre = getattr(module, f"{prefix}forward")(rows, groups, gate_up, down, out, accumulate[0])
    again = getattr(module, f"{prefix}up_projection")(rows, groups, gate_up)
    assert torch.equal(pre, again)
    grad_rows, grad_gate_up, grad_down = torch.ones_like(rows), torch.ones_like(gate_up), torch.ones_like(down)
    grad_weights = getattr(module, f"{prefix}backward")(
        grad_out, rows, groups, gate_up, down, pre, grad_rows, grad_gate_up, grad_down, *accumulate
    )
    return [out, pre, grad_rows, grad_gate_up, grad_down, grad_weights]


def make_case(counts: list[int], num_rows: int, hidden: int, width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(sum(counts) + hidden)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    pairs = sum(counts)
    ids = torch.randint(num_rows, (pairs,), generator=generator)
    weights = torch.rand(pairs, generator=generator, dtype=dtype)
    experts = len(counts)
    return (
        normal(num_rows, hidden),
        ids,
        weights,
        normal(experts, 2 * width, hidden) / hidden**0.5,
        normal(experts, hidden, width) / width**0.5,
        normal(num_rows, hidden),
    )


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.sampled_from([0, 1, 2, 7, 30]), min_size=1, max_size=9),
    num_rows=st.integers(1, 20),
    hidden=st.integers(1, 19) | st.sampled_from([64, 65, 96, 97, 150]),  # sums and columns of several blocks
    width=st.integers(1, 19) | st.sampled_from([64, 65, 96, 97, 150]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    accumulate=st.tuples(st.booleans(), st.booleans()),
    threads=st.sampled_from([1, 2, 3]),
)
def test_kernel_against_its_twin(
    counts: list[int],
    num_rows: int,
    hidden: int,
    width: int,
    dtype: torch.dtype,
    accumulate: tuple[bool, bool],
    threads: int,
) -> None:
    case = make_case(counts, num_rows, hidden, width, dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = all_gradients(grouped_swiglu_cpu, case, counts, accumulate)
    finally:
        torch.set_num_threads(before)
    expected = all_gradients(grouped_swiglu, case, counts, accumulate)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 10)


def compare_with_twins(device: str) -> None:
    """Some odd sizes, for runs in which hypothesis has no place."""
    assert load_cpu_library()
    torch.set_num_threads(2)
    for counts, hidden, width in (([7, 0, 1], 5, 3), ([30, 2, 2], 65, 19), ([33, 1], 19, 150)):
        for dtype in (torch.float32, torch.float64):
            case = make_case(counts, 9, hidden, width, dtype)
            for accumulate in ((False, False), (True, True)):
                results = (all_gradients(module, case, counts, accumulate) for module in IMPLEMENTATIONS)
                for one, other in zip(*results, strict=True):
                    torch.testing.assert_close(one, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 10)
            x, weight = case[0].requires_grad_(), torch.rand(hidden, dtype=dtype, requires_grad=True)
            results = (
                [y, *torch.autograd.grad(y.sum(), (x, weight))]
                for y in (rms_norm(x, weight, 1e-5), torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-5))
            )
            for one, other in zip(*results, strict=True):
                torch.testing.assert_close(one, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 10)
            heads = torch.randn(2, 3, 5, 2 * width, dtype=dtype)
            tables = rope_tables(0, 5, 2 * width, 1e4, torch.device(device))
            torch.testing.assert_close(rotate(heads, *tables), torch_rotate(heads, *tables))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("counts", [[1700, 3, 0, 17], [600, 600, 600, 600, 5]])
def test_experts_of_several_blocks_and_the_same_bits_each_time(counts: list[int], threads: int) -> None:
    case = make_case(counts, 700, 24, 75, torch.float64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got, again = (all_gradients(grouped_swiglu_cpu, case, counts, (False, False)) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(got, all_gradients(grouped_swiglu, case, counts, (False, False)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    for one, other in zip(got, again, strict=True):
        assert torch.equal(one, other)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 700), st.integers(1, 70)),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    threads=st.sampled_from([1, 2, 3]),
)
def test_rms_norm_against_torch(shape: tuple[int, int, int], dtype: torch.dtype, threads: int) -> None:
    generator = torch.Generator().manual_seed(shape[1])
    x, grad = (torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for _ in range(2))
    weight = torch.randn(shape[-1:], generator=generator, dtype=dtype).requires_grad_()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runs = []
        for _ in range(2):
            y = rms_norm(x, weight, 1e-5)
            assert "_RMSNorm" in str(y.grad_fn)
            runs.append([y, *torch.autograd.grad(y, (x, weight), grad)])
    finally:
        torch.set_num_threads(before)
    y = torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-5)
    expected = [y, *torch.autograd.grad(y, (x, weight), grad)]
    for one, again, other in zip(*runs, expected, strict=True):
        assert torch.equal(one, again)
        torch.testing.assert_close(one, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 10)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 40), st.integers(1, 19)),
    heads_first=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_rotation_against_its_twin(sizes: tuple[int, int, int, int], heads_first: bool, dtype: torch.dtype) -> None:
    batch, heads, length, half = sizes
    generator = torch.Generator().manual_seed(length)
    shape = (batch, heads, length, 2 * half) if heads_first else (batch, length, heads, 2 * half)
    x, grad = (torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for _ in range(2))
    tables = rope_tables(3, length, 2 * half, 1e4, torch.device("cpu"))
    results = []
    for function in (rotate, torch_rotate):
        y = function(x if heads_first else x.transpose(1, 2), *tables)
        upstream = grad if heads_first else grad.transpose(1, 2)
        results.append([y, *torch.autograd.grad(y, (x,), upstream)])
    assert results[0][0].stride() == (x if heads_first else x.transpose(1, 2)).stride()
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_the_kernel_serves_this_machine() -> None:
    counts = [2, 0, 3]
    rows, ids, weights, *_ = make_case(counts, 4, 3, 2, torch.float32)
    groups = PairGroups(ids, weights, counts)
    assert grouped_swiglu_cpu.serves(rows, groups)
    assert not grouped_swiglu_cpu.serves(rows.bfloat16(), groups)


def test_a_compiled_model_takes_what_the_compiler_can_look_into() -> None:
    """Norm and positions in one graph; with the kernels torch's compiler fails."""
    x, weight = torch.randn(1, 2, 3, 8, requires_grad=True), torch.rand(8)
    tables = rope_tables(0, 3, 8, 1e4, x.device)

    def both(x: Tensor) -> Tensor:
        return rotate(rms_norm(x, weight, 1e-5), *tables)

    torch.testing.assert_close(torch.compile(both, backend="eager", fullgraph=True)(x), both(x))


def run_without(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    program = """
import torch
from ds_remoe.kernels import grouped_swiglu
from ds_remoe.kernels.pair_groups import PairGroups
ids = torch.tensor([0, 1])
out = torch.empty(2, 3)
groups = PairGroups(ids, torch.ones(2), [2])
grouped_swiglu.forward(torch.ones(2, 3), groups, torch.ones(1, 4, 3), torch.ones(1, 3, 2), out)
print(out.sum().item(), hasattr(torch.ops.ds_remoe, "grouped_swiglu"))
"""
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), **environment}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)


def test_without_a_compiler_the_twin_serves_and_says_so_once(tmp_path: Path) -> None:
    result = run_without(tmp_path, CXX="no-such-compiler")
    assert result.stdout.split()[1] == "False"
    assert result.stderr.count("no C++ compiler `no-such-compiler`; install g++") == 1
    broken = run_without(tmp_path, CXX="c++ --no-such-option")
    assert "the CPU kernels are not available" in broken.stderr
    assert broken.stdout == result.stdout
    assert list(tmp_path.rglob("*.so")) == []


def test_the_torch_twins_on_request(tmp_path: Path) -> None:
    result = run_without(tmp_path, DS_REMOE_KERNELS="torch")
    assert result.stdout.split()[1] == "False"
    assert result.stderr == ""
