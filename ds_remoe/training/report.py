"""The end of a run: pictures, a few generated lines, and the summary in terminal and file."""

from __future__ import annotations

import numpy as np
import torch
from rich.console import Console

from ds_remoe.analysis.stages_plot import plot_expert_load, plot_stages
from ds_remoe.model.generation import generate
from ds_remoe.training import metrics
from ds_remoe.training.run_files import EXPERT_LOAD, METRICS, STAGES, SUMMARY
from ds_remoe.training.summary import RunSummary, applied_steps, render, summarise
from ds_remoe.training.trainer import Outcome, Trainer

PROMPT_TOKENS = 16
NEW_TOKENS = 48
TEMPERATURE = 0.7


def report(trainer: Trainer, outcome: Outcome) -> RunSummary | None:
    """Draw, generate and sum up; every rank calls it, rank 0 writes and gets the summary."""
    generated = _continuations(trainer)
    if trainer.rank != 0:
        return None
    config = trainer.config
    folder = config.output_dir
    records = metrics.read(folder / METRICS)
    target = config.moe.target_sparsity
    applied = applied_steps(records)
    pictures = [plot_stages(applied, target, folder / STAGES, title=f"{trainer.run.path.stem}: training")]
    if config.moe.router != "dense":
        pictures.append(plot_expert_load(applied, folder / EXPERT_LOAD, title="Tokens that each expert sees"))
    summary = summarise(
        records,
        router=config.moe.router,
        target_sparsity=target,
        dead_after=config.train.dead_after,
        wall_seconds=outcome.seconds,
        output_dir=folder,
        checkpoint=outcome.checkpoint,
        continue_command=trainer.continue_command(outcome.step),
        pictures=pictures,
        generated=generated,
    )
    summary.save(folder / SUMMARY)
    console = Console()
    console.print(render(summary))
    console.print(f"Train on:\n{summary.continue_command}", soft_wrap=True, highlight=False, markup=False)
    return summary


def _continuations(trainer: Trainer) -> list[tuple[str, str]]:
    """Continue the start of one held-out sample of each domain; all ranks take part, as experts live on all."""
    prompts = _prompts(trainer)
    if trainer.config.model.seq_length < PROMPT_TOKENS + NEW_TOKENS:
        return []
    ids = torch.from_numpy(np.stack(prompts)).to(trainer.device)
    generator = torch.Generator(device=trainer.device).manual_seed(trainer.config.train.seed)
    output = generate(trainer.engine, ids, NEW_TOKENS, temperature=TEMPERATURE, generator=generator).tolist()
    decode = trainer.data.tokenizer.decode
    return [(decode(row[:PROMPT_TOKENS]), decode(row[PROMPT_TOKENS:])) for row in output]


def _prompts(trainer: Trainer) -> list[np.ndarray]:
    """The first tokens of the first held-out sample of each domain."""
    valid = trainer.data.valid
    found: dict[int, np.ndarray] = {}
    for index in range(len(valid)):
        domain = int(valid.domains(index)[0])
        if domain not in found:
            found[domain] = valid[index][:PROMPT_TOKENS]
        if len(found) == len(trainer.data.domain_names):
            break
    return [found[domain] for domain in sorted(found)]
