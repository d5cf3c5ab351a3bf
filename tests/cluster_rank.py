"""One rank of test_cluster.py: trains a configuration at each ZeRO stage and notes losses, routing, and the wire."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from cluster_hosts import sent_bytes
from deepspeed.moe.utils import is_moe_param

from ds_remoe.config import load_run
from ds_remoe.moe.routers import Router
from ds_remoe.process_exit import run_and_exit
from ds_remoe.training import runtime
from ds_remoe.training.trainer import Trainer

STEPS = 3


def quiet_wire() -> int:
    """Bytes sent so far, once every rank has come here, and before any goes on."""
    dist.barrier()
    sent = sent_bytes()
    dist.barrier()
    return sent


def train(config: str, stage: int, ep_size: int, folder: str) -> list[dict[str, Any]]:
    """A row for each micro-batch: its losses, each layer's mask, and the bytes of forward, backward and step."""
    settings = [f"zero_optimization.stage={stage}", f"remoe.moe.ep_size={ep_size}"]
    settings.append(f"remoe.train.output_dir={folder}/stage{stage}")
    run = load_run(config, settings, world_size=dist.get_world_size(), accelerator="cpu")
    trainer = Trainer(run, torch.device("cpu"))
    masks: list[torch.Tensor] = []
    for module in trainer.model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda module, inputs, result: masks.append(result[0].mask_TE.clone()))
    sizes = {True: 0, False: 0}
    for parameter in trainer.model.parameters():
        sizes[is_moe_param(parameter)] += 4 * parameter.numel()
    rows = []
    for step in range(STEPS):
        for index in range(trainer.batch.accumulation):
            tokens = trainer.train_batches.tokens(step, index, dist.get_rank())
            masks.clear()
            before = quiet_wire()
            output = trainer.engine(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
            forward = quiet_wire()
            trainer.engine.backward(output.loss)
            backward = quiet_wire()
            trainer.engine.step()
            rows.append(
                {
                    "losses": (output.lm_loss.item(), output.aux_loss.item()),
                    "masks": list(masks),
                    "is_boundary": index + 1 == trainer.batch.accumulation,
                    "dense_bytes": sizes[False],
                    "expert_bytes": sizes[True],
                    "forward": forward - before,
                    "backward": backward - forward,
                    "step": quiet_wire() - backward,
                }
            )
    return rows


def train_stages(config: str, ep_size: int, folder: str) -> None:
    """Write the rows of both stages to FOLDER/rank{r}.pt."""
    rows = {stage: train(config, stage, ep_size, folder) for stage in (1, 2)}
    torch.save(rows, f"{folder}/rank{dist.get_rank()}.pt")


def main() -> None:
    """One rank that the launcher started."""
    runtime.quiet_output()
    runtime.start(seed=0)
    train_stages(sys.argv[-3], int(sys.argv[-2]), sys.argv[-1])
    runtime.stop()


if __name__ == "__main__":
    run_and_exit(main)
