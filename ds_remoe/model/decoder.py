"""The LLaMA-style decoder, dense or mixture-of-experts; shape suffixes as in attention.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from ds_remoe.config.schema import ModelConfig, MoEConfig
from ds_remoe.kernels.rms_norm import rms_norm
from ds_remoe.model.attention import Attention, KVCache, LayerCache, Rope, rope_tables
from ds_remoe.model.init import init_weights
from ds_remoe.model.loss import head_loss
from ds_remoe.moe.budget import ActivationBudget, settled_rows
from ds_remoe.moe.experts import SwiGLU
from ds_remoe.moe.layer import MoE


class LMOutput(NamedTuple):
    """What a forward pass returns.

    Attributes:
        loss: lm_loss + aux_loss, a scalar in fp32 (fp64 for an fp64 model); None without labels.
        lm_loss: mean cross entropy over the labels that are not -100, in nats; 0 where all are. None without labels.
        aux_loss: sum of the MoE layers' auxiliary losses, coefficients included, a scalar in fp32 or wider.
        logits: [B, S, V] in the dtype of the model; None with labels, where only their loss is wanted.
    """

    loss: Tensor | None
    lm_loss: Tensor | None
    aux_loss: Tensor
    logits: Tensor | None


def is_moe_layer(layer: int, moe: MoEConfig) -> bool:
    """Whether the layer of this index, counted from 0, has routed experts: the last of each layer_frequency has."""
    return moe.router != "dense" and (layer + 1) % moe.layer_frequency == 0


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, by our kernel on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., D]."""
        assert self.weight is not None
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)


