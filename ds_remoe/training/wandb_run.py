"""The Weights & Biases run of a training run: one id over all resumes, one log call a step, never a reason to stop."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import wandb

from ds_remoe.config.schema import WandbConfig
from ds_remoe.training.record import StepRecord

Mode = Literal["online", "offline", "disabled"]

INIT_TIMEOUT_SECONDS = 30.0
FINISH_TIMEOUT_SECONDS = 60.0

_log = logging.getLogger(__name__)


class WandbRun:
    """Logs step records to W&B. Make one on rank 0 only.

    Whatever W&B does, training goes on. An online run that cannot start (no key, a wrong key, no server) is recorded
    offline under the same id, to be uploaded with `wandb sync`. One warning names the cause; metrics.jsonl has
    everything in any case. No call asks on the terminal, and none waits longer than its timeout.

    Args:
        config: mode, project, names. The environment's WANDB_MODE "offline" or "disabled" is obeyed over mode "online".
        run_config: the whole configuration of the run, shown by W&B.
        directory: the run's folder; W&B's files go to `directory/wandb`.
        run_id: the id that the checkpoint kept, to continue that run; None makes a new id.
        histogram_interval: optimizer steps between two histograms of the load per expert.
        warn: takes the text of a warning.
        init_timeout: seconds that an online start may take before the run is recorded offline.
        finish_timeout: seconds that `finish` may spend on uploading.
    """

    def __init__(
        self,
        config: WandbConfig,
        run_config: Mapping[str, Any],
        directory: Path,
        run_id: str | None,
        *,
        histogram_interval: int = 50,
        warn: Callable[[str], None] = _log.warning,
        init_timeout: float = INIT_TIMEOUT_SECONDS,
        finish_timeout: float = FINISH_TIMEOUT_SECONDS,
    ) -> None:
        self._warn = warn
        self._histogram_interval = histogram_interval
        self._timeouts = {"init_timeout": init_timeout, "finish_timeout": finish_timeout}
        self._run: wandb.Run | None = None
        self._first_step = 0
        self._run_id = run_id
        self.mode: Mode = _effective_mode(config.mode)
        if self.mode == "disabled":
            return
        self._run_id = run_id or new_run_id()
        try:
            self._start(config, run_config, directory)
        except Exception as error:
            if self.mode == "online":
                self._fall_back_to_offline(config, run_config, directory, error)
            else:
                self._give_up("could not start", error)

    @property
    def run_id(self) -> str | None:
        """The id that the checkpoint keeps; None for a run that never logged to W&B."""
        return self._run_id

    @property
    def folder(self) -> Path | None:
        """The folder of this session's W&B files, which `wandb sync` takes; None if there is none."""
        return None if self._run is None else Path(self._run.settings.sync_dir)

    @property
    def url(self) -> str | None:
        """Address of the run's page; None unless it runs online."""
        return None if self._run is None or self.mode != "online" else self._run.url

    def log(self, record: StepRecord) -> None:
        """Send one step in one call, under W&B step `record.step`.

        Steps that the server holds already, because the run was killed after its last checkpoint, are not sent again:
        the resumed run repeats them with the same values, and W&B refuses to go back.
        """
        if self._run is None or record.step < self._first_step:
            return
        values: dict[str, Any] = history_row(record)
        try:
            if record.step % self._histogram_interval == 0:
                values |= load_histograms(record)
            self._run.log(values, step=record.step)
        except Exception as error:
            self._give_up("stopped taking data", error)

    def finish(self, exit_code: int = 0) -> None:
        """Upload what is left and close; a second call does nothing."""
        run, folder = self._run, self.folder
        if run is None:
            return
        self._run = None
        try:
            run.finish(exit_code=exit_code)
        except Exception as error:
            self._warn(
                f"W&B did not finish: {_cause(error)}. Upload the rest with `wandb sync {folder}`; "
                "metrics.jsonl has everything."
            )

    def _start(self, config: WandbConfig, run_config: Mapping[str, Any], directory: Path) -> None:
        directory = directory.resolve()
        directory.mkdir(parents=True, exist_ok=True)
        # The login prompt reads the singleton's settings, not those of init; silent, W&B holds it back.
        quiet = {"quiet": True, "silent": True, "console": "off", "save_code": False}
        wandb.setup(settings=wandb.Settings(**quiet))
        self._run = wandb.init(
            mode=self.mode,
            project=config.project,
            entity=config.entity,
            group=config.group,
            name=config.name,
            tags=config.tags,
            config=dict(run_config),
            dir=directory,
            id=self._run_id,
            resume="allow",
            settings=wandb.Settings(**quiet, **self._timeouts, finish_timeout_raises=True),
        )
        self._first_step = self._run.starting_step

    def _fall_back_to_offline(
        self, config: WandbConfig, run_config: Mapping[str, Any], directory: Path, cause: Exception
    ) -> None:
        self.mode = "offline"
        try:
            # The failed start still holds the run's id in W&B's service.
            wandb.teardown(exit_code=1)
            self._start(config, run_config, directory)
        except Exception:
            self._give_up("could not start", cause)
            return
        self._warn(
            f"W&B could not start online: {_cause(cause)}. This run is recorded offline; upload it later with "
            f"`wandb sync {self.folder}`. metrics.jsonl has everything."
        )

    def _give_up(self, what: str, cause: Exception) -> None:
        self._run = None
        self.mode = "disabled"
        # Closed here, W&B cannot fail a second time in its own hook at the end of the process.
        with contextlib.suppress(Exception):
            wandb.teardown(exit_code=1)
        self._warn(f"W&B {what}: {_cause(cause)}. Training goes on without it; metrics.jsonl has everything.")


