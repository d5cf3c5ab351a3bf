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

from ds_remoe.deepspeed_compat import set_subgroup_timeout, use_gloo_only
from ds_remoe.kernels.backend import kernels_wanted
from ds_remoe.kernels.cpu_library import load_cpu_library
from ds_remoe.training.host_memory import reuse_freed_memory


def start(seed: int) -> torch.device:
    """Make the process group, choose this rank's device and seed its random state.

    DEEPSPEED_TIMEOUT (minutes, default 30) holds for every group, the expert-parallel ones included.

    Returns:
        The device that this rank trains on.
    """
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
    timeout = timedelta(minutes=float(os.environ.get("DEEPSPEED_TIMEOUT", "30")))
    set_subgroup_timeout(timeout)
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
    random.seed(seed + dist.get_rank())
    np.random.seed(seed + dist.get_rank())
    torch.manual_seed(seed + dist.get_rank())
    return torch.device(accelerator.current_device_name())


def stop() -> None:
    """Leave the process group, once every rank is done."""
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
