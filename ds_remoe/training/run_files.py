"""What a run leaves in its folder, by name."""

from __future__ import annotations

import os
from pathlib import Path

from ds_remoe.training.checkpoint_folder import LATEST
from ds_remoe.training.manifest import CheckpointError
from ds_remoe.training.stop_mark import STOP_MARK

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
STAGES = "stages.png"
EXPERT_LOAD = "expert_load.png"
CHECKPOINTS = "checkpoints"


def refuse_misplaced(folder: Path) -> None:
    """See to it that no folder stands where the run writes a file, some of them at its very end, and no file in turn.

    Raises:
        CheckpointError: naming each that does.
    """
    checkpoints = folder / CHECKPOINTS
    files = [*(folder / name for name in (METRICS, SUMMARY, STAGES, EXPERT_LOAD, STOP_MARK)), checkpoints / LATEST]
    written = [path for file in files for path in (file, file.with_name(f"{file.name}.tmp"))]
    wrong = [f"{path}: is a folder, but the run writes a file there" for path in written if path.is_dir()]
    if os.path.lexists(checkpoints) and not checkpoints.is_dir():
        wrong.append(f"{checkpoints}: is no folder, but the run keeps its checkpoints there")
    if wrong:
        remedy = "move that away, or give this run another remoe.train.output_dir"
        raise CheckpointError("\n".join(wrong) + f"; {remedy}")
