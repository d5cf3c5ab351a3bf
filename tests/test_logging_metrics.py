"""StepRecord as JSON, and metrics.jsonl over kills and resumes."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from step_records import dense_record, relu_record

from ds_remoe.training import metrics
from ds_remoe.training.metrics import MetricsError, MetricsLog
from ds_remoe.training.record import RecordError, StepRecord

any_float = st.floats(allow_nan=True, allow_infinity=True)


def same(left: object, right: object) -> bool:
    """Equality with NaN equal to NaN, and 0.0 apart from -0.0."""
    return repr(left) == repr(right)


@given(loss=any_float, sparsity=st.none() | any_float, load=st.lists(st.tuples(any_float, any_float), max_size=3))
def test_any_float_survives_json_exactly(loss: float, sparsity: float | None, load: list[tuple[float, float]]) -> None:
    record = relu_record(7, lm_loss=loss, expert_load=tuple(load))
    record = StepRecord(
        **{field.name: getattr(record, field.name) for field in fields(record)} | {"sparsity": sparsity}
    )
    line = record.to_json()
    assert same(StepRecord.from_json(line), record)
    assert "\n" not in line
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_non_finite_values_are_strings() -> None:
    row = json.loads(relu_record(1, lm_loss=math.nan, grad_norm=math.inf, aux_loss=-math.inf).to_json())
    assert (row["lm_loss"], row["grad_norm"], row["aux_loss"]) == ("NaN", "Infinity", "-Infinity")


def test_dense_record_round_trip() -> None:
    record = dense_record(3)
    assert StepRecord.from_json(record.to_json()) == record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lm_loss": "three"}, "lm_loss: expected float, found 'three'"),
        ({"step": 1.5}, "step: expected int"),
        ({"step": True}, "step: expected int"),
        ({"lm_loss": None}, "lm_loss: expected float"),
        ({"expert_load": [0.5]}, "expert_load"),
        ({"surprise": 1}, "unknown keys"),
    ],
)
def test_wrong_fields_are_named(change: dict[str, object], message: str) -> None:
    row = json.loads(relu_record(1).to_json()) | change
    with pytest.raises(RecordError, match=message):
        StepRecord.from_json(json.dumps(row))


def test_missing_keys_and_bare_nan_are_refused() -> None:
    with pytest.raises(RecordError, match=r"missing keys.*samples"):
        StepRecord.from_json('{"step": 1}')
    with pytest.raises(RecordError, match="bare NaN"):
        StepRecord.from_json('{"step": NaN}')
    with pytest.raises(RecordError, match="expected a JSON object"):
        StepRecord.from_json("[1]")


def write_log(path: Path, steps: int) -> bytes:
    with MetricsLog(path) as log:
        for step in range(1, steps + 1):
            log.append(relu_record(step))
    return path.read_bytes()


def test_log_holds_one_line_a_step_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    log = MetricsLog(path)
    log.append(relu_record(1))
    log.append(relu_record(2))
    assert metrics.read(path) == [relu_record(1), relu_record(2)]
    row = json.loads(path.read_text().splitlines()[1])
    assert {"step", "samples", "lm_loss", "l1_coefficient", "sparsity", "tokens_per_second"} <= row.keys()
    with pytest.raises(MetricsError, match="step 4 cannot follow step 2"):
        log.append(relu_record(4))
    log.close()
    log.close()


def test_earlier_run_is_not_continued_by_accident(tmp_path: Path) -> None:
    before = write_log(tmp_path / "m.jsonl", 2)
    with pytest.raises(MetricsError, match="output_dir"):
        MetricsLog(tmp_path / "m.jsonl")
    assert (tmp_path / "m.jsonl").read_bytes() == before


@pytest.mark.parametrize("half_line", [b"", b'{"step": 6, "samp', b'{"st'])
@pytest.mark.parametrize("step", [0, 3, 5])
def test_resume_keeps_earlier_lines_byte_for_byte(tmp_path: Path, step: int, half_line: bytes) -> None:
    path = tmp_path / "m.jsonl"
    whole = write_log(path, 5)
    path.write_bytes(whole + half_line)
    kept = b"".join(whole.splitlines(keepends=True)[:step])
    with MetricsLog.resume(path, step) as log:
        assert path.read_bytes() == kept
        log.append(relu_record(step + 1))
    assert path.read_bytes().startswith(kept)
    assert [record.step for record in metrics.read(path)] == list(range(1, step + 2))
    assert list(tmp_path.iterdir()) == [path]


def test_resumed_run_writes_the_same_file_as_one_without_a_kill(tmp_path: Path) -> None:
    whole = write_log(tmp_path / "whole.jsonl", 8)
    write_log(tmp_path / "killed.jsonl", 6)
    with MetricsLog.resume(tmp_path / "killed.jsonl", 4) as log:
        for step in range(5, 9):
            log.append(relu_record(step))
    assert (tmp_path / "killed.jsonl").read_bytes() == whole


def test_last_line_without_newline_counts_if_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    whole = write_log(path, 3)
    path.write_bytes(whole.rstrip(b"\n"))
    assert len(metrics.read(path)) == 3
    MetricsLog.resume(path, 3).close()
    assert path.read_bytes() == whole


def test_read_leaves_out_a_half_written_last_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(write_log(path, 2) + b'{"step": 3, "sam')
    assert [record.step for record in metrics.read(path)] == [1, 2]


@pytest.mark.parametrize("steps", [(1, 3), (2, 3), (1, 1), (1, 2, 2)])
def test_steps_out_of_order_are_refused(tmp_path: Path, steps: tuple[int, ...]) -> None:
    path = tmp_path / "m.jsonl"
    text = "".join(relu_record(step).to_json() + "\n" for step in steps)
    path.write_text(text)
    with pytest.raises(MetricsError, match="steps must be 1, 2, 3"):
        MetricsLog.resume(path, 1)
    with pytest.raises(MetricsError, match="steps must be 1, 2, 3"):
        metrics.read(path)
    assert path.read_text() == text


def test_resume_refuses_a_file_behind_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    whole = write_log(path, 3)
    with pytest.raises(MetricsError, match=r"ends at step 3.*after step 4"):
        MetricsLog.resume(path, 4)
    assert path.read_bytes() == whole
    with pytest.raises(MetricsError, match="missing"):
        MetricsLog.resume(tmp_path / "none.jsonl", 4)


def test_damaged_middle_line_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    lines = write_log(path, 3).splitlines(keepends=True)
    path.write_bytes(lines[0] + b"garbage\n" + lines[2])
    with pytest.raises(MetricsError, match="line 2: not a step record"):
        MetricsLog.resume(path, 1)


def test_fresh_start_makes_the_file(tmp_path: Path) -> None:
    with MetricsLog.resume(tmp_path / "m.jsonl", 0) as log:
        log.append(relu_record(1))
    assert len(metrics.read(tmp_path / "m.jsonl")) == 1
