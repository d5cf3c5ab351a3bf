"""Dead layers and experts are told once, by name, again when they come back, and at the end of the run."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from step_records import dense_record, relu_record

from ds_remoe.analysis.layers import idle_steps, name_experts
from ds_remoe.moe.statistics import LayerRouting, RoutingReport
from ds_remoe.training.progress import TrainProgress
from ds_remoe.training.record import StepRecord
from ds_remoe.training.routing_watch import RoutingWatch
from ds_remoe.training.summary import RunSummary, render, summarise
from ds_remoe.training.wandb_run import history_row

Active = list[list[int]]


def report(active_LE: Active) -> RoutingReport:
    layers = (LayerRouting(index, 8, tuple(row), (1.0,) * len(row), 0.0) for index, row in enumerate(active_LE))
    return RoutingReport(tuple(layers))


def test_each_change_is_told_once_by_name() -> None:
    watch = RoutingWatch(dead_after=3)
    told: dict[int, list[str]] = {}
    routing: dict[int, Active] = {
        1: [[1, 1, 1], [1, 0, 5]],
        2: [[1, 0, 0], [1, 0, 0]],
        6: [[1, 0, 0], [0, 0, 0]],
        9: [[1, 0, 4], [0, 0, 0]],
        10: [[1, 0, 0], [0, 2, 0]],
    }
    active: Active = []
    for step in range(1, 14):
        active = routing.get(step, active)
        if lines := watch.update(report(active), step):
            told[step] = lines
        if step == 8:
            assert (watch.dead_layers, watch.dead_experts) == (1, 5)
            watch, before = RoutingWatch(dead_after=3), watch
            watch.load_state_dict(json.loads(json.dumps(before.state_dict())))
    gone, back = "for 3 steps or more; training goes on", "again, after up to"
    assert told == {
        3: [f"step 3: no token has reached expert 1 of MoE layer 1 {gone}"],
        4: [
            f"step 4: no token has reached experts 1, 2 of MoE layer 0 {gone}",
            f"step 4: no token has reached expert 2 of MoE layer 1 {gone}",
        ],
        8: [f"step 8: no token has reached the whole MoE layer 1 {gone}"],
        9: [f"step 9: tokens reach expert 2 of MoE layer 0 {back} 7 steps without"],
        10: [f"step 10: tokens reach expert 1 of MoE layer 1 {back} 9 steps without"],
        12: [f"step 12: no token has reached expert 2 of MoE layer 0 {gone}"],
    }
    assert (watch.dead_layers, watch.dead_experts) == (0, 4)


def test_another_limit_after_a_resume_tells_no_false_recovery() -> None:
    watch = RoutingWatch(dead_after=2)
    for step in (1, 2):
        watch.update(report([[0, 4]]), step)
    for limit, dead in ((5, 1), (1, 1)):
        changed = RoutingWatch(dead_after=limit)
        changed.load_state_dict(watch.state_dict())
        assert changed.update(report([[0, 4]]), 3) == []
        assert changed.dead_experts == dead
    fresh = RoutingWatch(dead_after=1)
    fresh.load_state_dict(RoutingWatch(dead_after=1).state_dict())
    assert fresh.dead_experts == fresh.dead_layers == 0


@given(
    st.lists(
        st.tuples(st.booleans(), st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=3), min_size=2, max_size=2)),
        max_size=12,
    ),
    st.integers(1, 4),
)
def test_records_tell_what_the_watch_told(steps: list[tuple[bool, Active]], dead_after: int) -> None:
    watch, records = RoutingWatch(dead_after), []
    for step, (skipped, active_LE) in enumerate(steps, start=1):
        load = tuple(tuple(count / 8 for count in row) for row in active_LE)
        records.append(relu_record(step, expert_load=load, skipped="spike" if skipped else None))
        if not skipped:
            watch.update(report(active_LE), step)
    dead_LE = idle_steps(records) >= dead_after
    assert dead_LE.sum() == watch.dead_experts
    assert sum(row.all() for row in dead_LE) == watch.dead_layers
    brute = np.zeros((2, 3), dtype=bool)
    applied = [active_LE for skipped, active_LE in steps if not skipped]
    if len(applied) >= dead_after:
        brute = np.array(applied[-dead_after:]).sum(axis=0) == 0
    assert np.array_equal(brute, dead_LE) or not applied


def summary_of(records: list[StepRecord]) -> RunSummary:
    return summarise(
        records,
        router="relu",
        target_sparsity=0.875,
        dead_after=5,
        wall_seconds=1.0,
        output_dir=Path("runs/q"),
        checkpoint=Path("runs/q/checkpoints/step-9"),
        continue_command="",
    )


def test_summary_record_wandb_and_bar_say_it() -> None:
    load = ((0.125,) * 7 + (0.0,), (0.0,) * 8, (0.125,) * 8)
    records = [relu_record(step, expert_load=load, dead_layers=1, dead_experts=9) for step in range(1, 9)]
    # A skipped step's NaN is in no mean, and its routing counts as none.
    records.append(relu_record(9, lm_loss=float("nan"), sparsity=1.0, skipped="non_finite"))
    summary = summary_of(records)
    assert summary.dead == ("expert 7 of MoE layer 0", "the whole MoE layer 1")
    assert (summary.skipped_steps, summary.steps) == (1, 9)
    assert summary.train_loss == (records[6].lm_loss + records[7].lm_loss) / 2
    assert summary.mean_sparsity == 0.875
    console = Console(file=(output := io.StringIO()), width=80)
    console.print(render(summary))
    text = " ".join(output.getvalue().replace("│", " ").split())
    assert "expert 7 of MoE layer 0; the whole MoE layer 1" in text
    assert "1 optimizer step was skipped" in text
    row = history_row(records[0])
    assert (row["router/dead_layers"], row["router/dead_experts"], row["optim/skipped"]) == (1, 9, 0.0)
    assert history_row(records[-1])["optim/skipped"] == 1.0
    with TrainProgress(9, console=Console(file=(output := io.StringIO()))) as progress:
        progress.update(records[-1])
    assert "skipped" in output.getvalue()
    assert name_experts(idle_steps([dense_record(1)]) >= 1) == []


def test_lines_of_before_the_guard_can_still_be_read() -> None:
    record = relu_record(3, skipped="spike", dead_layers=0, dead_experts=2)
    assert StepRecord.from_json(record.to_json()) == record
    row = json.loads(record.to_json())
    for name in ("skipped", "dead_layers", "dead_experts"):
        del row[name]
    assert StepRecord.from_dict(row) == replace(record, skipped=None, dead_layers=None, dead_experts=None)
