"""What a forward pass keeps for backward, and what a backward pass needs besides, in bytes on one rank.

The formulas follow the modules line by line: `model.decoder`, `model.attention`, `model.loss`, `moe.routers`,
`moe.dispatch`, `moe.budgeted_swiglu`; tests/test_planning_measured.py counts the saved tensors of a real model.
T tokens of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_remoe.config.schema import ModelConfig, MoEConfig
from ds_remoe.model.loss import block_tokens
from ds_remoe.moe.budget import ActivationBudget, expected_rows, settled_rows
from ds_remoe.planning.hardware import Dtype
from ds_remoe.planning.sizes import moe_layers

FP32, INT32, INT64 = 4, 4, 8
ROUTE_BYTES = INT64 + FP32
"""What a pair keeps without expert parallelism: its token and its weight."""
EXCHANGED_PAIR_BYTES, EXCHANGED_ROW_BYTES = 2 * INT64 + INT32 + FP32, INT64
"""With it: a pair's place where it departs, and its row, place and weight where it arrives; a row's token."""
ITEM_BYTES: dict[Dtype, int] = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Load:
    """What a routing density brings to one rank, in one MoE layer and micro-batch, experts balanced.

    Attributes:
        density: share of all (token, expert) pairs that are active.
        tokens: T, of this rank.
        rows_to_rank: rows that this rank sends to each rank of its group, itself included.
        pairs: pairs that reach this rank's experts.
        kept_pairs: of these, with a pre-activation kept for backward, at most; a mean of layers that share a budget.
        call_pairs: pairs whose temporaries exist together: those of one call on a GPU, of one expert on the CPU.
        kept_rows_to_rank: of rows_to_rank those that the receiver keeps for backward, the mean of such layers; the
            others are sent again.
    """

    density: float
    tokens: int
    rows_to_rank: float
    pairs: float
    kept_pairs: float
    call_pairs: float
    kept_rows_to_rank: float

    @classmethod
    def of(
        cls, moe: MoEConfig, tokens: int, density: float, *, is_cpu: bool = False, model: ModelConfig | None = None
    ) -> Load:
        """The load of `tokens` tokens a rank at a density, k/E once the sparsity has settled.

        A token's experts are taken as independent (`moe.budget.expected_rows`). The layers of `model` share their
        budget, except under activation checkpointing; without a model it is one layer's.
        """
        local = moe.total_experts // moe.ep_size
        rows = expected_rows(density, moe.total_experts, moe.ep_size)
        pairs = density * moe.total_experts * tokens
        kept, largest, kept_layers = pairs, pairs / local if is_cpu else pairs, 1.0
        if moe.activation_budget is not None:
            layers = 1 if model is None or model.activation_checkpointing else max(1, moe_layers(model, moe))
            settled = settled_rows(moe.active_experts, moe.total_experts, moe.ep_size)
            budget = ActivationBudget.of(moe.activation_budget, moe.active_experts * tokens, layers, settled)
            kept_layers = sum(budget.keep_rows(rows) for _ in range(layers)) / layers
            if pairs > budget.call:
                kept, largest = (budget.pairs - budget.chunk) / layers, min(largest, budget.chunk)
        to_rank = tokens * rows / moe.ep_size
        return cls(density, tokens, to_rank, pairs, kept, largest, kept_layers * to_rank)

    @property
    def recomputed_pairs(self) -> float:
        """Pairs whose pre-activation is computed a second time, in backward."""
        return self.pairs - self.kept_pairs

    @property
    def resent_rows_to_rank(self) -> float:
        """Rows of rows_to_rank that are sent again in backward, the mean of a model's layers."""
        return self.rows_to_rank - self.kept_rows_to_rank

    @property
    def resent_share(self) -> float:
        """The share of a model's layers whose rows are sent again."""
        return self.resent_rows_to_rank / self.rows_to_rank if self.rows_to_rank else 0.0


@dataclass(frozen=True)
class Activations:
    """Bytes on one rank.

    Attributes:
        layers: kept by attention, norms, dense FFNs and the residual stream of all layers.
        experts: kept by routers, dispatch, routed and shared experts of all layers.
        head: kept by the embedding, the last norm, and the loss, which makes the lm head's gradient in forward.
        loss_block: needed besides while the loss of a block of tokens is taken: their logits and log-probabilities, and
            what the block adds to the head's gradient where that is wider than the model.
        workspace: needed besides inside the backward pass of one layer, where the head's bytes are free again.
    """

    layers: float
    experts: float
    head: float
    loss_block: float
    workspace: float

    @property
    def saved(self) -> float:
        """What autograd keeps."""
        return self.layers + self.experts + self.head

    @property
    def peak(self) -> float:
        """At the worst moment: at the loss, or inside a layer's backward pass."""
        return self.layers + self.experts + max(self.head + self.loss_block, self.workspace)


