"""The blockwise loss against torch's on all logits: values, gradients, ignored labels, dtypes, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ds_remoe.model import loss
from ds_remoe.model.loss import IGNORED_LABEL, block_tokens, head_loss

BATCH, LENGTH, HIDDEN, VOCAB = 2, 173, 12, 37


@pytest.fixture(params=[1, loss.BLOCK_LOGITS], ids=["three blocks", "one block"])
def block_logits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "BLOCK_LOGITS", request.param)


class Operators(TorchDispatchMode):
    """Counts matrix products, and measures the largest tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def make_case(dtype: torch.dtype, ignored: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, LENGTH, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    head = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < ignored] = IGNORED_LABEL
    return x.requires_grad_(), head.requires_grad_(), labels


def whole_loss(x: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    logits = (x @ head.t()).flatten(0, 1)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels.flatten())


@pytest.mark.usefixtures("block_logits")
@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_fp64_loss_and_gradients_equal_those_of_all_logits(ignored: float) -> None:
    x, head, labels = make_case(torch.float64, ignored)
    got, expected = head_loss(x, head, labels), whole_loss(x, head, labels)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    gradients = (torch.autograd.grad(-3.7 * value, (x, head)) for value in (got, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


@pytest.mark.usefixtures("block_logits")
def test_bf16_loss_is_fp32_and_gradients_are_nearly_as_exact_as_torch_s() -> None:
    x, head, labels = make_case(torch.bfloat16)
    wide = [t.detach().double().requires_grad_() for t in (x, head)]
    exact = torch.autograd.grad(whole_loss(*wide, labels), wide)
    got, expected = head_loss(x, head, labels), whole_loss(x, head, labels)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    ours, theirs = (torch.autograd.grad(value, (x, head)) for value in (got, expected))
    for mine, other, right in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        # The tokens' gradient is rounded once more when it is scaled.
        assert (mine - right).norm() <= 1.25 * (other - right).norm()


@pytest.mark.parametrize("sequences", [0, BATCH])
def test_no_label_to_predict_is_zero_with_zero_gradients(sequences: int) -> None:
    """Where all are ignored, or there are none, as on a rank whose share of a batch is empty."""
    x, head, labels = make_case(torch.float32, ignored=1.1)
    x, labels = x.detach()[:sequences].requires_grad_(), labels[:sequences]
    got = head_loss(x, head, labels)
    got.backward()
    assert got == 0
    assert x.grad is not None
    assert head.grad is not None
    assert not x.grad.any()
    assert not head.grad.any()


@pytest.mark.usefixtures("block_logits")
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_side_gets_no_gradient_and_leaves_the_other_s_as_it_is(frozen: int) -> None:
    *sides, labels = make_case(torch.float64)
    whole = torch.autograd.grad(head_loss(*sides, labels), sides)
    sides[frozen] = sides[frozen].detach()
    (got,) = torch.autograd.grad(head_loss(*sides, labels), sides[1 - frozen])
    assert torch.equal(got, whole[1 - frozen])


def test_only_the_products_that_are_wanted_are_taken() -> None:
    *sides, labels = make_case(torch.float32)
    with Operators() as both:
        head_loss(*sides, labels)
    with Operators() as one:
        head_loss(sides[0].detach(), sides[1], labels)
    with Operators() as none, torch.no_grad():
        head_loss(*sides, labels)
    assert [seen.products for seen in (both, one, none)] == [3, 2, 1]


def test_gradients_can_be_taken_twice() -> None:
    x, head, labels = make_case(torch.float64)
    value = head_loss(x, head, labels)
    once = torch.autograd.grad(value, (x, head), retain_graph=True)
    again = torch.autograd.grad(value, (x, head))
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))


def test_autocast_computes_the_logits_in_its_dtype() -> None:
    x, head, labels = make_case(torch.float32)
    narrow = head_loss(x.bfloat16(), head.bfloat16(), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = head_loss(x, head, labels)
    assert torch.equal(got, narrow)
    assert [g.dtype for g in torch.autograd.grad(got, (x, head))] == [torch.float32] * 2


def test_a_loss_that_overflows_is_not_hidden() -> None:
    x, head, labels = make_case(torch.float32)
    with torch.no_grad():
        x[0, 3] = float("inf")
    assert not head_loss(x, head, labels).isfinite()


@pytest.mark.parametrize("label", [-1, VOCAB])
def test_a_label_outside_of_the_vocabulary_is_refused(label: int) -> None:
    x, head, labels = make_case(torch.float32)
    labels[1, 2] = label
    with pytest.raises(RuntimeError, match=f"index {label} is out of bounds"):
        head_loss(x, head, labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_a_block_s_logits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "BLOCK_LOGITS", 1)
    x, head, labels = make_case(dtype)
    with Operators() as seen:
        head_loss(x, head, labels).backward()
    limit = max(block_tokens(VOCAB) * VOCAB, x.numel(), head.numel())
    assert limit < x.shape[0] * x.shape[1] * VOCAB
    assert seen.largest <= limit


def test_many_blocks_sum_a_narrow_head_s_gradient_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "BLOCK_LOGITS", 1)
    monkeypatch.setattr(loss, "LEAST_BLOCK_TOKENS", 2)
    x, head, labels = make_case(torch.bfloat16)
    wide = [t.detach().double().requires_grad_() for t in (x, head)]
    (exact,) = torch.autograd.grad(whole_loss(*wide, labels), wide[1])
    (got,) = torch.autograd.grad(head_loss(x, head, labels), head)
    (torch_s,) = torch.autograd.grad(whole_loss(x, head, labels), head)
    assert (got - exact).norm() <= 1.25 * (torch_s - exact).norm()


def test_fp16_gradients_bear_a_loss_scale_and_many_alike_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block's gradient is not scaled yet, so it must stay within fp16 by itself."""
    tokens, scale = 4 * loss.MOST_BLOCK_TOKENS, 1024.0
    x = torch.full((1, tokens, 2), 24.0, dtype=torch.float16, requires_grad=True)
    head = torch.zeros(3, 2, dtype=torch.float16, requires_grad=True)
    labels = torch.zeros(1, tokens, dtype=torch.int64)
    ours, torch_s = (torch.autograd.grad(scale * f(x, head, labels), (x, head)) for f in (head_loss, whole_loss))
    assert all(gradient.isfinite().all() for gradient in ours)
    for one, other in zip(ours, torch_s, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-6)
