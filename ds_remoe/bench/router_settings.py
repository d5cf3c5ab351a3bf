"""A run file's settings with another router, so that rivals differ in that alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ds_remoe.config.load import read_run_file


def with_router(config: Path, overrides: Sequence[str], router: str) -> list[str]:
    """`overrides` and what makes the run of `config` one of this router on one rank; what only ReLU routing has goes.

    Args:
        config: a run file, of any router.
        overrides: `path=value` settings.
        router: "relu", "topk" or "dense".
    """
    settings = [*overrides]
    if router == "dense":
        settings = [s for s in settings if not s.startswith("remoe.moe.")] + ['remoe.moe={"router": "dense"}']
    else:
        settings += ["remoe.moe.ep_size=1", f'remoe.moe.router="{router}"']
    if router != "relu":
        settings = [s for s in settings if not s.startswith("remoe.sparsity")]
        if "sparsity" in read_run_file(config).get("remoe", {}):
            settings.append("remoe.sparsity=null")
    return settings
