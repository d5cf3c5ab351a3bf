"""Parameters and FLOPs of a decoder as formulas; D hidden size, F = d_ffn, h head width, V vocabulary."""

from __future__ import annotations

from ds_remoe.config.schema import ModelConfig, MoEConfig


def num_params(model: ModelConfig, moe: MoEConfig, vocab_size: int, *, embeddings: bool = True) -> int:
    """Parameters of the whole model, all experts of all ranks included.

    Everything counts: embedding and lm head (V·D each), norms (D each), attention projections, routers (D·E·G), experts
    (3·D·F/G each) and shared experts. `embeddings=False` leaves out the embedding and the lm head.

    With V = 51200 (GPT-2's 50257 tokens, padded to a multiple of 1024) this gives the totals of the paper's table
    at E = 8: 777M, 2.58B and 5.73B. The table's "active parameters" are those of the dense model: router "dense" gives
    182M, 469M and 978M, embedding and lm head included.
    """
    return _params(model, moe, vocab_size, routed_experts=moe.total_experts, embeddings=embeddings)


def num_active_params(model: ModelConfig, moe: MoEConfig, vocab_size: int, *, embeddings: bool = True) -> int:
    """Parameters that a token passes once the sparsity has settled: `num_params` with k·G of the E·G routed experts.

    The whole router counts, as do all V rows of the embedding, although a token reads one.
    """
    return _params(model, moe, vocab_size, routed_experts=moe.active_experts, embeddings=embeddings)


def flops_per_token(
    model: ModelConfig,
    moe: MoEConfig,
    vocab_size: int,
    active_experts: float,
    *,
    seq_length: int | None = None,
    halve_causal: bool = True,
) -> float:
    """FLOPs of forward and backward for one token in training, a multiply-add counted as two.

    Forward: 2 for each weight of a matrix product (attention, router, active experts, shared experts, lm head; the
    embedding is a look-up) and 2·2·S·D a layer for the scores q·k and the weighted sum of v. Backward is twice that.
    Norms, softmax, activations and the optimizer are left out, and so is what activation checkpointing repeats, so that
    the number measures the model and not the way it is run.

    Args:
        model, moe, vocab_size: as of the decoder.
        active_experts: measured mean number of active experts of a token in an MoE layer, between 0 and E·G, so that
            ReMoE's dense stage counts as what it is. A model without MoE layers multiplies it by none.
        seq_length: S. Default: model.seq_length.
        halve_causal: count half of the attention scores, those up to the diagonal, as fused causal kernels compute.
            False counts all S·S, as PaLM's MFU (arXiv 2204.02311) and torch's FlopCounterMode do.

    Raises:
        ValueError: where active_experts is out of range.
    """
    if not 0 <= active_experts <= moe.total_experts:
        raise ValueError(
            f"active_experts = {active_experts}: must be between 0 and num_experts * granularity = {moe.total_experts}"
        )
    length = model.seq_length if seq_length is None else seq_length
    weights: float = vocab_size * model.hidden_size + model.num_layers * _attention_weights(model)
    weights += _mlp_weights(model, moe, active_experts)
    scores = 2 * 2 * length * model.hidden_size * model.num_layers * (0.5 if halve_causal else 1.0)
    return 3.0 * (2.0 * weights + scores)


def _params(model: ModelConfig, moe: MoEConfig, vocab_size: int, routed_experts: int, embeddings: bool) -> int:
    norms = (2 * model.num_layers + 1) * model.hidden_size
    ends = 2 * vocab_size * model.hidden_size if embeddings else 0
    mlps = _mlp_weights(model, moe, routed_experts)
    return ends + norms + model.num_layers * _attention_weights(model) + int(mlps)


def _attention_weights(model: ModelConfig) -> int:
    return 2 * model.hidden_size * (model.hidden_size + model.kv_heads * model.head_size)


def _mlp_weights(model: ModelConfig, moe: MoEConfig, routed_experts: float) -> float:
    moe_layers = 0 if moe.router == "dense" else model.num_layers // moe.layer_frequency
    expert = 3 * model.hidden_size * (model.d_ffn // moe.granularity)
    router = model.hidden_size * moe.total_experts
    dense = (model.num_layers - moe_layers) * 3 * model.hidden_size * model.d_ffn
    return dense + moe_layers * (router + (routed_experts + moe.num_shared_experts) * expert)
