"""Each Triton kernel against its torch twin, under Triton's interpreter, and the twin against autograd."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ds_remoe.kernels.backend import on_its_device
from ds_remoe.kernels.swiglu import torch_weighted_swiglu, torch_weighted_swiglu_backward

SHAPES = [(1, 1), (3, 5), (17, 64), (8, 100), (2, 2049)]


@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_twin_against_autograd(rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    gate_up = torch.randn(rows, 2 * width, dtype=torch.float64, generator=generator, requires_grad=True)
    weights = torch.rand(rows, dtype=torch.float64, generator=generator, requires_grad=True)
    gate, up = gate_up.chunk(2, dim=-1)
    expected = weights[:, None] * F.silu(gate) * up
    upstream = torch.randn(rows, width, dtype=torch.float64, generator=generator)
    expected.backward(upstream)
    torch.testing.assert_close(torch_weighted_swiglu(gate_up.detach(), weights.detach()), expected.detach())
    grad_gate_up, grad_weights, out = torch_weighted_swiglu_backward(upstream, gate_up.detach(), weights.detach())
    torch.testing.assert_close(grad_gate_up, gate_up.grad)
    torch.testing.assert_close(grad_weights, weights.grad)
    torch.testing.assert_close(out, expected.detach())


def test_kernels_are_launched_on_the_device_of_their_first_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.Tensor] = []

    @contextlib.contextmanager
    def device_of(tensor: torch.Tensor):  # type: ignore[no-untyped-def]
        entered.append(tensor)
        yield
        entered.clear()

    @on_its_device
    def launch(nothing: None, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        assert entered[0] is first
        return second

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    second = torch.ones(2)
    assert launch(None, torch.zeros(1), second) is second
    assert not entered


def compare_with_twin(device: str) -> None:
    """The public functions, which take the Triton kernels here, against the twins."""
    from ds_remoe.kernels.backend import use_triton
    from ds_remoe.kernels.swiglu import weighted_swiglu, weighted_swiglu_backward

    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        for rows, width in SHAPES:
            generator = torch.Generator().manual_seed(width)
            gate_up = torch.randn(rows, 2 * width, generator=generator).to(device, dtype)
            weights = torch.rand(rows, generator=generator).to(device)
            upstream = torch.randn(rows, width, generator=generator).to(device, dtype)
            assert use_triton(gate_up), "the kernel would not run"
            torch.testing.assert_close(
                weighted_swiglu(gate_up, weights),
                torch_weighted_swiglu(gate_up, weights),
                rtol=tolerance,
                atol=tolerance,
            )
            for got, expected in zip(
                weighted_swiglu_backward(upstream, gate_up, weights),
                torch_weighted_swiglu_backward(upstream, gate_up, weights),
                strict=True,
            ):
                scale = max(1.0, width**0.5) if got.dim() == 1 else 1.0
                torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * scale)


def test_triton_kernels_under_the_interpreter() -> None:
    """In a process of its own, as Triton reads TRITON_INTERPRET when its kernels are defined."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent)}
    program = "from test_kernels import compare_with_twin; compare_with_twin('cpu')"
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the interpreter covers the logic")
def test_triton_kernels_on_the_gpu() -> None:
    compare_with_twin("cuda")


def test_an_unknown_kernel_choice_is_refused() -> None:
    environment = {**os.environ, "DS_REMOE_KERNELS": "cuda"}
    program = "import torch; from ds_remoe.kernels.backend import use_triton; use_triton(torch.ones(1))"
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "DS_REMOE_KERNELS = 'cuda': must be 'auto' or 'torch'" in result.stderr
