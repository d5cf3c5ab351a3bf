"""Entry point of a launched rank: `deepspeed --module ds_remoe.train --config FILE [--set path=value ...]`."""

from __future__ import annotations

import argparse
import os
import sys
from typing import NoReturn

from ds_remoe.commands.parser import CommandParser
from ds_remoe.config import load_run_or_exit
from ds_remoe.config.leave import GRACE_SECONDS, WRONG_INPUT, leave
from ds_remoe.launch_environment import launched_ranks, start_alone
from ds_remoe.launching.launcher_watch import stop_without_launcher
from ds_remoe.process_exit import run_and_exit

TRAINING_FAILED = 1


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line of a rank."""
    parser = CommandParser(prog="ds_remoe.train", description=__doc__)
    parser.add_argument("--config", required=True, help="a DeepSpeed JSON file with a remoe section")
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="override one value, e.g. remoe.moe.k=2"
    )
    parser.add_argument(
        "--resume",
        default="auto",
        help="auto: continue from the newest checkpoint, if any (default); none: start anew; or a checkpoint's name",
    )
    parser.add_argument("--local_rank", type=int, default=0, help="set by the deepspeed launcher")
    return parser.parse_args(arguments)


def accelerator_or_exit() -> str:
    """DeepSpeed's name of the device that this rank trains on.

    Every rank exits with code 2 where there is no such name, and with 1 where torch finds no device: it may come back.
    """
    asked = os.environ.get("DS_ACCELERATOR")
    try:
        from deepspeed.accelerator import get_accelerator

        accelerator = get_accelerator()
    except ValueError as error:
        if asked is None:
            raise
        leave(f"DS_ACCELERATOR = {asked!r} (environment): {error}")
    if not accelerator.is_available():
        leave(
            f"DS_ACCELERATOR = {asked!r} (environment): torch finds no such device here; set it to cpu, unset it, or "
            "install torch's build for the device and its driver",
            code=TRAINING_FAILED,
        )
    return str(accelerator._name)


def main(arguments: list[str] | None = None) -> int:
    """Train, and return 0.

    The process exits with 2 where configuration or checkpoint cannot be used, with 3 where another rank hangs or is
    gone, and with 1 where training fails otherwise.
    """
    options = parse_arguments(arguments)
    start_alone()
    try:
        world_size = launched_ranks()
    except ValueError as error:
        print(error, file=sys.stderr)
        return WRONG_INPUT
    stop_without_launcher()
    run = load_run_or_exit(options.config, options.set, world_size=world_size, accelerator=accelerator_or_exit())
    from ds_remoe.data.documents import DataError
    from ds_remoe.training import runtime
    from ds_remoe.training.guard import TrainingStoppedError
    from ds_remoe.training.lost_output import outlast_readers
    from ds_remoe.training.manifest import CheckpointError, CheckpointSaveError
    from ds_remoe.training.metrics import MetricsError
    from ds_remoe.training.report import report
    from ds_remoe.training.trainer import Trainer
    from ds_remoe.training.watchdog import HUNG

    outlast_readers()
    runtime.quiet_output()
    device = runtime.start(run.remoe.train.seed)
    watchdog = runtime.watch(run.remoe.train)

    def end(message: str, code: int, grace_seconds: float = GRACE_SECONDS) -> NoReturn:
        watchdog.position.at("ending")  # it may take its time
        leave(message, grace_seconds, code)

    try:
        trainer = Trainer(run, device, watchdog.position)
        outcome = trainer.train(options.resume)
        if outcome.trained and outcome.stopped_by is None:
            report(trainer, outcome)
    except (CheckpointSaveError, TrainingStoppedError) as error:
        end(str(error), TRAINING_FAILED)
    except (CheckpointError, DataError, MetricsError) as error:
        end(str(error), WRONG_INPUT)
    except RuntimeError as error:
        gone = watchdog.explain(error)
        if gone is None:
            raise
        end(gone, HUNG, grace_seconds=0 if watchdog.rank_0_is_silent else GRACE_SECONDS)
    if not outcome.trained:
        print(f"Nothing to do: {outcome.checkpoint} is at step {outcome.step} of {run.remoe.train.steps}.")
        print(f"To train on: {trainer.continue_command(outcome.step)}")
    runtime.stop(watchdog)
    return 0


if __name__ == "__main__":
    run_and_exit(main)
