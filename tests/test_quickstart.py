"""The README's first command, shortened."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(
    Path(sys.prefix) != ROOT / ".venv", reason="launch/ scripts use the repository's .venv; run bash launch/test.sh"
)
def test_the_quickstart_trains_reports_and_knows_when_it_is_done(tmp_path: Path) -> None:
    steps = ["remoe.train.steps=12", "scheduler.params.total_num_steps=12", "scheduler.params.warmup_num_steps=4"]
    data = ["remoe.data.source.max_bytes_per_domain=300000", "remoe.data.tokenizer.vocab_size=1000"]
    folder = tmp_path / "a run"
    settings = [*steps, *data, "remoe.data.cache_dir=data", "remoe.train.output_dir=a run"]
    command = ["bash", f"{ROOT}/launch/quickstart.sh", *(part for setting in settings for part in ("--set", setting))]
    (tmp_path / "ds_remoe").mkdir()  # as in the folder where people have cloned it
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    for expected in ("step 12/12", "Valid loss", "Sparsity", "target 0.8750", "the model writes", "Train on:"):
        assert expected in first.stdout, first.stdout[-4000:]
    lines = first.stdout.splitlines()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 12
    assert lines[lines.index("Train on:") + 1] == summary["continue_command"], "a copied line must run as it stands"
    assert len(summary["generated"]) >= 3
    for picture in summary["pictures"]:
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / summary["checkpoint"] / "ds_remoe_manifest.json").is_file()

    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "Nothing to do" in again.stdout
    assert "remoe.train.steps=24" in again.stdout
    assert "remoe.train.output_dir=a run" in again.stdout
    assert f"To train on: bash {ROOT}/launch/train.sh 2 --config {ROOT}/ds_configs/quickstart.json " in again.stdout
