"""The training loop: steps, evaluation, checkpoints and logs of one run."""

from __future__ import annotations

import contextlib
import io
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock
from torch import Tensor

from ds_remoe.config import RunConfig
from ds_remoe.config.batch import BatchSizes
from ds_remoe.data.batches import MicroBatches, repeated_validation, training_batches, validation_batches
from ds_remoe.data.prepare import PreparedData, prepare
from ds_remoe.launch_environment import launch_command
from ds_remoe.model.decoder import Decoder
from ds_remoe.model.flops import flops_per_token
from ds_remoe.training.agreement import on_rank_0
from ds_remoe.training.checkpoint import Checkpoints
from ds_remoe.training.engine import guard_steps, initialize
from ds_remoe.training.guard import StepGuard, describe_skip, refuse_non_finite
from ds_remoe.training.host_memory import MemoryRelief
from ds_remoe.training.manifest import CheckpointSaveError, RunIdentity
from ds_remoe.training.record import StepRecord
from ds_remoe.training.routing_watch import WATCH_KEY, RoutingWatch
from ds_remoe.training.run_files import CHECKPOINTS, refuse_misplaced
from ds_remoe.training.run_lock import lock_folder
from ds_remoe.training.run_logs import RunLogs
from ds_remoe.training.runtime import StopSignals
from ds_remoe.training.stop_mark import mark_stop
from ds_remoe.training.watchdog import Position


@dataclass(frozen=True)
class Outcome:
    """How a session of a run ended.

    Attributes:
        step: optimizer steps done.
        checkpoint: the newest one.
        stopped_by: name of the signal that ended it early; None where all steps are done.
        trained: whether this session did any step.
        seconds: wall time of this session.
    """

    step: int
    checkpoint: Path
    stopped_by: str | None
    trained: bool
    seconds: float


@dataclass(frozen=True)
class StepLosses:
    """Means over the micro-batches and ranks of one optimizer step, and what came up in it.

    Attributes:
        lm_loss, aux_loss: the means.
        stop: whether a rank was asked to stop.
        notes: what the user is to be told.
    """

    lm_loss: float
    aux_loss: float
    stop: bool
    notes: tuple[str, ...] = ()


