"""`ds-remoe config check|schema`."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from ds_remoe.commands.arguments import add_run_arguments, positive
from ds_remoe.config import ConfigError, ConfigProblem, RunConfig, load_run

if TYPE_CHECKING:
    from rich.table import Table

    from ds_remoe.commands.arguments import Commands


def add_config_check(commands: Commands) -> None:
    """Parser of `ds-remoe config check`."""
    parser = commands.add_parser("check", help="check a run's file", description="Check a run's file without starting.")
    add_run_arguments(parser)
    parser.add_argument("--world-size", type=positive, metavar="N", help="also check what depends on N ranks")
    parser.add_argument("--accelerator", choices=("cpu", "cuda"), help="also check what depends on the device")
    parser.set_defaults(run=config_check)


def config_check(arguments: argparse.Namespace) -> int:
    """Check a file and show what it amounts to."""
    from rich.console import Console

    run = load_run(
        arguments.file, arguments.overrides, world_size=arguments.world_size, accelerator=arguments.accelerator
    )
    summary = _summary(run, arguments.world_size)
    console = Console()
    console.print(f"{run.path}: ok", highlight=False, markup=False, soft_wrap=True)
    console.print(summary)
    return 0


def _summary(run: RunConfig, world_size: int | None) -> Table:
    """A table of a run's size: parameters, experts, batch."""
    from rich.table import Table

    from ds_remoe.model.flops import num_active_params, num_params

    model, moe, train = run.remoe.model, run.remoe.moe, run.remoe.train
    vocab_size = read_vocab_size(run)
    table = Table(show_header=False)
    table.add_column(justify="left")
    table.add_column(justify="right")
    table.add_row("parameters", f"{num_params(model, moe, vocab_size):,}")
    table.add_row("active per token", f"{num_active_params(model, moe, vocab_size):,}")
    table.add_row("vocabulary", f"{vocab_size:,}")
    table.add_row("router", moe.router)
    if moe.router != "dense":
        table.add_row("experts per layer", f"{moe.total_experts}, {moe.active_experts} active")
        table.add_row("experts per rank", f"{moe.total_experts // moe.ep_size} (ep_size {moe.ep_size})")
    if moe.router == "relu":
        table.add_row("target sparsity", f"{moe.target_sparsity:.4f}")
    table.add_row("optimizer steps", f"{train.steps:,}")
    if world_size is None:
        table.add_row("batch", "give --world-size")
    else:
        sizes = run.batch_sizes(world_size)
        tokens = sizes.global_batch * model.seq_length
        batch = f"{sizes.global_batch} = {sizes.micro_batch} x {sizes.accumulation} x {world_size} ranks"
        table.add_row("batch (sequences)", batch)
        table.add_row("tokens per step", f"{tokens:,}")
        table.add_row("tokens in all", f"{tokens * train.steps:,}")
    return table


def read_vocab_size(run: RunConfig) -> int:
    """Tokens of the run's vocabulary, from the tokenizer's file where it has one."""
    from ds_remoe.config.schema import FileTokenizer

    tokenizer = run.remoe.data.tokenizer
    if isinstance(tokenizer, FileTokenizer):
        from ds_remoe.data.documents import DataError
        from ds_remoe.data.tokenizer import configured_tokenizer

        try:
            return configured_tokenizer(tokenizer).vocab_size
        except DataError as error:
            problem = ConfigProblem("remoe.data.tokenizer.path", tokenizer.path, str(error))
            raise ConfigError(str(run.path), [problem]) from None
    return tokenizer.vocab_size


def add_config_schema(commands: Commands) -> None:
    """Parser of `ds-remoe config schema`."""
    description = "Print the JSON Schema (draft 2020-12) of the remoe section."
    parser = commands.add_parser("schema", help="print the JSON Schema of the remoe section", description=description)
    parser.set_defaults(run=config_schema)


def config_schema(arguments: argparse.Namespace) -> int:
    """Print the JSON Schema of the remoe section."""
    from ds_remoe.config.schema import ReMoEConfig

    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **ReMoEConfig.model_json_schema()}
    print(json.dumps(schema, indent=2, ensure_ascii=False))
    return 0
