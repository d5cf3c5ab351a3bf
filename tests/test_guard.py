"""Steps that are skipped: weights, moments, λ and schedule stay, all ranks agree, and a run stops after too many."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_resume import Run, run_config

from ds_remoe import initialize
from ds_remoe.config import load_run
from ds_remoe.config.checks import check_spike_guard
from ds_remoe.config.schema import ModelConfig, MoEConfig, SpikeGuardConfig, TrainConfig
from ds_remoe.model.decoder import Decoder
from ds_remoe.training import metrics
from ds_remoe.training.engine import guard_steps
from ds_remoe.training.guard import StepGuard, TrainingStoppedError, refuse_non_finite
from ds_remoe.training.trainer import Trainer

VOCAB, ACCUMULATION = 61, 2
MODEL = ModelConfig(hidden_size=16, num_layers=2, num_heads=2, ffn_hidden_size=24, seq_length=10, init_std=0.2)
FAULTS = {4: "infinite loss", 5: "gradient", 8: "spike"}
REASONS = {"infinite loss": "non_finite", "gradient": "non_finite", "spike": "spike"}
WINDOW = 4


def build(stage: int, bf16: bool, *, seed: int = 3) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": ACCUMULATION,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 50}},
        "zero_optimization": {"stage": stage},
        # Without it a bf16 step of ZeRO takes any norm; its default is true.
        "bf16": {"enabled": bf16, "check_grad_overflow": stage != 1},
        "steps_per_print": 1_000_000_000,
        "remoe": {"sparsity": {"lambda_init": 1e-3}},
    }
    model = Decoder(MODEL, MoEConfig(num_experts=4, ep_size=2), VOCAB, seed)
    engine, *_ = initialize(model=model, model_parameters=list(model.parameters()), config=config)
    guard_steps(engine, StepGuard(2, SpikeGuardConfig(factor=4.0, window=WINDOW)))
    return engine


def train_step(engine: Any, step: int, fault: str | None = None) -> list[float]:
    """One optimizer step; a fault comes up on rank 1 alone, in its first micro-batch."""
    rank, losses = dist.get_rank(), []
    for index in range(ACCUMULATION):
        generator = torch.Generator().manual_seed(1000 * step + 2 * index + rank)
        tokens = torch.randint(VOCAB, (2, 11), generator=generator)
        loss = engine(tokens[:, :-1], tokens[:, 1:]).loss
        handle = None
        if rank == 1 and index == 0 and fault == "infinite loss":
            loss = loss + math.inf
        if rank == 1 and index == 0 and fault == "gradient":
            expert = [p for p in engine.module.parameters() if not getattr(p, "allreduce", True)][-1]
            handle = expert.register_hook(lambda grad: torch.full_like(grad, math.nan))
        if rank == 1 and index == 0 and fault == "spike":
            loss = loss * 1e4
        engine.backward(refuse_non_finite(loss))
        if handle is not None:
            handle.remove()
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def held(engine: Any) -> list[torch.Tensor]:
    """Weights, master weights and moments of this rank."""
    optimizer = engine.basic_optimizer
    tensors = [*engine.module.parameters(), *(p for group in optimizer.param_groups for p in group["params"])]
    tensors += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return [tensor.detach().clone() for tensor in tensors]


def engine_case(folder: str, stage: int, bf16: bool) -> list[str]:
    """What went wrong with one ZeRO stage and dtype."""
    wrong: list[str] = []
    engine, plain = build(stage, bf16), build(stage, bf16)
    after: dict[int, list[float]] = {}
    for step in range(11):
        fault = FAULTS.get(step)
        before, coefficient, rate = held(engine), engine.remoe.controller.coefficient, engine.get_lr()
        losses = train_step(engine, step, fault)
        state = engine.remoe
        if state.skipped != (REASONS[fault] if fault else None):
            wrong.append(f"step {step}, {fault}: skipped is {state.skipped}, norm {state.grad_norm}")
        if fault:
            same = len(before) == len(held(engine)) and all(map(torch.equal, before, held(engine)))
            if not same or state.controller.coefficient != coefficient or engine.get_lr() != rate:
                wrong.append(f"step {step}, {fault}: weights, moments, λ or schedule moved")
            if math.isfinite(state.grad_norm) != (fault == "spike"):
                wrong.append(f"step {step}, {fault}: norm {state.grad_norm}")
        else:
            after[step] = losses
            if losses != train_step(plain, step):
                wrong.append(f"step {step}: not the losses of a run that never saw the skipped steps")
        if step == 7:
            engine.save_checkpoint(f"{folder}/{stage}{bf16}")
    if engine.global_steps != 11 or engine.skipped_steps != len(FAULTS):
        wrong.append(f"{engine.global_steps} steps, {engine.skipped_steps} of them skipped")
    resumed = build(stage, bf16, seed=4)
    resumed.load_checkpoint(f"{folder}/{stage}{bf16}")
    for step in range(8, 11):
        losses = train_step(resumed, step, FAULTS.get(step))
        if step in after and losses != after[step]:
            wrong.append(f"step {step}: other losses after a resume")
    if resumed.remoe.guard.state_dict() != engine.remoe.guard.state_dict():
        wrong.append(f"the guard after a resume: {resumed.remoe.guard.state_dict()}")
    return [f"stage {stage}, bf16 {bf16}: {line}" for line in wrong]


def run_case(root: str) -> dict[str, Any]:
    """A run whose loss is infinite on rank 1 in steps 3, 6 and 7 (from 1), with one skipped step in a row allowed."""
    path = Path(root) / f"run{dist.get_rank()}.json"
    config = run_config(Path(root) / "run", Path(root) / "data")
    config["remoe"]["train"] |= {"save_interval": 5, "max_skipped_steps": 1}
    config["remoe"]["logging"]["wandb"]["mode"] = "disabled"
    path.write_text(json.dumps(config))
    trainer = Trainer(load_run(path, [], world_size=2), torch.device("cpu"))
    calls = 0

    def spoil(module: Any, arguments: Any, output: Any) -> Any:
        nonlocal calls
        step, index = divmod(calls, 2)
        calls += 1
        spoilt = dist.get_rank() == 1 and step + 1 in (3, 6, 7) and index == 1
        return output._replace(loss=output.loss + math.inf) if spoilt else output

    trainer.model.register_forward_hook(spoil)
    with pytest.raises(TrainingStoppedError) as stopped:
        trainer.train("none")
    controller = trainer.engine.remoe.controller
    return {
        "message": str(stopped.value),
        "samples": trainer.train_batches.samples(6, 1, 1).tolist(),
        "history": controller.history,
        "coefficient": controller.coefficient,
        "weights": [float(p.double().sum()) for p in trainer.model.parameters() if getattr(p, "allreduce", True)],
    }


def all_cases(root: str) -> tuple[list[str], dict[str, Any]]:
    wrong = [line for stage in (0, 1, 2) for bf16 in (False, True) for line in engine_case(root, stage, bf16)]
    return wrong, run_case(root)


@pytest.mark.timeout(400)
def test_skipped_steps_leave_no_trace_and_too_many_stop_the_run(tmp_path: Path) -> None:
    results = run_ranks(all_cases, 2, str(tmp_path))
    assert not (wrong := [line for lines, _ in results for line in lines]), "\n".join(wrong)
    (_, main), (_, other) = results
    assert main == other
    message = main["message"]
    assert message.startswith("step 7 skipped (2 in a row, at most 1 allowed): loss inf on rank 1 in micro-batch 1")
    assert "positions 54 ... 55 of the order" in message
    assert f"samples {', '.join(map(str, main['samples']))} of the dataset" in message
    assert "the step took positions 48 ... 55" in message
    records = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert [record.step for record in records if record.skipped == "non_finite"] == [3, 6, 7]
    assert [record.samples for record in records] == [8 * step for step in range(1, 8)]
    assert records[2].l1_coefficient == records[3].l1_coefficient == main["history"][2][0]
    assert records[3].learning_rate == records[2].learning_rate < records[4].learning_rate
    assert records[6].l1_coefficient == main["coefficient"]
    assert len(main["history"]) == 4
    assert records[2].grad_norm == math.inf
    # The launched run ends with code 1 and one clear message.
    run = Run(tmp_path / "diverged", tmp_path / "data")
    output = run.finish(
        "--set", "optimizer.params.weight_decay=1e30", "--set", "remoe.logging.wandb.mode=disabled", code=1
    )
    assert output.count("max_skipped_steps = 3: training stops") == 1, output[-4000:]
    assert "Traceback" not in output


def test_spikes_are_judged_by_the_median_of_applied_steps() -> None:
    guard = StepGuard(1, SpikeGuardConfig(factor=3.0, window=3))
    cpu = torch.device("cpu")

    def step(norm: float) -> str | None:
        value, reason = guard.judge(torch.tensor(norm, dtype=torch.float64), cpu)
        guard.close(value, reason)
        return reason

    assert [step(norm) for norm in (1.0, 100.0, 2.0)] == [None] * 3, "judged before its window was full"
    assert [step(norm) for norm in (6.0, 6.1)] == [None, None]  # medians 2 and then 6
    assert step(18.1) == "spike"
    again = StepGuard(1, SpikeGuardConfig(factor=3.0, window=3))
    again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert (again.in_a_row, again.bound) == (1, 18.0)
    assert step(math.nan) == "non_finite"
    with pytest.raises(TrainingStoppedError, match="makes 2 skipped in a row"):
        guard.check("")
    assert step(-1.0) == "non_finite"
    assert step(18.0) is None
    guard.check("")
    narrower = StepGuard(1, SpikeGuardConfig(factor=3.0, window=2))
    narrower.load_state_dict(guard.state_dict())
    assert narrower.bound == 3 * (6.1 + 18.0) / 2


def test_dynamic_loss_scaling_and_a_spike_guard_exclude_each_other() -> None:
    train = TrainConfig.model_validate({"steps": 1, "output_dir": "x", "spike_guard": {}})
    problems = [list(check_spike_guard({"fp16": fp16}, train)) for fp16 in ({"enabled": True}, {"enabled": False})]
    assert [len(found) for found in problems] == [1, 0]
    assert "remoe.train.spike_guard" in str(problems[0][0])
    assert not list(check_spike_guard({"fp16": {"enabled": True, "loss_scale": 128}}, train))


def test_a_finite_loss_stays_as_it_is() -> None:
    weight = torch.tensor(0.1, requires_grad=True)
    loss = weight * 3
    assert torch.equal(refuse_non_finite(loss), loss)
    (expected,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (got,) = torch.autograd.grad(refuse_non_finite(loss), weight, retain_graph=True)
    assert torch.equal(got, expected)
    (bad,) = torch.autograd.grad(refuse_non_finite(loss + math.inf), weight)
    assert bad.isnan()
