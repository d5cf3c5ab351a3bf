"""The language-model loss from hidden states, some tokens' logits at a time.

All logits of a micro-batch are its largest tensor: 16 sequences of 1,024 tokens and 51,200 words take 3.1 GiB in fp32,
with their log-probabilities and gradients three times that. Here each block of tokens goes through head, loss and both
gradients at once, so that none of the head's GEMMs is done twice and one block's logits exist at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from ds_remoe.kernels.first_order import first_order

IGNORED_LABEL = -100
LOSS_RANGE = "ds_remoe head loss"
"""The name in a profile of the loss past its matrix products."""

BLOCK_LOGITS = 2**26
"""Logits of a block: they keep a GPU busy, and the head's gradient is seldom added to."""
LEAST_BLOCK_TOKENS, MOST_BLOCK_TOKENS = 128, 2048
"""With fewer the GEMMs mostly wait for the head's weights; with more a block's gradient could exceed fp16."""


def block_tokens(vocab_size: int) -> int:
    """Most tokens of a block."""
    return min(max(BLOCK_LOGITS // vocab_size, LEAST_BLOCK_TOKENS), MOST_BLOCK_TOKENS)


def head_loss(x_BSD: Tensor, head_VD: Tensor, labels_BS: Tensor) -> Tensor:
    """Mean cross entropy in nats of the logits x · headᵀ over the labels that are not -100; 0 without any.

    Logits are in the dtype of `x_BSD` and `head_VD`, or of autocast, as nn.Linear's; their softmax and the loss are in
    fp32 or wider. The head's gradient is summed over the blocks in fp32 or wider.

    Args:
        x_BSD: hidden states, normalised.
        head_VD: the head's weight.
        labels_BS: int64, the token to predict at each position.

    Returns:
        A scalar in fp32, in fp64 for fp64 states.

    Raises:
        RuntimeError: a label is outside of the vocabulary; on a GPU the device asserts.
    """
    device = x_BSD.device.type
    if torch.is_autocast_enabled(device) and x_BSD.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x_BSD, head_VD = x_BSD.to(dtype), head_VD.to(dtype)
    valid_T = (labels_BS != IGNORED_LABEL).flatten()
    total: Tensor = _HeadLoss.apply(x_BSD.flatten(0, 1), head_VD, labels_BS.flatten(), valid_T, torch.is_grad_enabled())
    return total / valid_T.sum().clamp(min=1)


class _HeadLoss(torch.autograd.Function):
    """The summed loss. Gradients of the sum are made in forward, and multiplied in backward by what comes there."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, head_VD: Tensor, labels_T: Tensor, valid_T: Tensor, with_gradients: bool
    ) -> Tensor:
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        for_x, for_head = (with_gradients and needed for needed in ctx.needs_input_grad[:2])
        grad_x_TD, grad_head_VD = torch.empty_like(x_TD) if for_x else None, None
        losses = []
        for span in _blocks(len(x_TD), block_tokens(len(head_VD))):
            x = x_TD[span]
            loss, grad_logits = _block_loss(x @ head_VD.t(), labels_T[span], valid_T[span], wide, for_x or for_head)
            losses.append(loss)
            if grad_x_TD is not None:
                torch.mm(grad_logits, head_VD, out=grad_x_TD[span])
            if grad_head_VD is not None:
                grad_head_VD = _add_product(grad_head_VD.to(wide), grad_logits.t(), x)
            elif for_head:
                grad_head_VD = grad_logits.t() @ x
            del loss, grad_logits  # before the next block's are made
        ctx.dtypes = x_TD.dtype, head_VD.dtype
        ctx.save_for_backward(grad_x_TD, grad_head_VD)
        return torch.stack(losses).sum()

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *(_scaled(*pair, grads[0]) for pair in zip(ctx.saved_tensors, ctx.dtypes, strict=True)), None, None, None


def _scaled(grad: Tensor | None, dtype: torch.dtype, by: Tensor) -> Tensor | None:
    """The product, rounded once and not the factor before it."""
    if grad is None:
        return None
    if grad.dtype == by.dtype:
        return torch.mul(grad, by, out=grad.new_empty(grad.shape, dtype=dtype))
    return (grad.to(by.dtype) * by).to(dtype)


def _blocks(tokens: int, limit: int) -> list[slice]:
    """Even blocks of at most `limit` tokens, at least one."""
    number = max(-(-tokens // limit), 1)
    return [slice(tokens * i // number, tokens * (i + 1) // number) for i in range(number)]


def _block_loss(
    logits: Tensor, labels: Tensor, valid: Tensor, wide: torch.dtype, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The summed loss and its gradient by the logits, which takes their place."""
    with record_function(LOSS_RANGE):
        label = labels.masked_fill(~valid, 0).unsqueeze(1)
        log_probs = torch.log_softmax(logits, dim=1, dtype=wide)
        loss = torch.where(valid, -log_probs.gather(1, label).squeeze(1), 0).sum()
        if with_gradient:
            probs = log_probs.exp_()
            probs.scatter_(1, label, probs.gather(1, label) - 1)
            torch.mul(probs, valid.unsqueeze(1), out=logits)
    return loss, logits


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total += a · b, which is rounded to the factors' dtype before where that is narrower."""
    return total.addmm_(a, b) if a.dtype == total.dtype else total.add_(a @ b)
