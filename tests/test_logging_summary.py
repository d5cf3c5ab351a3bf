"""The end-of-run summary and the progress display."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console
from step_records import dense_record, relu_record, relu_run, three_stages

from ds_remoe.training.progress import JobProgress, TrainProgress, format_count, format_seconds
from ds_remoe.training.record import StepRecord
from ds_remoe.training.summary import RunSummary, render, sparkline, summarise

COMMAND = "deepspeed --num_gpus 2 train.py ds_configs/quickstart.json --resume runs/quickstart --steps 1200 --more"


def summary_of(records: list[StepRecord], router: str = "relu") -> RunSummary:
    return summarise(
        records,
        router=router,
        target_sparsity=0.875,
        dead_after=100,
        wall_seconds=83.2,
        output_dir=Path("runs/q"),
        checkpoint=Path("runs/q/checkpoints/step-300"),
        continue_command=COMMAND,
        pictures=[Path("runs/q/stages.png")],
        generated=[("def f[bold]", "(x):\n    return x\x1b[2J")],
    )


def printed(summary: RunSummary, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(render(summary))
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue()


def test_summary_numbers() -> None:
    records = relu_run(three_stages())
    summary = summary_of(records)
    assert (summary.steps, summary.samples, summary.tokens) == (300, 4800, 614_400)
    assert (summary.valid_loss, summary.valid_loss_step) == (records[299].valid_loss, 300)
    assert summary.train_loss == pytest.approx(math.fsum(record.lm_loss for record in records[225:]) / 75)
    assert summary.mean_sparsity == pytest.approx(0.875, abs=1e-3)
    assert summary.settled_at == 100
    assert summary.active_experts_per_token == pytest.approx(1.0, abs=0.02)
    assert (summary.dead_layers, summary.silent_experts) == ((), 0)
    assert summary.tokens_per_second == 20_150.5
    assert summary.training_seconds == pytest.approx(30.0)
    assert len(summary.loss_trace) == len(summary.sparsity_trace) == 40


def test_dense_and_topk_summaries_leave_out_what_they_lack() -> None:
    dense = summary_of([dense_record(1)], router="dense")
    assert (dense.mean_sparsity, dense.target_sparsity, dense.settled_at, dense.valid_loss) == (None,) * 4
    assert "Sparsity" not in printed(dense)
    topk = summary_of([relu_record(step, l1_coefficient=None) for step in range(1, 50)], router="topk")
    assert topk.settled_at is None
    assert "Stage III" not in printed(topk)
    with pytest.raises(ValueError, match="records: empty"):
        summary_of([])


def test_saved_summary_is_standard_json(tmp_path: Path) -> None:
    summary = summary_of([relu_record(1, lm_loss=math.nan)])
    summary.save(tmp_path / "summary.json")
    saved = json.loads((tmp_path / "summary.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert saved["train_loss"] == "NaN"
    assert saved["generated"] == [["def f[bold]", "(x):\n    return x\x1b[2J"]]
    assert saved["continue_command"] == COMMAND
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_rendered_summary_fits_80_columns_and_says_everything() -> None:
    text = printed(summary_of(relu_run(three_stages())))
    lines = text.splitlines()
    assert max(map(len, lines)) == 80
    for expected in (
        "3.2000",
        "from step 100 on",
        "runs/q/checkpoints/step-300",
        "runs/q/stages.png",
        "def f[bold](x):",
    ):
        assert expected in text
    assert "\x1b" not in text
    assert "Dead MoE layers" not in text


def test_rendered_summary_warns() -> None:
    load = ((0.125,) * 8, (0.001,) * 8, (0.125,) * 8)
    text = printed(summary_of([relu_record(step, expert_load=load) for step in range(1, 9)]))
    assert "Dead MoE layers (counted from 0): 1." in text
    assert "8 below 1/64" in text
    assert "not finite" in printed(summary_of([relu_record(1, lm_loss=math.inf)]))


def test_sparkline() -> None:
    assert sparkline([0, 0.5, 1]) == "▁▅█"
    assert sparkline([2, 2]) == "▁▁"
    assert sparkline([0.5], low=0, high=1) == "▅"
    assert sparkline([1, math.nan, 3]) == "▁×█"
    assert sparkline([]) == ""


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run_progress(console: Console, clock: Clock, start: int = 0) -> None:
    with TrainProgress(start + 100, start, 0.875, console=console, line_seconds=10, clock=clock) as progress:
        for step in range(start + 1, start + 101):
            clock.now += 1
            progress.update(relu_record(step, valid_loss=3.25 if step == start + 5 else None))
        progress.message("saved [x]")


def test_plain_lines_where_there_is_no_terminal() -> None:
    output = io.StringIO()
    run_progress(Console(file=output, force_terminal=False, width=40), Clock(), start=200)
    lines = output.getvalue().splitlines()
    assert lines[0].startswith("step 201/300  loss 3.2")
    assert lines[0].endswith("S 0.875/0.875  λ 1.2e-08  20.2k tok/s  ETA 1:39")
    assert lines[1] == "step 205  valid loss 3.2500"
    assert lines[2].startswith("step 211/300")
    assert lines[-3].startswith("step 291/300")
    assert lines[-2].startswith("step 300/300")
    assert lines[-2].endswith("in 1:40")
    assert lines[-1] == "saved [x]"
    assert len(lines) == 13


def test_bar_fits_a_terminal_of_80_columns() -> None:
    output = io.StringIO()
    run_progress(Console(file=output, force_terminal=True, width=80, color_system=None, height=24), Clock())
    last_bar = [line for line in output.getvalue().splitlines() if "100/100" in line][-1]
    assert "S 0.875/0.875" in last_bar
    assert "in 1:40" in last_bar
    assert "…" not in last_bar
    assert "step 5  valid loss 3.2500" in output.getvalue()


def test_other_ranks_are_silent() -> None:
    output = io.StringIO()
    with TrainProgress(10, enabled=False, console=Console(file=output)) as progress:
        progress.update(relu_record(1))
        progress.message("hidden")
    assert output.getvalue() == ""


def test_dense_model_shows_no_routing_and_unknown_totals_no_eta() -> None:
    output = io.StringIO()
    with TrainProgress(10, console=Console(file=output)) as progress:
        progress.update(dense_record(1))
    assert "S " not in output.getvalue()
    assert "λ" not in output.getvalue()
    output = io.StringIO()
    with JobProgress("documents", 0, console=Console(file=output)) as job:
        job.advance_to(5, "3.1 MB")
    assert output.getvalue() == "documents 5  3.1 MB\n"


def test_numbers_as_people_read_them() -> None:
    assert [format_seconds(s) for s in (0, 6.6, 725, 12_000, 187_200)] == [
        "0:00",
        "0:07",
        "12:05",
        "3:20:00",
        "2d 4:00:00",
    ]
    values = (950, 999.7, 12_345, 999_600, 1_200_000, 3e10, 3e13, math.inf)
    assert [format_count(v) for v in values] == ["950", "1.00k", "12.3k", "1.00M", "1.20M", "30.0B", "30T", "inf"]
