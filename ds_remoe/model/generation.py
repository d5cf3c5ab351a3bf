"""Generation with a key/value cache."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ds_remoe.model.attention import KVCache
from ds_remoe.model.decoder import Decoder


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt_ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    eos_id: int | None = None,
) -> Tensor:
    """Continue prompts of one length.

    With experts on several ranks (moe.ep_size > 1) all ranks of a group must call it together with the same
    max_new_tokens; prompts, their number and their length may differ. Each rank then runs all the steps, also when its
    own sequences have ended.

    Args:
        model: a Decoder, or an engine that holds one as `.module`.
        prompt_ids: int64 [B, S0] on the model's device, S0 >= 1.
        max_new_tokens: N, tokens to add to each prompt.
        temperature: 0 takes the likeliest token; otherwise logits / temperature are sampled from.
        top_p: sample from the fewest tokens whose probabilities sum to at least this (arXiv 1904.09751).
        generator: source of random numbers, on the model's device. Default: torch's global one.
        eos_id: token that ends a sequence.

    Returns:
        int64 [B, S0 + N]: the prompts and what follows; a sequence that ended is filled up with eos_id.

    Raises:
        TypeError, ValueError: for a wrong argument, one that would go past model.seq_length included.
    """
    decoder = _decoder_of(model)
    _check(decoder, prompt_ids, max_new_tokens, temperature, top_p, eos_id)
    batch, prompt_length = prompt_ids.shape
    total = prompt_length + max_new_tokens
    ids_BP = torch.cat((prompt_ids, prompt_ids.new_full((batch, max_new_tokens), eos_id or 0)), dim=1)
    ended_B = torch.zeros(batch, dtype=torch.bool, device=prompt_ids.device)
    may_stop = eos_id is not None and decoder.moe_config.ep_size == 1
    cache = KVCache(decoder.model_config.num_layers, total)
    was_training = decoder.training
    decoder.eval()
    try:
        for end in range(prompt_length, total):
            logits_BSV = decoder(ids_BP[:, cache.length : end], cache=cache).logits
            next_B = _choose(logits_BSV[:, -1], temperature, top_p, generator)
            if eos_id is not None:
                next_B = next_B.masked_fill(ended_B, eos_id)
                ended_B |= next_B == eos_id
            ids_BP[:, end] = next_B
            if may_stop and bool(ended_B.all()):
                break
    finally:
        decoder.train(was_training)
    return ids_BP


def _choose(logits_BV: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0.0:
        return logits_BV.argmax(dim=-1)
    logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    # With the maximum at 0 no small temperature overflows.
    probs_BV = torch.softmax((logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / temperature, dim=-1)
    if top_p < 1.0:
        sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
        # A token stays if those before it do not yet reach top_p; the first always does.
        outside_BV = sorted_BV.cumsum(dim=-1) - sorted_BV >= top_p
        probs_BV = torch.zeros_like(probs_BV).scatter(-1, order_BV, sorted_BV.masked_fill(outside_BV, 0.0))
    return torch.multinomial(probs_BV, 1, generator=generator).squeeze(-1)


def _decoder_of(model: nn.Module) -> Decoder:
    inner: object = model
    while inner is not None and not isinstance(inner, Decoder):
        inner = getattr(inner, "module", None)
    if inner is None:
        raise TypeError(f"model: {type(model).__name__} is no Decoder and holds none as .module")
    return inner


def _check(
    decoder: Decoder, prompt_ids: Tensor, max_new_tokens: int, temperature: float, top_p: float, eos_id: int | None
) -> None:
    if prompt_ids.dtype != torch.int64:
        raise TypeError(f"prompt_ids: dtype is {prompt_ids.dtype}, but must be torch.int64")
    if prompt_ids.ndim != 2 or prompt_ids.numel() == 0:
        raise ValueError(f"prompt_ids: shape is {tuple(prompt_ids.shape)}, but must be [B, S0], both at least 1")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens = {max_new_tokens}: must not be negative")
    limit, wanted = decoder.model_config.seq_length, prompt_ids.shape[1] + max_new_tokens
    if wanted > limit:
        raise ValueError(
            f"max_new_tokens = {max_new_tokens}: with a prompt of {prompt_ids.shape[1]} tokens it needs {wanted} "
            f"positions, but model.seq_length = {limit}; shorten the prompt or ask for fewer tokens"
        )
    if not temperature >= 0.0:
        raise ValueError(f"temperature = {temperature}: must be 0 (greedy) or positive")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p = {top_p}: must be above 0 and at most 1")
    if eos_id is not None and not 0 <= eos_id < decoder.vocab_size:
        raise ValueError(f"eos_id = {eos_id}: must be between 0 and vocab_size - 1 = {decoder.vocab_size - 1}")
