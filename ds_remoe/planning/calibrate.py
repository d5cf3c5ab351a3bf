"""The small measured model: what this machine's matrix products, copies, attention and layers really take."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_remoe.bench.timing import interleave
from ds_remoe.config import RunConfig
from ds_remoe.kernels.pair_groups import PairGroups
from ds_remoe.model.decoder import Decoder
from ds_remoe.moe.budgeted_swiglu import budgeted_swiglu
from ds_remoe.moe.experts import StackedSwiGLU
from ds_remoe.moe.sparsity import SparsityController
from ds_remoe.planning.hardware import GB, TERA, Hardware
from ds_remoe.planning.settings import EngineSettings
from ds_remoe.planning.sizes import moe_layers
from ds_remoe.planning.time import ACTIVATION_PASSES

REPEATS = 7
COPY_BYTES = 2**27
CPU_LINK_SHARE, CPU_NETWORK_BYTES = 0.25, 1.25 * GB
"""Between processes of one machine a share of the copy rate; between machines 10 Gb/s."""
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Rates:
    """What was measured, for one process that has the machine to itself.

    Attributes:
        gemm_flops: FLOP/s of matrix products, over the run's shapes, each by its share of the FLOPs.
        expert_flops: FLOP/s of a layer's routed experts by their kernel, forward and backward, at k/E of the pairs;
            gemm_flops where there are none.
        best_flops: of the fastest of these.
        attention_flops: FLOP/s of the attention scores, forward and backward, half of them counted.
        copy_bytes: bytes/s read and written together.
        elementwise_bytes: bytes/s of silu(gate) · up forward and backward, counted as the plan counts a model's.
        layer_seconds: forward and backward of a layer without work.
    """

    gemm_flops: float
    expert_flops: float
    best_flops: float
    attention_flops: float
    copy_bytes: float
    elementwise_bytes: float
    layer_seconds: float

    def __str__(self) -> str:
        return (
            f"measured here: GEMM {self.gemm_flops / TERA:.3g} TFLOP/s at the run's shapes, experts "
            f"{self.expert_flops / TERA:.3g} (best {self.best_flops / TERA:.3g}), attention "
            f"{self.attention_flops / TERA:.3g} TFLOP/s, copy {self.copy_bytes / GB:.3g} GB/s, elementwise "
            f"{self.elementwise_bytes / GB:.3g} GB/s, {self.layer_seconds * 1e3:.3g} ms for a layer without work"
        )


def measure_rates(run: RunConfig, settings: EngineSettings, vocab_size: int, device: torch.device) -> Rates:
    """Measure this machine at the shapes of a run's micro-batch."""
    dtype = TORCH_DTYPES[settings.dtype]
    shapes = _shapes(run, vocab_size, settings.micro_batch)
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    work: dict[str, Callable[[], object]] = {str(shape): _gemm(shape, dtype, device) for shape in shapes}
    work["copy"] = lambda: target.copy_(source)
    work["attention"] = _attention(run, settings.micro_batch, dtype, device)
    swiglu, kept_bytes = _swiglu(
        settings.micro_batch * run.remoe.model.seq_length, run.remoe.model.d_ffn, dtype, device
    )
    work["elementwise"] = swiglu
    routed = moe_layers(run.remoe.model, run.remoe.moe) > 0
    if routed:
        work["experts"], expert_flops = _experts(run, settings.micro_batch, dtype, device)
    work["two layers"] = _tiny_layers(run, 2, dtype, device)
    work["four layers"] = _tiny_layers(run, 4, dtype, device)
    seconds = {name: timing.median for name, timing in interleave(work, REPEATS, device).items()}
    rates = {shape: 3 * 2.0 * math.prod(shape) / seconds[str(shape)] for shape in shapes}
    model = run.remoe.model
    tokens = settings.micro_batch * model.seq_length
    gemm = sum(shapes.values()) / sum(share / rates[shape] for shape, share in shapes.items())
    experts = expert_flops / seconds["experts"] if routed else gemm
    return Rates(
        gemm_flops=gemm,
        expert_flops=experts,
        best_flops=max(experts, *rates.values()),
        attention_flops=3 * 2 * model.seq_length * model.hidden_size * tokens / seconds["attention"],
        copy_bytes=2 * COPY_BYTES / seconds["copy"],
        elementwise_bytes=ACTIVATION_PASSES * kept_bytes / seconds["elementwise"],
        layer_seconds=max((seconds["four layers"] - seconds["two layers"]) / 2, 0.0),
    )


def calibrated(rates: Rates, base: Hardware, device: torch.device, ranks: int) -> Hardware:
    """Hardware with measured rates.

    Args:
        base: the GPU's published figures, for its peak, links and network; a CPU takes latencies alone from it.
        ranks: ranks on this machine: they share a processor's rates and memory, but each has a GPU of its own. The
            peak of a processor is its best matrix product.
    """
    if device.type == "cuda":
        return dataclasses.replace(
            base,
            name=torch.cuda.get_device_name(device),
            gemm_flops=rates.gemm_flops,
            expert_flops=rates.expert_flops,
            attention_flops=rates.attention_flops,
            memory_bytes=torch.cuda.get_device_properties(device).total_memory,
            copy_bytes=rates.copy_bytes,
            elementwise_bytes=rates.elementwise_bytes,
            layer_seconds=rates.layer_seconds,
            notes=(str(rates), *base.notes),
        )
    link = CPU_LINK_SHARE * rates.copy_bytes
    assumed = (
        f"threads: {torch.get_num_threads()}, ranks that share them: {ranks}; the peak is the best rate; assumed: "
        f"{link / GB:.3g} GB/s between the processes, {CPU_NETWORK_BYTES / GB:g} GB/s network"
    )
    return Hardware(
        name=f"1/{ranks} CPU" if ranks > 1 else "CPU",
        peak_flops=rates.best_flops / ranks,
        gemm_flops=rates.gemm_flops / ranks,
        expert_flops=rates.expert_flops / ranks,
        attention_flops=rates.attention_flops / ranks,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks,
        copy_bytes=rates.copy_bytes / ranks,
        elementwise_bytes=rates.elementwise_bytes / ranks,
        link_bytes=link / ranks,
        network_bytes=CPU_NETWORK_BYTES,
        link_latency=base.network_latency,
        network_latency=base.network_latency,
        layer_seconds=rates.layer_seconds,
        is_cpu=True,
        notes=(str(rates), assumed),
    )


