"""Where the record of each step goes: progress bar, metrics.jsonl and W&B."""

from __future__ import annotations

from typing import Any, Self

from ds_remoe.config import RunConfig
from ds_remoe.training.metrics import MetricsLog
from ds_remoe.training.progress import TrainProgress
from ds_remoe.training.record import StepRecord
from ds_remoe.training.run_files import METRICS
from ds_remoe.training.wandb_run import WandbRun


class RunLogs:
    """Rank 0's progress bar, metrics.jsonl and W&B run; the other ranks' stay silent.

    Args:
        run: its configuration.
        main: whether this is rank 0.
        start: optimizer steps done before this session.
        wandb_run_id: the id that the checkpoint kept.
    """

    def __init__(self, run: RunConfig, *, main: bool, start: int, wandb_run_id: str | None) -> None:
        config = run.remoe
        target = config.moe.target_sparsity if config.moe.router == "relu" else None
        self.progress = TrainProgress(config.train.steps, start, target, enabled=main)
        self._metrics: MetricsLog | None = None
        self._wandb: WandbRun | None = None
        if main:
            self._metrics = MetricsLog.resume(config.output_dir / METRICS, start)
            self._wandb = WandbRun(
                config.logging.wandb,
                run.deepspeed,
                config.output_dir,
                wandb_run_id,
                histogram_interval=config.logging.histogram_interval,
                warn=self.progress.message,
            )

    def __enter__(self) -> Self:
        self.progress.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.progress.__exit__(kind, error, trace)
        if self._metrics is not None:
            self._metrics.close()
        if self._wandb is not None:
            self._wandb.finish(0 if error is None else 1)

    @property
    def wandb_run_id(self) -> str | None:
        """Id of the W&B run that a checkpoint keeps."""
        return self._wandb.run_id if self._wandb is not None else None

    def write(self, record: StepRecord) -> None:
        """Send a step to metrics.jsonl, W&B and the bar."""
        if self._metrics is not None and self._wandb is not None:
            self._metrics.append(record)
            self._wandb.log(record)
        self.progress.update(record)

    def sync(self) -> None:
        """Put metrics.jsonl on the disk, so that no checkpoint is ahead of it."""
        if self._metrics is not None:
            self._metrics.sync()
