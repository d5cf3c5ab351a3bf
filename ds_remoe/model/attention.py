"""Causal grouped-query attention with rotary positions, and the key/value cache of generation.

Shape suffixes of this room: B sequences, S positions of this call, P positions of the cache and this call together,
D hidden size, H query heads, K key/value heads, h head width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_remoe.config.schema import ModelConfig
from ds_remoe.kernels.rope import rotate


class Rope(NamedTuple):
    """Rotary tables of consecutive positions: fp32 [S, h/2] each."""

    cos: Tensor
    sin: Tensor


def rope_tables(start: int, length: int, head_size: int, base: float, device: torch.device) -> Rope:
    """Rotary angles p·base^(-2i/h) (arXiv 2104.09864) of the positions p = start ... start + length - 1.

    They are computed in fp64 and kept in fp32, outside of the model's state: a bf16 angle would be off by whole turns
    at a few hundred positions, and a buffer would follow `model.bfloat16()`.
    """
    exponents = torch.arange(0, head_size, 2, dtype=torch.float64, device=device) / head_size
    positions = torch.arange(start, start + length, dtype=torch.float64, device=device)
    angles = positions[:, None] * base**-exponents
    return Rope(angles.cos().float(), angles.sin().float())


class LayerCache:
    """Keys and values of one layer, [B, K, capacity, h], filled from the left and allocated at the first append."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, k_BKSh: Tensor, v_BKSh: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new positions and return the keys and values of all, [B, K, P, h] each."""
        batch, heads, new, width = k_BKSh.shape
        end = self.length + new
        if end > self.capacity:
            raise ValueError(f"KVCache: {self.length} + {new} positions exceed its capacity = {self.capacity}")
        if self._keys is None or self._values is None:
            self._keys = k_BKSh.new_empty(batch, heads, self.capacity, width)
            self._values = torch.empty_like(self._keys)
        if self._keys.shape[0] != batch:
            raise ValueError(f"KVCache: holds {self._keys.shape[0]} sequences, but the call brings {batch}")
        self._keys[:, :, self.length : end] = k_BKSh
        self._values[:, :, self.length : end] = v_BKSh
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]


class KVCache:
    """The caches of all layers of one decoder, for one batch of sequences.

    Args:
        num_layers: layers of the decoder.
        capacity: positions that it can hold, for example the prompt's and the new tokens' together.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.layers = [LayerCache(capacity) for _ in range(num_layers)]

    @property
    def length(self) -> int:
        """Positions held."""
        return self.layers[0].length


class Attention(nn.Module):
    """Bias-free causal self-attention; num_heads / kv_heads query heads share each key/value head.

    Raises:
        ValueError: where the head counts of the configuration do not fit together.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        if model.hidden_size % (2 * model.num_heads):
            raise ValueError(
                f"model.num_heads = {model.num_heads}: must divide model.hidden_size = {model.hidden_size} "
                "into heads of an even width"
            )
        if model.num_heads % model.kv_heads:
            raise ValueError(f"model.num_kv_heads = {model.kv_heads}: must divide model.num_heads = {model.num_heads}")
        self.head_size = model.head_size
        self.queries_per_kv = model.num_heads // model.kv_heads
        self.q_proj = nn.Linear(model.hidden_size, model.hidden_size, bias=False)
        self.k_proj = nn.Linear(model.hidden_size, model.kv_heads * model.head_size, bias=False)
        self.v_proj = nn.Linear(model.hidden_size, model.kv_heads * model.head_size, bias=False)
        self.o_proj = nn.Linear(model.hidden_size, model.hidden_size, bias=False)

    def forward(self, x_BSD: Tensor, rope: Rope, cache: LayerCache | None = None) -> Tensor:
        """Attend to the positions up to each one's own, the cached ones included.

        Args:
            x_BSD: normalised hidden states.
            rope: tables of the S positions of this call.
            cache: holds the earlier positions; this call's are appended.

        Returns:
            [B, S, D] in the dtype of the input.
        """
        q_BHSh = rotate(self._heads(self.q_proj(x_BSD)), *rope)
        k_BKPh = rotate(self._heads(self.k_proj(x_BSD)), *rope)
        v_BKPh = self._heads(self.v_proj(x_BSD))
        if cache is not None:
            k_BKPh, v_BKPh = cache.append(k_BKPh, v_BKPh)
        out_BHSh = self._attend(q_BHSh, k_BKPh, v_BKPh)
        return self.o_proj(out_BHSh.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_size)).transpose(1, 2)

    def _attend(self, q_BHSh: Tensor, k_BKPh: Tensor, v_BKPh: Tensor) -> Tensor:
        new, total = q_BHSh.shape[2], k_BKPh.shape[2]
        # is_causal aligns the triangle to the top left, which is right only where nothing was cached before.
        mask_SP = None
        if 1 < new < total:
            mask_SP = torch.ones(new, total, dtype=torch.bool, device=q_BHSh.device).tril(total - new)
        shared = self.queries_per_kv > 1
        if shared and q_BHSh.dtype in (torch.float32, torch.float64):
            # In these dtypes no fused CUDA kernel shares heads, and the fallback keeps the whole [S, P] matrix.
            k_BKPh = k_BKPh.repeat_interleave(self.queries_per_kv, dim=1)
            v_BKPh = v_BKPh.repeat_interleave(self.queries_per_kv, dim=1)
            shared = False
        return F.scaled_dot_product_attention(
            q_BHSh, k_BKPh, v_BKPh, attn_mask=mask_SP, is_causal=1 < new == total, enable_gqa=shared
        )
