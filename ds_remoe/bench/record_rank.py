"""One rank of a recorded run: the training is the real one, and hooks on its routers copy what they decide."""

from __future__ import annotations

import argparse
import functools
import os
import signal
from collections.abc import Callable, Collection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from ds_remoe.bench.record import metadata, part
from ds_remoe.bench.trace import TracedRouting, write_trace
from ds_remoe.config import load_run
from ds_remoe.moe.routing import Routing
from ds_remoe.moe.sparsity import find_routers
from ds_remoe.process_exit import run_and_exit
from ds_remoe.training import runtime
from ds_remoe.training.trainer import Trainer


class RoutingRecorder:
    """Copies every router's `Routing` in the micro-batches of some optimizer steps.

    A forward pass of the model in training mode is one micro-batch; evaluation is not counted, nor a router's second
    forward pass under activation checkpointing.

    Args:
        model: holds the routers; its own forward is one micro-batch.
        steps: the wanted optimizer steps, counted from 1.
        accumulation: micro-batches of a step.
        rank: written into the records.
        when_done: called at the end of the last wanted micro-batch's forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        steps: Collection[int],
        accumulation: int,
        rank: int,
        when_done: Callable[[], object] = lambda: None,
    ) -> None:
        self.records: list[TracedRouting] = []
        self._model, self._steps, self._accumulation, self._rank = model, frozenset(steps), accumulation, rank
        self._last, self._when_done = max(steps), when_done
        self._micro_batches = 0
        self._seen: set[int] = set()
        self._handles: list[Any] = []

    def __enter__(self) -> RoutingRecorder:
        self._handles.append(self._model.register_forward_pre_hook(self._begin_micro_batch))
        self._handles.append(self._model.register_forward_hook(self._end_micro_batch))
        for layer, router in enumerate(find_routers(self._model)):
            self._handles.append(router.register_forward_hook(self._record_layer(layer)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        while self._handles:
            self._handles.pop().remove()

    @property
    def _position(self) -> tuple[int, int]:
        """Step, counted from 1, and micro-batch, counted from 0, of the present forward pass."""
        step, micro_batch = divmod(self._micro_batches - 1, self._accumulation)
        return step + 1, micro_batch

    def _begin_micro_batch(self, model: nn.Module, inputs: Any) -> None:
        if model.training:
            self._micro_batches += 1
            self._seen.clear()

    def _end_micro_batch(self, model: nn.Module, inputs: Any, output: Any) -> None:
        if model.training and self._position == (self._last, self._accumulation - 1):
            self._when_done()

    def _record_layer(self, layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def record(router: nn.Module, inputs: Any, output: tuple[Routing, Any]) -> None:
            step, micro_batch = self._position
            if not router.training or step not in self._steps or layer in self._seen:
                return
            self._seen.add(layer)
            routing = output[0]
            mask_TE = routing.mask_TE.cpu().clone(memory_format=torch.contiguous_format)
            weights_TE = torch.where(mask_TE, routing.weights_TE.detach().float().cpu(), 0.0)
            tokens, num_experts = mask_TE.shape
            self.records.append(
                TracedRouting(step, layer, self._rank, num_experts, tokens, mask_TE, weights_TE, micro_batch)
            )

        return record


def main(arguments: list[str] | None = None) -> int:
    """Train, and write what this rank recorded."""
    parser = argparse.ArgumentParser(prog="ds_remoe.bench.record_rank", description=main.__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--steps", type=int, nargs="+", required=True)
    parser.add_argument("--folder", required=True)
    options = parser.parse_args(arguments)
    world_size = int(os.environ["WORLD_SIZE"])
    run = load_run(Path(options.config), options.set, world_size=world_size)
    runtime.quiet_output()
    trainer = Trainer(run, runtime.start(run.remoe.train.seed))
    # The run is asked to end as a user asks it: it finishes its step.
    end = functools.partial(signal.raise_signal, signal.SIGUSR1)
    with RoutingRecorder(trainer.model, options.steps, trainer.batch.accumulation, trainer.rank, end) as recorder:
        trainer.train(resume="none")
    write_trace(part(options.folder, trainer.rank), metadata(run, options.steps, world_size), recorder.records)
    runtime.stop()
    return 0


if __name__ == "__main__":
    run_and_exit(main)
