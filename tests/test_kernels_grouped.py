"""The GPU paths of the grouped SwiGLU against its torch twin: Triton under the interpreter, grouped_mm on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ds_remoe.kernels import grouped_swiglu_grouped_mm
from ds_remoe.kernels.grouped_swiglu import torch_backward, torch_forward
from ds_remoe.kernels.grouped_swiglu_triton_schedule import (
    MAX_ROWS,
    MIN_ROWS,
    expert_table,
    tile_rows,
    tile_table,
)
from ds_remoe.kernels.pair_groups import PairGroups, RowOrder

# Pairs per expert, rows, D, H. Under the interpreter blocks are 32 x 32, tiles 16 or 32 pairs high.
LARGER_THAN_A_BLOCK = ([33, 0, 1, 5], 9, 37, 45)
SHAPES = [LARGER_THAN_A_BLOCK, ([0, 40, 0], 6, 3, 1), ([0, 0], 4, 5, 7), ([1, 1, 1], 5, 32, 64)]
GPU_SHAPES = [*SHAPES, ([700, 0, 129, 1], 300, 520, 392), ([40] * 16, 200, 264, 152)]
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Largest error relative to the largest entry of a tensor; the routing weights' gradient is a sum over H products."""

counts_lists = st.lists(st.integers(0, 300), min_size=1, max_size=12)


