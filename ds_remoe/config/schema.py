"""The typed "remoe" section of a DeepSpeed JSON file: one frozen model per part of a run.

A field that stands here is the whole truth: nothing multiplies, rounds or rewrites it after it was read. Values that
follow from several fields are properties. Unknown keys are refused by every model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Base of every section: frozen, strict about types, and closed to unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelConfig(Section):
    """LLaMA-style decoder: RMSNorm, SwiGLU, RoPE, grouped-query attention, untied embeddings, no biases."""

    hidden_size: int = Field(gt=0)
    """Width d of the residual stream."""
    num_layers: int = Field(gt=0)
    """Number of decoder layers."""
    num_heads: int = Field(gt=0)
    """Query heads; must divide hidden_size into even head widths."""
    num_kv_heads: int | None = Field(default=None, gt=0)
    """Key/value heads (GQA groups); must divide num_heads. Default: num_heads."""
    ffn_hidden_size: int | None = Field(default=None, gt=0)
    """Inner SwiGLU width d_ffn of the dense FFN, and of one expert at granularity 1. Default: 4 * hidden_size."""
    seq_length: int = Field(gt=1)
    """Context length in tokens."""
    rope_base: float = Field(default=1e6, gt=0)
    """Base of the rotary position embedding."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Epsilon of RMSNorm."""
    init_std: float = Field(default=0.01, gt=0)
    """Standard deviation of the normal initialisation."""
    activation_checkpointing: bool = False
    """Recompute each decoder layer in the backward pass instead of keeping its activations."""

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads in use."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def d_ffn(self) -> int:
        """Inner SwiGLU width in use."""
        return self.ffn_hidden_size or 4 * self.hidden_size


class MoEConfig(Section):
    """The mixture-of-experts layers (paper eq. 1, 2, 5)."""

    router: Literal["relu", "topk", "dense"] = "relu"
    """"relu" is ReMoE; "topk" the dropless Softmax-TopK baseline; "dense" puts one FFN in place of every MoE layer."""
    num_experts: int = Field(default=8, gt=0)
    """Number of experts E at granularity 1."""
    k: int = Field(default=1, gt=0)
    """Mean number of active experts a token wanted, at granularity 1; the target sparsity is 1 - k/E."""
    granularity: int = Field(default=1, gt=0)
    """G: each expert is split in G of width d_ffn/G; E*G experts of which k*G are active."""
    ep_size: int = Field(default=1, gt=0)
    """Ranks that share one set of experts (expert parallelism); divides the world size and the number of experts."""
    layer_frequency: int = Field(default=1, gt=0)
    """Every n-th layer is an MoE layer, counted so that the last of each n is one; the others are dense."""
    num_shared_experts: int = Field(default=0, ge=0)
    """Experts of width d_ffn/G that every token passes besides the routed ones."""
    aux_loss_coefficient: float = Field(default=0.01, ge=0)
    """Weight of the Switch load-balancing loss of each layer; read by router "topk" only."""
    activation_budget: float | None = Field(default=1.25, ge=0.25)
    """Experts' pre-activations that exist at a time, as a multiple of k*G pairs a token and MoE layer, which the layers
    share (under activation_checkpointing each has its own); those of the pairs beyond it (the dense stage) are
    recomputed in backward, at 2/9 of such a pair's FLOPs. With ep_size > 1 the rows that ranks receive have such a
    budget, too, in the mean of an expert-parallel group; those of a layer beyond it are sent again in backward, one
    exchange more. null in the file keeps all, as does a number from num_experts/k up."""

    wire_dtype: Literal["auto", "bf16"] = "auto"
    """In which tokens, results and their gradients cross from rank to rank: as they are, or rounded to bf16 while an
    fp32 model computes in fp32; a rank's own tokens are never rounded."""
    hierarchical_all_to_all: bool = False
    """A token crosses to another node once and is spread there among the ranks that want it, for an ep_size beyond one
    node; on one node it changes nothing."""

    @property
    def total_experts(self) -> int:
        """Routed experts in a layer, E*G."""
        return self.num_experts * self.granularity

    @property
    def active_experts(self) -> int:
        """Routed experts a token is meant to pass, k*G."""
        return self.k * self.granularity

    @property
    def target_sparsity(self) -> float:
        """1 - k/E, the sparsity that the controller steers to (eq. 7)."""
        return 1.0 - self.k / self.num_experts


class SparsityConfig(Section):
    """Adaptive L1 control of the ReLU router (paper eq. 6-11); read by router "relu" only."""

    lambda_init: float = Field(default=1e-8, gt=0)
    """λ_0, the first L1 coefficient."""
    alpha: float = Field(default=1.2, gt=1)
    """α, the factor by which λ moves at each optimizer step."""
    regularizer: Literal["l1_load_balanced", "l1_load_balanced_squared", "l1"] = "l1_load_balanced"
    """eq. (10) with the balance weight f of (11), the variant with f² (section 5.2), or plain L1 (9)."""
    balance_scope: Literal["micro_batch", "data_parallel"] = "micro_batch"
    """Tokens over which f is taken: this rank's micro-batch, as in the reference, or that of all ranks."""


class StdlibSource(Section):
    """The embedded corpus: Python's own standard library on this machine, split into domains."""

    type: Literal["stdlib"] = "stdlib"
    max_bytes_per_domain: int | None = Field(default=None, gt=0)
    """Stop a domain after the document that reaches this many UTF-8 bytes. Default: everything."""