def new_run_id() -> str:
    """A fresh run id of 8 lower-case letters and digits, independent of every seeded generator."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


def history_row(record: StepRecord) -> dict[str, float]:
    """The record's scalars under their W&B names; values that do not exist for this run or step are left out."""
    row: dict[str, float | None] = {
        "loss/lm": record.lm_loss,
        "loss/aux": record.aux_loss,
        "loss/valid": record.valid_loss,
        "router/l1_coefficient": record.l1_coefficient,
        "router/l1_loss": record.l1_loss,
        "router/weighted_l1_loss": None if record.l1_coefficient is None else record.aux_loss,
        "router/active_experts_per_token": record.active_experts_per_token,
        "router/dead_layers": record.dead_layers,
        "router/dead_experts": record.dead_experts,
        "sparsity/overall": record.sparsity,
        **{f"sparsity/layer_{layer:02d}": value for layer, value in enumerate(record.layer_sparsity)},
        "optim/learning_rate": record.learning_rate,
        "optim/grad_norm": record.grad_norm,
        "optim/skipped": float(record.skipped is not None),
        "speed/tokens_per_second": record.tokens_per_second,
        "speed/tflops_per_device": record.tflops_per_device,
        "speed/mfu": record.mfu,
        "speed/step_seconds": record.step_seconds,
        "progress/samples": record.samples,
        "progress/tokens": record.tokens,
    }
    return {name: value for name, value in row.items() if value is not None}


def load_histograms(record: StepRecord) -> dict[str, wandb.Histogram]:
    """One histogram per MoE layer: bin e is expert e, its height the share of tokens that expert e saw.

    W&B takes at most 512 bins; with more experts, neighbours share a bin that shows their mean.
    """
    histograms = {}
    for layer, load_E in enumerate(record.expert_load):
        bins = np.array_split(np.asarray(load_E), min(len(load_E), wandb.Histogram.MAX_LENGTH))
        edges = np.cumsum([0, *(len(part) for part in bins)])
        heights = np.array([part.mean() for part in bins])
        histograms[f"expert_load/layer_{layer:02d}"] = wandb.Histogram(np_histogram=(heights, edges))
    return histograms


def _effective_mode(mode: Mode) -> Mode:
    wish = os.environ.get("WANDB_MODE")
    if mode == "online" and wish == "offline":
        return "offline"
    if mode == "online" and wish == "disabled":
        return "disabled"
    return mode


def _cause(error: Exception) -> str:
    lines = str(error).strip().rstrip(".").splitlines()
    return f"{type(error).__name__}: {' '.join(line.strip() for line in lines)}" if lines else type(error).__name__