def _shapes(run: RunConfig, vocab_size: int, micro_batch: int) -> dict[tuple[int, int, int], float]:
    """(rows, inner, columns) of matrix products but the routed experts' → multiplications of a token in such."""
    model, moe = run.remoe.model, run.remoe.moe
    tokens, width, routed = micro_batch * model.seq_length, model.hidden_size, moe_layers(model, moe)
    attention = 2 * model.num_layers * width * (width + model.kv_heads * model.head_size)
    shapes: dict[tuple[int, int, int], float] = {(tokens, width, width): attention}
    _add(shapes, (tokens, width, vocab_size), width * vocab_size)
    if routed and moe.num_shared_experts:
        shared = moe.num_shared_experts * (model.d_ffn // moe.granularity)
        _add(shapes, (tokens, width, shared), 3 * routed * width * shared)
    if routed < model.num_layers:
        _add(shapes, (tokens, width, model.d_ffn), 3 * (model.num_layers - routed) * width * model.d_ffn)
    return shapes


def _add(shapes: dict[tuple[int, int, int], float], shape: tuple[int, int, int], share: float) -> None:
    shapes[shape] = shapes.get(shape, 0.0) + share


def _gemm(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """Forward product and the two of backward."""
    rows, inner, columns = shape
    x = torch.randn(rows, inner, dtype=dtype, device=device)
    weight = torch.randn(columns, inner, dtype=dtype, device=device)
    grad = torch.randn(rows, columns, dtype=dtype, device=device)
    return lambda: (x @ weight.t(), grad @ weight, grad.t() @ x)


def _experts(
    run: RunConfig, micro_batch: int, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[[], object], float]:
    """A layer's routed experts on one rank, forward and backward, each with k/E of the rows; and its FLOPs."""
    model, moe = run.remoe.model, run.remoe.moe
    rows, experts = micro_batch * model.seq_length, moe.total_experts // moe.ep_size
    each = max(1, rows * moe.ep_size * moe.active_experts // moe.total_experts)
    stacked = StackedSwiGLU(model.hidden_size, model.d_ffn // moe.granularity, experts, device=device, dtype=dtype)
    with torch.no_grad():
        for weight in stacked.parameters():
            weight.normal_(0.0, 0.02)
    x = torch.randn(rows, model.hidden_size, dtype=dtype, device=device, requires_grad=True)
    ids = torch.arange(each * experts, device=device) % rows
    weights = torch.ones(each * experts, device=device, requires_grad=True)
    groups = PairGroups(ids, weights, [each] * experts)
    grad = torch.randn_like(x)
    inputs = (x, weights, stacked.gate_up, stacked.down)

    def forward_and_backward() -> tuple[Tensor, ...]:
        out = budgeted_swiglu(x, groups, stacked.gate_up, stacked.down, None)
        return torch.autograd.grad(out, inputs, grad)

    return forward_and_backward, 3 * 2 * each * sum(weight.numel() for weight in stacked.parameters())


def _attention(run: RunConfig, micro_batch: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    model = run.remoe.model
    shape = (micro_batch, model.num_heads, model.seq_length, model.head_size)
    q, k, v = (torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3))
    grad = torch.randn(shape, dtype=dtype, device=device)

    def forward_and_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), grad)

    return forward_and_backward


def _swiglu(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], object], int]:
    """The elementwise part of a SwiGLU, forward and backward, and the bytes that it keeps: gate, silu(gate), up."""
    gate, up = (torch.randn(rows, width, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
    grad = torch.randn(rows, width, dtype=dtype, device=device)
    return lambda: torch.autograd.grad(F.silu(gate) * up, (gate, up), grad), 3 * gate.nbytes


def _tiny_layers(run: RunConfig, layers: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """Forward and backward of the run's layers at sizes where the arithmetic is nothing: what is left is overhead."""
    heads = run.remoe.model.num_heads
    sizes = {"hidden_size": 2 * heads, "num_layers": layers, "ffn_hidden_size": run.remoe.moe.granularity}
    model = run.remoe.model.model_copy(update={**sizes, "seq_length": 8})
    moe = run.remoe.moe.model_copy(update={"ep_size": 1, "layer_frequency": 1})
    decoder = Decoder(model, moe, 16, seed=0).to(device, dtype)
    controller = SparsityController(decoder) if moe.router == "relu" else None
    tokens = torch.zeros(1, 8, dtype=torch.int64, device=device)

    def forward_and_backward() -> SparsityController | None:
        loss = decoder(tokens, tokens).loss
        assert loss is not None
        loss.backward()
        return controller  # the routers hold it weakly

    return forward_and_backward
