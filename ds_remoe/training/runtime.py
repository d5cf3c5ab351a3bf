"""Start of a launched process: device, process group, random state, and the signals that ask for a last checkpoint."""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import warnings
from datetime import timedelta
from types import FrameType

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from ds_remoe.config.schema import TrainConfig
from ds_remoe.deepspeed_compat import import_muon_uncompiled, set_subgroup_timeout, use_gloo_only
from ds_remoe.kernels.backend import kernels_wanted
from ds_remoe.kernels.cpu_library import load_cpu_library
from ds_remoe.launch_environment import collective_timeout
from ds_remoe.training.host_memory import reuse_freed_memory
from ds_remoe.training.watchdog import Limits, Watchdog

DEFAULT_HANG_TIMEOUT = 300.0
"""Seconds; DEEPSPEED_TIMEOUT where that is less."""


def start(seed: int) -> torch.device:
    """Make the process group, choose this rank's device and seed its random state.

    DEEPSPEED_TIMEOUT (minutes, default 30) holds for every group, the expert-parallel ones included.

    Returns:
        The device that this rank trains on.
    """
    import_muon_uncompiled()  # the optimizers of a run are Adam and AdamW
    accelerator = get_accelerator()
    backend = accelerator.communication_backend_name()
    if accelerator._name == "cpu":
        use_gloo_only()
        reuse_freed_memory()
        if kernels_wanted():
            load_cpu_library()  # what takes long the first time happens before the progress bar
        backend = "gloo"
    else:
        accelerator.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    timeout = timedelta(seconds=collective_timeout())
    set_subgroup_timeout(timeout)
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
    random.seed(seed + dist.get_rank())
    np.random.seed(seed + dist.get_rank())
    torch.manual_seed(seed + dist.get_rank())
    return torch.device(accelerator.current_device_name())


def watch(train: TrainConfig) -> Watchdog:
    """Have this run end where a rank hangs."""
    collective = collective_timeout()
    return Watchdog(Limits(min(train.hang_timeout or DEFAULT_HANG_TIMEOUT, collective), collective))


def stop(watchdog: Watchdog | None = None) -> None:
    """Leave the process group, once every rank is done."""
    if watchdog is not None:
        dist.barrier()  # the watchdog's store ends with rank 0
        watchdog.close()
    dist.barrier()
    dist.destroy_process_group()


def quiet_output() -> None:
    """Keep DeepSpeed's start-up chatter out of the terminal; warnings and errors stay."""
    deepspeed_log = logging.getLogger("DeepSpeed")
    deepspeed_log.setLevel(logging.WARNING)
    # Every WarmupLR warns so of itself while it is made.
    deepspeed_log.addFilter(lambda record: "before it has started" not in record.getMessage())
    warnings.filterwarnings("ignore", category=FutureWarning)
    if int(os.environ.get("RANK", "0")) != 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # libraries print on every rank


class StopSignals:
    """Remembers that SIGTERM, SIGUSR1 or SIGINT came, so that the loop can finish its step and save.

    The launcher may pass a signal on that a rank got already, so SIGTERM is only remembered, however often it comes; a
    second SIGINT (Ctrl-C) interrupts.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(signum, self._remember)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(signum).name
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