class FilesSource(Section):
    """Local files, read by `datasets`."""

    type: Literal["jsonl", "parquet", "text"]
    paths: list[str] = Field(min_length=1)
    """Files or glob patterns, relative to the working directory. A text file is one document."""
    text_column: str = "text"
    """Column that holds the document's text ("jsonl", "parquet")."""
    domain_column: str | None = None
    """Column that names the document's domain. Default: one domain, "text"."""


class HubSource(Section):
    """A dataset of the Hugging Face hub by name."""

    type: Literal["hub"]
    name: str
    """For example "allenai/c4"."""
    config: str | None = None
    """The dataset's configuration, for example "en"."""
    split: str = "train"
    streaming: bool = True
    """Read documents as they are needed instead of downloading the dataset first."""
    max_documents: int | None = Field(default=None, gt=0)
    """Stop after this many documents; required when streaming an unbounded dataset into the token store."""
    text_column: str = "text"
    domain_column: str | None = None


Source = Annotated[StdlibSource | FilesSource | HubSource, Field(discriminator="type")]


class TrainedTokenizer(Section):
    """A byte-fallback BPE tokenizer, trained on the corpus by SentencePiece."""

    type: Literal["train"] = "train"
    vocab_size: int = Field(default=8192, ge=512, le=2**20)
    """Pieces of the vocabulary; the largest in use have some 2**18, and the model has two vectors for each."""
    max_training_bytes: int = Field(default=8_000_000, gt=0)
    """Sample of the corpus that the tokenizer is trained on, in UTF-8 bytes, drawn evenly over domains."""


class FileTokenizer(Section):
    """A tokenizer that exists already."""

    type: Literal["sentencepiece", "huggingface"]
    path: str
    """A SentencePiece .model, or a Hugging Face tokenizer.json or the folder that holds one."""


Tokenizer = Annotated[TrainedTokenizer | FileTokenizer, Field(discriminator="type")]


class DataConfig(Section):
    """Corpus, tokenizer and the packed token store."""

    source: Source = StdlibSource()
    tokenizer: Tokenizer = TrainedTokenizer()
    valid_fraction: float = Field(default=0.02, gt=0, lt=1)
    """Share of documents held out for validation, chosen by a hash of the document."""
    cache_dir: str = Field(default="runs/data", min_length=1)
    """Where tokenizer and token store are kept; each distinct data configuration has a folder of its own in it."""


class SpikeGuardConfig(Section):
    """An optimizer step whose gradient norm stands out is skipped."""

    factor: float = Field(default=3.0, gt=1)
    """Skip above this multiple of the median norm of the last applied steps."""
    window: int = Field(default=100, gt=0)
    """Applied steps that the median is taken of; the guard judges once it has seen as many."""


class TrainConfig(Section):
    """The training loop."""

    steps: int = Field(gt=0)
    """Optimizer steps of the whole run."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of the initialisation and of the order of samples."""
    eval_interval: int = Field(default=100, gt=0)
    """Optimizer steps between two evaluations; the last step is always evaluated."""
    eval_batches: int = Field(default=8, gt=0)
    """Held-out global batches of an evaluation; the same samples for every split of a global batch over ranks. Where
    fewer are held out, some are taken again, with a warning."""
    save_interval: int = Field(default=100, gt=0)
    """Optimizer steps between two checkpoints; the last step is always saved."""
    keep_checkpoints: int = Field(default=2, gt=0)
    """Newest checkpoints that are kept; older ones are removed after a newer one is complete."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """What follows where a checkpoint cannot be written, as on a full disk: the run ends, or it trains on and tries at
    the next interval. Where the run's last checkpoint cannot be written, it ends."""
    max_skipped_steps: int = Field(default=3, ge=0)
    """Optimizer steps in a row that may be skipped, for a loss or gradient that is not finite or for a spike; one more
    ends the run. Those that dynamic fp16 loss scaling skips do not count."""
    spike_guard: SpikeGuardConfig | None = None
    """Skip steps whose gradient norm is far above that of the steps before. Default: only what is not finite."""
    dead_after: int = Field(default=100, gt=0)
    """Applied steps without a token after which an expert or MoE layer is called dead, in the logs and the summary."""
    hang_timeout: float | None = Field(default=None, ge=1)
    """Seconds without progress in a training step or evaluation after which the run ends with exit code 3, naming the
    rank that did not arrive. First steps and evaluations, starting, loading, saving and ending have DEEPSPEED_TIMEOUT
    (environment; minutes, default 30), which this may not exceed; preparing the data has no limit. Default: 300, or
    DEEPSPEED_TIMEOUT if that is less."""
    output_dir: str = Field(min_length=1)
    """The run's folder: checkpoints, metrics.jsonl, pictures, summary, W&B files."""


class WandbConfig(Section):
    """Weights & Biases; the run's id is kept in the checkpoint, so that a resume continues the same run."""

    mode: Literal["online", "offline", "disabled"] = "disabled"
    project: str = "ds-remoe"
    entity: str | None = None
    group: str | None = None
    name: str | None = None
    tags: list[str] = []


class LoggingConfig(Section):
    """Where the measurements of each step go, besides metrics.jsonl, which is always written."""

    wandb: WandbConfig = WandbConfig()
    histogram_interval: int = Field(default=50, gt=0)
    """Optimizer steps between two pictures of the load per expert and layer."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """Peak TFLOP/s of one device at the training dtype, for MFU. Default: MFU is not reported."""


class ReMoEConfig(Section):
    """The whole "remoe" section."""

    model: ModelConfig
    moe: MoEConfig = MoEConfig()
    sparsity: SparsityConfig = SparsityConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig
    logging: LoggingConfig = LoggingConfig()

    @property
    def output_dir(self) -> Path:
        """The run's folder as a path."""
        return Path(self.train.output_dir)