class Trainer:
    """Builds data, model and engine of a run on this rank, and trains it.

    Args:
        run: a configuration that passed its checks.
        device: of this rank; the process group exists.
        position: is told where this rank is.
    """

    def __init__(self, run: RunConfig, device: torch.device, position: Position | None = None) -> None:
        self.run, self.config, self.device = run, run.remoe, device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.batch: BatchSizes = run.batch_sizes(self.world_size)
        self.position = position or Position()
        self.signals = StopSignals()
        self._lock: FileLock | None = None
        on_rank_0(self._take_folder)
        self.position.at("preparing the data")
        self.data: PreparedData = prepare(self.config.data, self.config.model.seq_length, progress=self.rank == 0)
        train = self.config.train
        shape = {"micro_batch_size": self.batch.micro_batch, "world_size": self.world_size}
        self.train_batches: MicroBatches = training_batches(
            self.data.train, seed=train.seed, accumulation_steps=self.batch.accumulation, **shape
        )
        self.valid_batches: MicroBatches = validation_batches(
            self.data.valid, num_micro_batches=train.eval_batches * self.batch.accumulation * self.world_size, **shape
        )
        self.position.at("starting")
        vocab_size = self.data.tokenizer.vocab_size
        self.model = Decoder(self.config.model, self.config.moe, vocab_size, train.seed)
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints of each group that it makes
            self.engine, *_ = initialize(
                model=self.model, model_parameters=list(self.model.parameters()), config=run.deepspeed
            )
        self.memory = MemoryRelief()
        self.guard = StepGuard(train.max_skipped_steps, train.spike_guard)
        guard_steps(self.engine, self.guard)
        self.watch = RoutingWatch(train.dead_after)
        self.engine.remoe.carried[WATCH_KEY] = self.watch
        self.checkpoints = Checkpoints(self.config.output_dir / CHECKPOINTS, self._identity(), train.keep_checkpoints)

    def train(self, resume: str = "auto") -> Outcome:
        """Train from the chosen checkpoint (or the start) to the last step, or until a signal.

        Args:
            resume: "auto", "none" or a checkpoint's tag.

        Raises:
            CheckpointError: the checkpoint cannot be continued by this run, or one cannot be saved.
            TrainingStoppedError: more steps in a row were skipped than train.max_skipped_steps.
        """
        began = time.monotonic()
        self.position.at("loading a checkpoint")
        choice = self.checkpoints.choose(resume)
        if choice is not None:
            self.checkpoints.load(self.engine, choice)
        checkpoint: Path | None = choice.path if choice else None
        start = choice.manifest.step if choice else 0
        if checkpoint is not None and start >= self.config.train.steps:
            return Outcome(start, checkpoint, None, False, time.monotonic() - began)
        self.position.at("starting")
        stopped_by: str | None = None
        wandb_run_id = choice.manifest.wandb_run_id if choice else None
        with RunLogs(self.run, main=self.rank == 0, start=start, wandb_run_id=wandb_run_id) as logs:
            repeated = repeated_validation(self.data.valid, self.config.train.eval_batches, self.batch.global_batch)
            for note in (*(choice.notes if choice else ()), *filter(None, [repeated])):
                logs.progress.message(note)
            if checkpoint is not None:
                logs.progress.message(f"continuing from {checkpoint}")
            for step in range(start, self.config.train.steps):
                losses, record = self.step(step)
                self.position.at("logging", record.step)
                logs.write(record)
                self.guard.check("\n".join(losses.notes))
                for note in losses.notes:
                    logs.progress.message(note)
                done = record.step == self.config.train.steps
                stop = losses.stop and not done
                if done or stop or record.step % self.config.train.save_interval == 0:
                    checkpoint = self._save(record, logs, last=done or stop) or checkpoint
                if stop:
                    stopped_by = self.signals.received or "a signal to another rank"
                    logs.progress.message(f"stopped by {stopped_by} after step {record.step}; saved {checkpoint}")
                    if self.rank == 0:
                        mark_stop(self.config.output_dir, stopped_by)
                    break
            self.position.at("ending", record.step)
        assert checkpoint is not None
        return Outcome(record.step, checkpoint, stopped_by, True, time.monotonic() - began)

    def step(self, step: int) -> tuple[StepLosses, StepRecord]:
        """One optimizer step, counted from 0, with its evaluation where one is due."""
        began = time.monotonic()
        learning_rate = float(self.engine.get_lr()[0])
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        micro_batch_losses: list[Tensor] = []
        for index in range(self.batch.accumulation):
            self.position.at("forward", step + 1, index)
            inputs, labels = self._batch(self.train_batches, step, index)
            output = self.engine(inputs, labels)
            self.position.at("backward", step + 1, index)
            self.engine.backward(refuse_non_finite(output.loss))
            self.position.at("optimizer step", step + 1, index)
            self.engine.step()
            micro_batch_losses.append(output.loss.detach())
            sums[0] += output.lm_loss.detach()
            sums[1] += output.aux_loss.detach()
        sums[2] = float(self.signals.received is not None)
        dist.all_reduce(sums)
        lm_sum, aux_sum, stops = sums.tolist()
        micro_batches = self.batch.accumulation * self.world_size
        notes = tuple(self._notes(step, micro_batch_losses))
        losses = StepLosses(lm_sum / micro_batches, aux_sum / micro_batches, stops > 0, notes)
        seconds = time.monotonic() - began
        due = (step + 1) % self.config.train.eval_interval == 0 or step + 1 == self.config.train.steps
        valid_loss = self.evaluate() if due else None
        return losses, self._record(step + 1, losses, learning_rate, seconds, valid_loss)

    def _save(self, record: StepRecord, logs: RunLogs, *, last: bool) -> Path | None:
        """Save after a step; None where that failed and training is to go on."""
        self.position.at("saving a checkpoint", record.step)
        logs.sync()
        try:
            return self.checkpoints.save(self.engine, record.step, record.samples, logs.wandb_run_id)
        except CheckpointSaveError as error:
            if last or self.config.train.on_save_error == "stop":
                raise
            logs.progress.message(f"{error}\nTraining goes on after step {record.step}")
            return None

    def evaluate(self) -> float:
        """Mean language-model loss over the validation batches, all ranks together, in nats per token."""
        self.engine.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for index in range(self.valid_batches.accumulation_steps):
                self.position.at("evaluation", self.engine.global_steps, index)
                inputs, labels = self._batch(self.valid_batches, 0, index)
                total += self.engine(inputs, labels).lm_loss
        self.engine.train()
        dist.all_reduce(total)
        return float(total) / (self.valid_batches.accumulation_steps * self.world_size)

    def continue_command(self, step: int) -> str:
        """The command that trains twice as long from the checkpoint of optimizer step `step`."""
        steps = 2 * max(step, self.config.train.steps)
        settings = {"remoe.train.steps": str(steps)}
        if "total_num_steps" in self.run.deepspeed.get("scheduler", {}).get("params", {}):
            settings["scheduler.params.total_num_steps"] = str(steps)
        given = dict(override.split("=", 1) for override in self.run.overrides)
        overrides = " ".join(f"--set {shlex.quote(f'{key}={value}')}" for key, value in (given | settings).items())
        path = shlex.quote(str(self.run.path))
        return f"{launch_command(self.world_size)} --config {path} {overrides}"

    def _take_folder(self) -> None:
        self._lock = lock_folder(self.config.output_dir)
        refuse_misplaced(self.config.output_dir)

    def _notes(self, step: int, micro_batch_losses: list[Tensor]) -> list[str]:
        """What there is to tell of a step: short memory, that it was skipped, what died or came back."""
        state = self.engine.remoe
        memory = self.memory.look() if self.device.type == "cpu" else None
        notes = [] if memory is None else [f"step {step + 1}: {memory}"]
        if state.skipped is not None:
            batches = self.train_batches
            skipped = describe_skip(step, state.skipped, state.grad_norm, self.guard, micro_batch_losses, batches)
            return [*notes, skipped]
        return [*notes, *(self.watch.update(state.report, step + 1) if state.report is not None else [])]

    def _batch(self, batches: MicroBatches, step: int, index: int) -> tuple[Tensor, Tensor]:
        tokens = batches.tokens(step, index, self.rank).to(self.device)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def _record(
        self, step: int, losses: StepLosses, learning_rate: float, seconds: float, valid_loss: float | None
    ) -> StepRecord:
        state, config = self.engine.remoe, self.config
        routing, controller = state.report, state.controller
        step_tokens = self.batch.global_batch * config.model.seq_length
        active = routing.active_experts_per_token if routing else 0.0
        flops = flops_per_token(config.model, config.moe, self.data.tokenizer.vocab_size, active) * step_tokens
        tflops = flops / seconds / self.world_size / 1e12
        peak = config.logging.peak_tflops
        coefficient: float | None = None
        if controller is not None:
            moved = state.skipped is None and controller.history
            coefficient = controller.history[-1][0] if moved else controller.coefficient
        return StepRecord(
            step=step,
            samples=step * self.batch.global_batch,
            tokens=step * step_tokens,
            lm_loss=losses.lm_loss,
            aux_loss=losses.aux_loss,
            l1_coefficient=coefficient,
            l1_loss=routing.aux_loss if controller and routing else None,
            sparsity=routing.sparsity if routing else None,
            layer_sparsity=tuple(layer.sparsity for layer in routing.layers) if routing else (),
            active_experts_per_token=active if routing else None,
            expert_load=tuple(layer.load for layer in routing.layers) if routing else (),
            learning_rate=learning_rate,
            grad_norm=state.grad_norm,
            tokens_per_second=step_tokens / seconds,
            tflops_per_device=tflops,
            mfu=tflops / peak if peak else None,
            step_seconds=seconds,
            valid_loss=valid_loss,
            skipped=state.skipped,
            dead_layers=self.watch.dead_layers if routing else None,
            dead_experts=self.watch.dead_experts if routing else None,
        )

    def _identity(self) -> RunIdentity:
        deepspeed = self.run.deepspeed
        precisions = [name for name in ("bf16", "fp16") if deepspeed.get(name, {}).get("enabled", False)]
        return RunIdentity(
            world_size=self.world_size,
            ep_size=self.config.moe.ep_size,
            zero_stage=int(self.engine.zero_optimization_stage()),
            dtype=precisions[0] if precisions else "fp32",
            micro_batch_size=self.batch.micro_batch,
            gradient_accumulation_steps=self.batch.accumulation,
            optimizer=deepspeed["optimizer"]["type"],
            seed=self.config.train.seed,
            data=self.data.fingerprint,
            model=self.config.model.model_dump(mode="json"),
            moe=self.config.moe.model_dump(mode="json"),
            sparsity=self.config.sparsity.model_dump(mode="json"),
            scheduler=deepspeed.get("scheduler", {}).get("type", "none"),
        )