class DecoderLayer(nn.Module):
    """Pre-norm attention, then a pre-norm SwiGLU or MoE with its shared experts, each added to the residual stream.

    The shared experts are one SwiGLU of their summed width, which computes the same as a sum of separate ones.
    """

    def __init__(self, model: ModelConfig, moe: MoEConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(model.hidden_size, eps=model.norm_eps)
        self.attention = Attention(model)
        self.mlp_norm = RMSNorm(model.hidden_size, eps=model.norm_eps)
        self.mlp: SwiGLU | MoE
        self.shared_mlp: SwiGLU | None = None
        if moe.router == "dense" or not is_moe_layer(layer, moe):
            self.mlp = SwiGLU(model.hidden_size, model.d_ffn)
            return
        width = model.d_ffn // moe.granularity
        with torch.device("meta"):
            template = SwiGLU(model.hidden_size, width)
        self.mlp = MoE(
            model.hidden_size,
            template,
            num_experts=moe.total_experts,
            ep_size=moe.ep_size,
            k=moe.active_experts,
            router=moe.router,
            aux_loss_coefficient=moe.aux_loss_coefficient,
            activation_budget=moe.activation_budget,
            wire_dtype=moe.wire_dtype,
            hierarchical_all_to_all=moe.hierarchical_all_to_all,
        )
        if moe.num_shared_experts:
            self.shared_mlp = SwiGLU(model.hidden_size, moe.num_shared_experts * width)

    def forward(
        self, x_BSD: Tensor, rope: Rope, cache: LayerCache | None, budget: ActivationBudget | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the hidden states [B, S, D] and the auxiliary loss, None for a dense layer.

        Args:
            budget: that the layers share in this pass; None leaves an MoE layer its own.
        """
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rope, cache)
        h_BSD = self.mlp_norm(x_BSD)
        if not isinstance(self.mlp, MoE):
            return x_BSD + self.mlp(h_BSD), None
        y_BSD, aux_loss, _ = self.mlp(h_BSD, shared_expert=self.shared_mlp, budget=budget)
        return x_BSD + y_BSD, aux_loss


class Decoder(nn.Module):
    """A decoder-only language model: RMSNorm, RoPE, grouped-query attention, SwiGLU, untied embeddings, no biases.

    Args:
        model: widths and depths.
        moe: router and experts; router "dense" puts a SwiGLU of width d_ffn in place of every MoE layer, without
            shared experts.
        vocab_size: V.
        seed: the weights follow from it alone, whatever the world size and ep_size.

    Raises:
        ValueError: where sizes do not fit together; the message names the field and its value.
    """

    def __init__(self, model: ModelConfig, moe: MoEConfig, vocab_size: int, seed: int) -> None:
        super().__init__()
        if vocab_size < 1:
            raise ValueError(f"vocab_size = {vocab_size}: must be at least 1")
        if moe.router != "dense" and model.d_ffn % moe.granularity:
            raise ValueError(
                f"moe.granularity = {moe.granularity}: must divide model.ffn_hidden_size = {model.d_ffn}, "
                "as an expert has width ffn_hidden_size / granularity"
            )
        if moe.router != "dense" and moe.layer_frequency > model.num_layers:
            raise ValueError(
                f"moe.layer_frequency = {moe.layer_frequency}: leaves no MoE layer among model.num_layers = "
                f'{model.num_layers}; lower it, or set moe.router = "dense"'
            )
        self.model_config = model
        self.moe_config = moe
        self.vocab_size = vocab_size
        self.embedding = nn.Embedding(vocab_size, model.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(model, moe, layer) for layer in range(model.num_layers))
        self.norm = RMSNorm(model.hidden_size, eps=model.norm_eps)
        self.lm_head = nn.Linear(model.hidden_size, vocab_size, bias=False)
        init_weights(self, model.init_std, seed)

    def forward(self, tokens_BS: Tensor, labels_BS: Tensor | None = None, *, cache: KVCache | None = None) -> LMOutput:
        """Predict the token after each position.

        Args:
            tokens_BS: int64 token ids, 1 <= S <= seq_length, the cached positions counted in.
            labels_BS: int64 [B, S], the token to predict at each position, so shifted already; -100 is ignored.
            cache: earlier positions of the same sequences, in inference only; this call's are appended.

        Returns:
            Losses with labels, logits without; see LMOutput. Token ids are not checked against the vocabulary, as that
            would wait for the device.

        Raises:
            TypeError, ValueError: for tokens or labels of a wrong dtype or shape.
            RuntimeError: for a cache while gradients are recorded.
        """
        start = 0 if cache is None else cache.length
        self._check(tokens_BS, labels_BS, cache, start)
        config = self.model_config
        rope = rope_tables(start, tokens_BS.shape[1], config.head_size, config.rope_base, tokens_BS.device)
        x_BSD = self.embedding(tokens_BS)
        aux_loss = torch.zeros((), dtype=torch.promote_types(x_BSD.dtype, torch.float32), device=x_BSD.device)
        budget = self._shared_budget(tokens_BS.numel())
        for index, layer in enumerate(self.layers):
            x_BSD, layer_aux = self._run(layer, x_BSD, rope, None if cache is None else cache.layers[index], budget)
            if layer_aux is not None:
                aux_loss = aux_loss + layer_aux
        x_BSD = self.norm(x_BSD)
        if labels_BS is None:
            return LMOutput(None, None, aux_loss, self.lm_head(x_BSD))
        # Past lm_head's forward, so that not all logits exist at a time.
        lm_loss = head_loss(x_BSD, self.lm_head.weight, labels_BS)
        return LMOutput(lm_loss + aux_loss, lm_loss, aux_loss, None)

    def _run(
        self, layer: nn.Module, x_BSD: Tensor, rope: Rope, cache: LayerCache | None, budget: ActivationBudget | None
    ) -> tuple[Tensor, Tensor | None]:
        if not self._checkpoints():
            return layer(x_BSD, rope, cache, budget)
        # A recomputation that stopped early could stop before a collective on one rank and after it on another.
        with set_checkpoint_early_stop(False):
            return checkpoint(layer, x_BSD, rope, cache, use_reentrant=False, preserve_rng_state=False)

    def _checkpoints(self) -> bool:
        return self.model_config.activation_checkpointing and self.training and torch.is_grad_enabled()

    def _shared_budget(self, tokens: int) -> ActivationBudget | None:
        """One budget for the layers whose activations are alive together; under checkpointing each has its own."""
        moe = self.moe_config
        layers = sum(isinstance(layer.mlp, MoE) for layer in self.layers)
        if moe.activation_budget is None or not layers or not torch.is_grad_enabled() or self._checkpoints():
            return None
        rows = settled_rows(moe.active_experts, moe.total_experts, moe.ep_size)
        return ActivationBudget.of(moe.activation_budget, moe.active_experts * tokens, layers, rows)

    def _check(self, tokens_BS: Tensor, labels_BS: Tensor | None, cache: KVCache | None, start: int) -> None:
        _check_ids("tokens_BS", tokens_BS)
        length, limit = tokens_BS.shape[1], self.model_config.seq_length
        if start + length > limit:
            cached = f"{start} cached + " if start else ""
            raise ValueError(f"tokens_BS: {cached}{length} positions exceed model.seq_length = {limit}")
        if labels_BS is not None:
            _check_ids("labels_BS", labels_BS)
            if labels_BS.shape != tokens_BS.shape:
                raise ValueError(f"labels_BS: shape {tuple(labels_BS.shape)}, but tokens_BS: {tuple(tokens_BS.shape)}")
        if cache is not None:
            if len(cache.layers) != len(self.layers):
                raise ValueError(f"cache: made for {len(cache.layers)} layers, but the model has {len(self.layers)}")
            if torch.is_grad_enabled():
                raise RuntimeError("cache: is for inference only; call the model under torch.no_grad()")


def _check_ids(name: str, ids: Tensor) -> None:
    if ids.dtype != torch.int64:
        raise TypeError(f"{name}: dtype is {ids.dtype}, but must be torch.int64; convert it with .long()")
    if ids.ndim != 2 or ids.numel() == 0:
        raise ValueError(f"{name}: shape is {tuple(ids.shape)}, but must be [B, S] with B and S at least 1")
