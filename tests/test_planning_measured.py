"""The plan's bytes against those that DeepSpeed, autograd and the wire really hold and carry."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from ranks import free_port, rank_environment, run_ranks
from torch import Tensor, nn

from ds_remoe import initialize
from ds_remoe.config import load_run
from ds_remoe.config.schema import ModelConfig, MoEConfig
from ds_remoe.model.decoder import Decoder
from ds_remoe.moe.layer import MoE
from ds_remoe.planning.activations import Load, activations
from ds_remoe.planning.check import SavedTensors, gradient_tensors, optimizer_tensors, storage_bytes
from ds_remoe.planning.hardware import Dtype
from ds_remoe.planning.memory import model_states
from ds_remoe.planning.settings import EngineSettings
from ds_remoe.planning.sizes import param_groups
from ds_remoe.planning.traffic import exchange_bytes

VOCAB, EXPERTS = 300, 8
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_hidden_size": 256,
    "seq_length": 64,
    "init_std": 0.1,
}
StateCase = tuple[int, int, bool]
"""ZeRO stage, ep_size, bf16."""


def state_cases(world_size: int) -> list[StateCase]:
    alone = [(stage, 1, stage != 1) for stage in (0, 1, 2)]
    return alone if world_size == 1 else [(stage, ep, (stage + ep) % 2 == 0) for stage in (0, 1, 2) for ep in (1, 2)]


def config_of(stage: int, ep_size: int, half: bool) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 50_000},
        "bf16": {"enabled": half},
        "steps_per_print": 1_000_000_000,
        "remoe": {
            "model": SHAPE,
            "moe": {"num_experts": EXPERTS, "k": 1, "ep_size": ep_size},
            "train": {"steps": 1, "output_dir": "runs/plan"},
        },
    }


def engine_states(config: dict[str, Any]) -> dict[str, int]:
    """Bytes of a real engine: parameters, the most gradients of a step, and optimizer states."""
    model = Decoder(ModelConfig(**config["remoe"]["model"]), MoEConfig(**config["remoe"]["moe"]), VOCAB, seed=0)
    most = 0
    engine, *_ = initialize(model=model, model_parameters=list(model.parameters()), config=config)
    for _ in range(config["gradient_accumulation_steps"]):
        tokens = torch.randint(VOCAB, (2, SHAPE["seq_length"]))
        engine.backward(engine(tokens, tokens).loss)
        most = max(most, storage_bytes(gradient_tensors(engine)))
        engine.step()
    return {
        "parameters": storage_bytes(p.data for p in model.parameters()),
        "gradients": most,
        "optimizer": storage_bytes(optimizer_tensors(engine)),
    }


def exchanged(ep_size: int, wire_dtype: Literal["auto", "bf16"]) -> dict[str, tuple[float, float]]:
    """(measured, planned) of one forward and backward pass: bytes to other ranks, and activations kept."""
    moe = MoEConfig(num_experts=EXPERTS, ep_size=ep_size, wire_dtype=wire_dtype, activation_budget=None)
    model = Decoder(ModelConfig(**SHAPE), moe, VOCAB, seed=0)
    initialize(model=model, model_parameters=list(model.parameters()), config=config_of(0, ep_size, False))
    rank, original = dist.get_rank(), dist.all_to_all_single
    sent, needed, arrived = 0, 0.0, 0

    def counting(output: Tensor, input: Tensor, outputs: Any = None, inputs: Any = None, **kwargs: Any) -> Any:
        nonlocal sent
        splits = inputs or [len(input) // ep_size] * ep_size
        others = sum(size for other, size in enumerate(splits) if other != rank)
        sent += others * input[:1].numel() * input.element_size()
        return original(output, input, outputs, inputs, **kwargs)

    def count_needed(_: nn.Module, __: Any, result: Any) -> None:
        nonlocal needed, arrived
        arrived += int(result[0].mask_TE.sum())
        for other, mask in enumerate(result[0].mask_TE.chunk(ep_size, dim=1)):
            if other != rank:
                rows, pairs = int(mask.any(dim=1).sum()), int(mask.sum())
                needed += exchange_bytes(moe, SHAPE["hidden_size"], 4, rows, pairs)

    for layer in model.layers:
        layer.mlp.deepspeed_moe.gate.register_forward_hook(count_needed)
    tokens = torch.randint(VOCAB, (8, SHAPE["seq_length"]))
    dist.all_to_all_single = counting
    try:
        with SavedTensors(model) as saved:
            loss = model(tokens, tokens.clone()).loss
        loss.backward()
    finally:
        dist.all_to_all_single = original
    density = arrived / (len(model.layers) * tokens.numel() * EXPERTS)
    load = Load.of(moe, tokens.numel(), density, is_cpu=True, model=model.model_config)
    kept = activations(model.model_config, moe, VOCAB, load, "fp32", is_cpu=True).saved
    return {"wire": (sent, needed), "kept": (saved.take(), kept)}


def on_a_rank(world_size: int) -> dict[str, Any]:
    torch.manual_seed(dist.get_rank())
    return {
        "states": {case: engine_states(config_of(*case)) for case in state_cases(world_size)},
        "exchanges": [exchanged(world_size, "auto"), exchanged(world_size, "bf16")] if world_size > 1 else [],
    }


@pytest.mark.parametrize("world_size", [1, 2])
def test_states_and_wire_are_those_of_real_engines(world_size: int, tmp_path: Path) -> None:
    ranks = run_ranks(on_a_rank, world_size, world_size)
    for case in state_cases(world_size):
        path = tmp_path / "run.json"
        path.write_text(json.dumps(config_of(*case)))
        run = load_run(path, world_size=world_size)
        dense, experts = param_groups(run.remoe.model, run.remoe.moe, VOCAB, world_size)
        planned = model_states((dense, *experts), EngineSettings.of(run, world_size))
        worst = {
            kind: max(rank["states"][case][kind] for rank in ranks) for kind in ("parameters", "optimizer", "gradients")
        }
        assert worst["parameters"] == planned.parameters, case
        assert worst["optimizer"] == planned.optimizer, case
        # Planned is the worst partition of each group, which need not be the same rank's.
        assert 0.99 * planned.gradients <= worst["gradients"] <= planned.gradients, case
    for index in range(len(ranks[0]["exchanges"])):
        found = [rank["exchanges"][index] for rank in ranks]
        # A rank answers for the pairs that it got, so only the ranks together send and keep what their tokens need.
        total = {what: [sum(one[what][side] for one in found) for side in (0, 1)] for what in ("wire", "kept")}
        assert total["wire"][0] == total["wire"][1] > 0
        assert total["kept"][0] == pytest.approx(total["kept"][1], rel=0.02)


def settled_decoder(model: ModelConfig, moe: MoEConfig) -> Decoder:
    """A decoder whose every expert has k/E of the tokens, as after stage II.

    A direction that all embeddings share stands for what a trained router has learnt to be silent about.
    """
    decoder = Decoder(model, moe, VOCAB, seed=0)
    direction = nn.functional.normalize(torch.ones(model.hidden_size), dim=0)
    with torch.no_grad():
        decoder.embedding.weight.add_(10 * direction)
        for layer in decoder.layers:
            if not isinstance(layer.mlp, MoE):
                continue
            found: list[Tensor] = []
            gate = layer.mlp.deepspeed_moe.gate
            hook = gate.register_forward_hook(lambda _, arguments, __, found=found: found.append(arguments[0]))
            decoder(TOKENS)
            hook.remove()
            (x_TD,) = found
            along_T = x_TD @ direction
            ratio_TE = x_TD @ gate.wg.weight.t() / along_T[:, None]
            gate.wg.weight.sub_(ratio_TE.quantile(1 - moe.k / moe.num_experts, dim=0)[:, None] * direction)
    return decoder


TOKENS = torch.randint(VOCAB, (16, 64), generator=torch.Generator().manual_seed(0))
DENSE_LAYERS = MoEConfig(num_experts=EXPERTS, k=1, layer_frequency=2, num_shared_experts=1, granularity=2)


@pytest.mark.filterwarnings("ignore:a ReLU router is training without")
@pytest.mark.parametrize(
    ("moe", "settled", "dtype", "checkpointing"),
    [
        (MoEConfig(num_experts=EXPERTS, k=1), True, "fp32", False),
        (MoEConfig(num_experts=EXPERTS, k=1), True, "bf16", False),
        (MoEConfig(num_experts=EXPERTS, k=1), False, "fp32", False),
        (MoEConfig(num_experts=EXPERTS, k=1), False, "bf16", True),
        (MoEConfig(num_experts=EXPERTS, k=1, activation_budget=None), False, "bf16", False),
        (DENSE_LAYERS, False, "fp32", False),
        (MoEConfig(router="topk", num_experts=EXPERTS, k=2), True, "bf16", False),
        (MoEConfig(router="dense"), True, "fp32", False),
    ],
)
def test_activations_are_those_that_autograd_keeps(
    moe: MoEConfig, settled: bool, dtype: Dtype, checkpointing: bool
) -> None:
    model = ModelConfig(**SHAPE, activation_checkpointing=checkpointing)
    relu_settled = settled and moe.router == "relu"
    decoder = settled_decoder(model, moe) if relu_settled else Decoder(model, moe, VOCAB, seed=0)
    decoder.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    pairs: list[int] = []
    for layer in decoder.layers:
        layer.mlp.register_forward_hook(
            lambda module, _, result: pairs.append(int(result[2].sum())) if isinstance(module, MoE) else None
        )
    with SavedTensors(decoder) as saved:
        decoder(TOKENS, TOKENS.clone())
    density = sum(pairs) / max(1, len(pairs)) / TOKENS.numel() / moe.total_experts
    if moe.router == "relu":
        assert density == pytest.approx(1 / 8 if settled else 1 / 2, rel=0.1)
    load = Load.of(moe, TOKENS.numel(), density, is_cpu=True, model=model)
    planned = activations(model, moe, VOCAB, load, dtype, is_cpu=True).saved
    # Beyond the budget it depends on each expert's count which chunks still fit; the plan has the most that can.
    assert (0.96 if load.recomputed_pairs else 0.995) * planned <= saved.take() <= 1.005 * planned


def test_command_checks_its_plan_against_steps_of_this_machine(tmp_path: Path) -> None:
    path, output = tmp_path / "run.json", tmp_path / "check.json"
    path.write_text(json.dumps(config_of(1, 1, True)))
    command = [sys.executable, "-m", "ds_remoe.cli", "plan", str(path), "--gpus-per-node", "1", "--check", "1"]
    environment = rank_environment(0, 1, free_port())
    done = subprocess.run(
        [*command, "--output", str(output)], env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "Planned against measured" in done.stdout
    figures = json.loads(output.read_text())["figures"]
    hardware, check = figures["plans"][0]["hardware"], figures["check"]
    assert hardware["is_cpu"]
    assert "measured here" in hardware["notes"][0]
    for rate in ("gemm_flops", "expert_flops", "attention_flops", "copy_bytes", "elementwise_bytes"):
        assert hardware[rate] > 0
    for kind in ("parameters", "gradients", "optimizer states"):
        assert check[kind]["planned"] == check[kind]["measured"]
    # Two sequences are so few pairs that a chunk is large against the budget.
    assert 0.8 < check["activations kept"]["measured"] / check["activations kept"]["planned"] <= 1.01
    assert check["step"]["planned"] > 0 < check["step"]["measured"]
    assert len(check["step_seconds"]) == 1