def activations(
    model: ModelConfig, moe: MoEConfig, vocab_size: int, load: Load, dtype: Dtype, *, is_cpu: bool = False
) -> Activations:
    """Activations of one micro-batch of `load.tokens` tokens.

    Args:
        load: of one MoE layer; a dense model reads its tokens alone.
        dtype: of the parameters.
        is_cpu: torch's CPU kernels keep more than CUDA's for norms and attention.
    """
    tokens, item, routed_layers = load.tokens, ITEM_BYTES[dtype], moe_layers(model, moe)
    dense_layers = model.num_layers - routed_layers
    norm = _norm(model, tokens, item, is_cpu)
    attention = _attention(model, tokens, item, is_cpu) + 2 * norm
    dense = 4 * tokens * model.d_ffn * item
    routed = _routed(model, moe, load, item, is_cpu)
    head, loss_block = _head(model, vocab_size, tokens, item)
    head += norm
    workspace = _layer_workspace(model, moe, load, item, routed_layers > 0, is_cpu)
    if not model.activation_checkpointing:
        layers = attention * model.num_layers + dense * dense_layers
        return Activations(layers, routed * routed_layers, head, loss_block, workspace)
    inputs = model.num_layers * tokens * model.hidden_size * item
    one_layer = attention + max(routed * bool(routed_layers), dense * bool(dense_layers))
    return Activations(inputs, 0, head, loss_block, one_layer + workspace)


def _head(model: ModelConfig, vocab_size: int, tokens: int, item: int) -> tuple[float, float]:
    """What the embedding and the loss keep; and what the loss needs besides: its input, and a block of logits."""
    block, weight = min(tokens, block_tokens(vocab_size)), vocab_size * model.hidden_size
    summed = FP32 if tokens > block else item
    log_probs = FP32 if item == FP32 else 2 * FP32  # of narrow logits a copy is made first
    product = weight * item if summed != item else 0
    logits = block * vocab_size * item
    besides = tokens * model.hidden_size * item + logits + max(block * vocab_size * log_probs, product)
    return tokens * INT64 + weight * summed, besides


def _norm(model: ModelConfig, tokens: int, item: int, is_cpu: bool) -> float:
    """Input and output of an RMSNorm and each row's factor; in bf16 on the CPU also what it is composed of, in fp32."""
    kept = 2 * item * model.hidden_size + FP32
    if is_cpu and item != FP32:
        kept += model.hidden_size * (2 * FP32 - item)
    return tokens * kept


def _attention(model: ModelConfig, tokens: int, item: int, is_cpu: bool) -> float:
    """q, k, v, the scores' output and log-sums; in bf16 on the CPU also the output in the last projection's layout."""
    heads_are_shared = item != FP32 and model.kv_heads < model.num_heads
    key_value = model.kv_heads * model.head_size if heads_are_shared else model.hidden_size
    outputs = 2 if is_cpu and item != FP32 else 1
    return tokens * ((1 + outputs) * model.hidden_size * item + 2 * key_value * item + model.num_heads * FP32)


def _routed(model: ModelConfig, moe: MoEConfig, load: Load, item: int, is_cpu: bool) -> float:
    """Router, pairs, rows and pre-activations of an MoE layer, and its shared experts."""
    width = model.d_ffn // moe.granularity
    router: float = load.tokens * moe.total_experts  # the mask, a byte an entry
    if moe.router == "topk":
        router += load.tokens * (moe.total_experts * FP32 + moe.active_experts * INT64)
    if moe.ep_size == 1:
        # Each pair's index into the mask, which CUDA's ReLU kernels do without, and there the pairs' order by token.
        index = INT64 if is_cpu or moe.router == "topk" else 0
        routes = load.pairs * (ROUTE_BYTES + index + (0 if is_cpu else INT32)) + (0 if is_cpu else load.tokens * INT32)
    else:
        rows = moe.ep_size * load.kept_rows_to_rank * model.hidden_size * item
        rows += moe.ep_size * load.rows_to_rank * (EXCHANGED_ROW_BYTES + (0 if is_cpu else INT32))
        routes = rows + load.pairs * EXCHANGED_PAIR_BYTES + moe.ep_size * load.tokens * 4
    shared = 4 * load.tokens * moe.num_shared_experts * width * item
    return router + routes + load.kept_pairs * 2 * width * item + shared


def _layer_workspace(model: ModelConfig, moe: MoEConfig, load: Load, item: int, routed: bool, is_cpu: bool) -> float:
    """Gradients alive inside one layer's backward pass: of a dense FFN, or of an MoE layer's rows and one call."""
    if not routed:
        return load.tokens * (3 * model.d_ffn + model.hidden_size) * item
    rows = load.tokens if moe.ep_size == 1 else moe.ep_size * load.rows_to_rank
    width = model.d_ffn // moe.granularity
    call = load.call_pairs * (3 * width + model.hidden_size) * item
    if load.recomputed_pairs:
        call += load.call_pairs * 2 * width * item
    sums = FP32 if load.recomputed_pairs or is_cpu else item
    copies = sums + item + (item if moe.ep_size > 1 and load.resent_rows_to_rank else 0)
    return rows * model.hidden_size * copies + call