@given(counts_lists, st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_tiles_cover_every_pair_once(counts: list[int], dtype: torch.dtype) -> None:
    rows = tile_rows(counts, dtype)
    assert MIN_ROWS <= rows <= MAX_ROWS
    assert rows & (rows - 1) == 0
    table = tile_table(counts, rows)
    assert table.dtype == np.int32
    covered = [(expert, pair) for expert, start, size in table.tolist() for pair in range(start, start + size)]
    experts = np.repeat(np.arange(len(counts)), counts).tolist()
    assert covered == list(zip(experts, range(sum(counts)), strict=True))
    assert all(0 < size <= rows for size in table[:, 2])
    assert len(table) == sum(-(-count // rows) for count in counts), "a program has nothing to do"


@given(counts_lists)
def test_the_experts_stand_longest_first(counts: list[int]) -> None:
    table = expert_table(counts, with_empty=True).tolist()
    assert sorted(table) == [[e, sum(counts[:e]), count] for e, count in enumerate(counts)]
    assert [row[2] for row in table] == sorted(counts, reverse=True)
    assert expert_table(counts, with_empty=False).tolist() == [row for row in table if row[2]]


def run(
    module: ModuleType, shape: tuple[list[int], int, int, int], dtype: torch.dtype, device: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Results of a module and of the twin in fp64; both backwards start from the module's pre-activation."""
    counts, num_rows, d, h = shape
    generator = torch.Generator().manual_seed(d)

    def draw(*sizes: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*sizes, generator=generator)).to(device, dtype)

    rows, grad_out = draw(num_rows, d), draw(num_rows, d)
    gate_up, down = draw(len(counts), 2 * h, d, scale=d**-0.5), draw(len(counts), d, h, scale=h**-0.5)
    ids = torch.randint(num_rows, (sum(counts),), generator=generator).to(device)
    weights = torch.rand(sum(counts), generator=generator).to(device)
    before = {
        name: torch.randn(num_rows, d, generator=generator).to(device) for name in ("added_out", "added_grad_rows")
    }
    left_over = torch.full_like(gate_up, 9.0), torch.full_like(down, 9.0)

    got = {name: tensor.clone() for name, tensor in before.items()}
    groups = PairGroups(ids, weights, counts)
    got["out"], got["grad_rows"] = torch.full_like(rows, 9.0), torch.full_like(rows, 9.0)
    got["pre_activation"] = module.forward(rows, groups, gate_up, down, got["out"])
    module.forward(rows, groups, gate_up, down, got["added_out"], accumulate=True)
    assert torch.equal(module.up_projection(rows, groups, gate_up), got["pre_activation"])
    got["grad_gate_up"], got["grad_down"] = (tensor.clone() for tensor in left_over)
    arguments = grad_out, rows, groups, gate_up, down, got["pre_activation"]
    got["grad_weights"] = module.backward(*arguments, got["grad_rows"], got["grad_gate_up"], got["grad_down"])
    got["added_gate_up"], got["added_down"] = (tensor.clone() for tensor in left_over)
    module.backward(*arguments, got["added_grad_rows"], got["added_gate_up"], got["added_down"], True, True)

    expected = {name: tensor.double() for name, tensor in before.items()}
    groups = PairGroups(ids, weights.double(), counts)
    expected["out"], expected["grad_rows"] = (torch.empty_like(rows, dtype=torch.float64) for _ in range(2))
    expected["pre_activation"] = torch_forward(rows.double(), groups, gate_up.double(), down.double(), expected["out"])
    expected["grad_gate_up"], expected["grad_down"] = (torch.empty_like(t).double() for t in left_over)
    expected["grad_weights"] = torch_backward(
        grad_out.double(),
        rows.double(),
        groups,
        gate_up.double(),
        down.double(),
        got["pre_activation"].double(),
        expected["grad_rows"],
        expected["grad_gate_up"],
        expected["grad_down"],
    )
    expected["added_out"] += expected["out"]
    expected["added_grad_rows"] += expected["grad_rows"]
    expected["added_gate_up"], expected["added_down"] = expected["grad_gate_up"] + 9.0, expected["grad_down"] + 9.0
    return got, expected


def compare(
    module: ModuleType, shape: tuple[list[int], int, int, int], dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    got, expected = run(module, shape, dtype, device)
    for name, tensor in got.items():
        assert tensor.shape == expected[name].shape, name
        if tensor.numel():
            error = (tensor.double() - expected[name]).abs().max() / expected[name].abs().max().clamp_min(1.0)
            assert error <= TOLERANCES[dtype], f"{name} of {shape} in {dtype}: {float(error):.2e}"
    for expert, count in enumerate(shape[0]):
        if count == 0:
            assert not got["grad_gate_up"][expert].any(), "gradient of an expert without pairs"
            assert not got["grad_down"][expert].any(), "gradient of an expert without pairs"
    return got


def compare_triton(device: str) -> None:
    """The Triton kernels against the twin: all shapes in fp32, the largest in the half precisions."""
    from ds_remoe.kernels import grouped_swiglu_triton

    shapes = SHAPES if device == "cpu" else GPU_SHAPES
    for shape in shapes:
        first = compare(grouped_swiglu_triton, shape, torch.float32, device)
    again, _ = run(grouped_swiglu_triton, shapes[-1], torch.float32, device)
    assert all(torch.equal(first[name], again[name]) for name in first), "a repeat gave other bits"
    compare_sums(device)
    halves = shapes[:1] if device == "cpu" else shapes
    for dtype in (torch.bfloat16, torch.float16):
        for shape in halves:
            compare(grouped_swiglu_triton, shape, dtype, device)


def compare_sums(device: str) -> None:
    """The sums of rows, at once and in parts of the list of pairs, against index_add_ in fp64."""
    from ds_remoe.kernels.row_sums_triton import sum_rows

    generator = torch.Generator().manual_seed(0)
    ids, values = torch.randint(5, (40,), generator=generator).to(device) + 1, torch.randn(40, 3, generator=generator)
    values, order = values.to(device), RowOrder.of(ids, 7)
    whole, parts = torch.full((7, 3), 9.0, device=device), torch.full((7, 3), 9.0, device=device)
    sum_rows(values, order, whole, accumulate=False)
    for part in (slice(0, 13), slice(13, 13), slice(13, 40)):
        sum_rows(values[part], replace(order, first=part.start), parts, accumulate=part.start > 0)
    expected = torch.zeros(7, 3, dtype=torch.float64, device=device).index_add_(0, ids, values.double())
    torch.testing.assert_close(whole.double(), expected)
    assert not whole[[0, 6]].any(), "rows without pairs"
    assert torch.equal(parts, whole), "parts are added in another order"


def test_triton_under_the_interpreter() -> None:
    """In a process of its own, as Triton reads TRITON_INTERPRET when its kernels are defined."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent)}
    program = "from test_kernels_grouped import compare_triton; compare_triton('cpu')"
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("limits", [(64 << 10, 64), (99 << 10, 64), (227 << 10, 128)])
def test_every_device_has_a_shape(limits: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    from ds_remoe.kernels import grouped_swiglu_triton_kernels as kernels
    from ds_remoe.kernels import grouped_swiglu_triton_tuning as tuning

    monkeypatch.setattr(tuning, "_limits", lambda device: limits)
    for kernel in (kernels.swiglu_forward, kernels.swiglu_backward, kernels.pair_matmul, kernels.weight_gradient):
        for dtype in TOLERANCES:
            for rows in (16, 32, 64, 128)[: 3 if dtype == torch.float32 else 4]:
                monkeypatch.setenv("DS_REMOE_AUTOTUNE", "on")
                tensor = torch.empty(1, dtype=dtype)
                tuned = kernel.early_config_prune(kernel.configs, {"rows": tensor}, BLOCK_M=rows)
                monkeypatch.setenv("DS_REMOE_AUTOTUNE", "off")
                assert kernel.early_config_prune(kernel.configs, {"rows": tensor}, BLOCK_M=rows) == tuned[:1]
    monkeypatch.setenv("DS_REMOE_AUTOTUNE", "no")
    with pytest.raises(ValueError, match="DS_REMOE_AUTOTUNE = 'no': must be 'on' or 'off'"):
        kernel.early_config_prune(kernel.configs, {"rows": tensor}, BLOCK_M=16)


def test_ranks_of_a_machine_take_the_timings_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from ds_remoe.kernels.grouped_swiglu_triton_tuning import one_at_a_time

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    kept, together = tmp_path / "timings", Barrier(4)

    def read_or_time(rank: int) -> bool:
        if kept.exists():
            return True
        time.sleep(0.05)
        kept.write_text(str(rank))
        return False

    def start(rank: int) -> bool:
        together.wait()
        return one_at_a_time(read_or_time)(rank)

    with ThreadPoolExecutor(4) as ranks:
        assert sorted(ranks.map(start, range(4))) == [False, True, True, True]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the interpreter covers the logic")
def test_triton_on_the_gpu() -> None:
    compare_triton("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_grouped_mm(device: str, dtype: torch.dtype) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; the CPU covers the logic")
    for counts in ([33, 0, 1, 5], [0, 9], [0, 0]):
        compare(grouped_swiglu_grouped_mm, (counts, 9, 40, 48), dtype, device)


def test_grouped_mm_says_why_it_cannot_run() -> None:
    why_not = grouped_swiglu_grouped_mm.why_not
    assert why_not(torch.empty(1, 40), torch.empty(1, 96, 40)) is None
    reason = why_not(torch.empty(1, 40, dtype=torch.bfloat16), torch.empty(1, 90, 40))
    assert reason == "expert width 45 in torch.bfloat16 is no multiple of 16 bytes"
    assert why_not(torch.empty(1, 40, dtype=torch.float64), torch.empty(1, 96, 40)) == "it does not take torch.float64"


def test_the_choice_of_the_gpu_path(monkeypatch: pytest.MonkeyPatch) -> None:
    from ds_remoe.kernels import grouped_swiglu_gpu

    empty = torch.empty(0, dtype=torch.int64)
    groups = PairGroups(empty, torch.empty(0), [0])
    arguments = torch.ones(1, 3), groups, torch.ones(1, 10, 3), torch.ones(1, 3, 5), torch.zeros(1, 3)
    monkeypatch.setenv("DS_REMOE_GROUPED", "torch")
    with pytest.raises(ValueError, match="DS_REMOE_GROUPED = 'torch': must be 'triton' or 'grouped_mm'"):
        grouped_swiglu_gpu.forward(*arguments)
    monkeypatch.setenv("DS_REMOE_GROUPED", "grouped_mm")
    with pytest.raises(ValueError, match=r"hidden size 3 in torch\.float32 is no multiple of 16 bytes; unset it"):
        grouped_swiglu_gpu.forward(*arguments)
    monkeypatch.delenv("DS_REMOE_GROUPED")
    assert grouped_swiglu_gpu.forward(*arguments).shape == (0, 10)


def test_triton_refuses_other_dtypes_and_layouts() -> None:
    from ds_remoe.kernels.grouped_swiglu_triton import forward

    ids = torch.zeros(1, dtype=torch.int64)
    groups = PairGroups(ids, torch.ones(1), [1])
    rows, gate_up, down, out = torch.ones(1, 4), torch.ones(1, 4, 4), torch.ones(1, 4, 2), torch.zeros(4, 1)
    with pytest.raises(TypeError, match=r"rows torch\.float64"):
        forward(rows.double(), groups, gate_up.double(), down.double(), out)
    with pytest.raises(TypeError, match=r"gate_up torch\.bfloat16"):
        forward(rows, groups, gate_up.bfloat16(), down, out)
    with pytest.raises(ValueError, match="out has strides"):
        forward(rows, groups, gate_up, down, torch.zeros(4, 2).t())
