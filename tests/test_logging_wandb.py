"""W&B runs, each in a process of its own: offline files, a local server, and everything that can go wrong with one."""

from __future__ import annotations

import json
import os
import pty
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from step_records import EXPERTS, LAYERS, dense_record, relu_record
from wandb.proto import wandb_internal_pb2
from wandb_server import API_KEY, Server

from ds_remoe.config.schema import WandbConfig
from ds_remoe.training.wandb_run import WandbRun, history_row, load_histograms

RUN_CONFIG = {"remoe": {"moe": {"router": "relu"}}}

SESSION = """
import json, os, signal, sys, time, urllib.request
from pathlib import Path
from step_records import relu_record
from ds_remoe.config.schema import WandbConfig
from ds_remoe.training.wandb_run import WandbRun

def own_wandb_core():
    for process in Path("/proc").iterdir():
        try:
            parent = int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == os.getpid() and "wandb-core" in (process / "cmdline").read_text():
                return int(process.name)
        except (OSError, IndexError, ValueError):
            continue
    raise RuntimeError("no wandb-core process")

mode, directory, run_id, first, last, sabotage = json.loads(sys.argv[1])
warnings = []
began = time.monotonic()
run = WandbRun(WandbConfig(mode=mode, project="p", tags=["t"]), %r, Path(directory), run_id, histogram_interval=2,
               warn=warnings.append, init_timeout=3, finish_timeout=3)
started = time.monotonic()
folder, mode = run.folder, run.mode
for step in range(first, last + 1):
    if sabotage == "core" and step == 2:
        os.kill(own_wandb_core(), signal.SIGKILL)
        time.sleep(0.5)
    if sabotage == "server" and step == 2:
        urllib.request.urlopen(os.environ["WANDB_BASE_URL"] + "/stop", data=b"")
    run.log(relu_record(step, step / 100))
logged = time.monotonic()
run.finish(0)
print(json.dumps({"run_id": run.run_id, "folder": str(folder), "mode": mode, "warnings": warnings,
                  "init": started - began, "log": logged - started, "finish": time.monotonic() - logged}))
""" % (RUN_CONFIG,)  # noqa: UP031


def session(
    directory: Path,
    mode: str,
    *,
    run_id: str | None = None,
    steps: tuple[int, int] = (1, 5),
    sabotage: str = "",
    stdin: int = subprocess.DEVNULL,
    stderr: int = subprocess.PIPE,
    **environment: str,
) -> dict[str, Any]:
    """Run one training session's worth of W&B calls in a process of its own; what it reports."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-c", SESSION, json.dumps([mode, str(directory), run_id, *steps, sabotage])],
        env=clean
        | {"HOME": str(directory), "PYTHONPATH": str(Path(__file__).parent), "WANDB_ERROR_REPORTING": "false"}
        | environment,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=stderr,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert isinstance(report, dict)
    return report | {"stderr": (done.stderr or b"").decode()}


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format (32 KiB blocks) after a header of 7 bytes."""
    data, position, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def history(path: Path) -> dict[int, dict[str, Any]]:
    """Logged values by step."""
    steps: dict[int, dict[str, Any]] = {}
    for record in wandb_records(path):
        if record.WhichOneof("record_type") != "history":
            continue
        row = steps.setdefault(record.history.step.num, {})
        for item in record.history.item:
            *outer, name = item.nested_key or [item.key]
            place = row
            for key in outer:
                place = place.setdefault(key, {})
            place[name] = json.loads(item.value_json)
    return steps


def expected(step: int) -> dict[str, Any]:
    return history_row(relu_record(step, step / 100))


def assert_history(rows: dict[int, dict[str, Any]], steps: range) -> None:
    assert sorted(rows) == list(steps)
    for step in steps:
        assert {name: rows[step][name] for name in expected(step)} == expected(step)
        histograms = [name for name in rows[step] if name.startswith("expert_load/")]
        assert len(histograms) == (LAYERS if step % 2 == 0 else 0)


def test_offline_run_resumed_by_another_process(tmp_path: Path) -> None:
    first = session(tmp_path, "offline", steps=(1, 5))
    # The environment takes an online configuration offline.
    second = session(tmp_path, "online", run_id=first["run_id"], steps=(6, 8), WANDB_MODE="offline")
    assert first["mode"] == second["mode"] == "offline"
    assert first["warnings"] == second["warnings"] == []
    assert first["stderr"] == second["stderr"] == ""
    assert second["run_id"] == first["run_id"]
    assert first["folder"] != second["folder"]
    name = f"run-{first['run_id']}.wandb"
    assert_history(history(Path(first["folder"]) / name), range(1, 6))
    assert_history(history(Path(second["folder"]) / name), range(6, 9))
    row = history(Path(first["folder"]) / name)[4]
    load = relu_record(4, 0.04).expert_load
    assert row["expert_load/layer_01"] == {"_type": "histogram", "values": list(load[1]), "bins": list(range(9))}
    runs = [record.run for record in wandb_records(Path(first["folder"]) / name) if record.HasField("run")]
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert config["remoe"] == RUN_CONFIG["remoe"]
    assert (runs[0].run_id, runs[0].project, list(runs[0].tags)) == (first["run_id"], "p", ["t"])


@pytest.mark.parametrize(
    ("environment", "cause"),
    [
        ({"WANDB_API_KEY": API_KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}, "connection refused"),
        ({"WANDB_API_KEY": "bad", "WANDB_BASE_URL": "http://127.0.0.1:9"}, "40+ characters"),
    ],
    ids=["server", "key"],
)
def test_a_failed_start_goes_offline_with_one_warning(tmp_path: Path, environment: dict[str, str], cause: str) -> None:
    report = session(tmp_path, "online", run_id="abcd1234", **environment)
    assert report["init"] < 15
    assert (report["mode"], report["run_id"]) == ("offline", "abcd1234")
    (warning,) = report["warnings"]
    assert cause in warning
    assert f"wandb sync {report['folder']}" in warning
    assert "metrics.jsonl has everything" in warning
    assert_history(history(Path(report["folder"]) / "run-abcd1234.wandb"), range(1, 6))


def test_a_terminal_is_never_asked_for_a_key(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    try:
        report = session(
            tmp_path, "online", stdin=slave, stderr=slave, TERM="xterm", WANDB_BASE_URL="http://127.0.0.1:9"
        )
    finally:
        os.close(slave)
        os.close(master)
    assert report["mode"] == "offline"
    assert "No API key configured" in report["warnings"][0]


def test_a_killed_wandb_process_does_not_stop_training(tmp_path: Path) -> None:
    report = session(tmp_path, "offline", sabotage="core")
    (warning,) = report["warnings"]
    assert "stopped taking data" in warning
    assert report["log"] + report["finish"] < 10


def test_a_folder_that_cannot_be_made_does_not_stop_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    report = session(tmp_path / "file" / "run", "offline", HOME=str(tmp_path))
    (warning,) = report["warnings"]
    assert "could not start: NotADirectoryError" in warning


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


def test_online_run_resumes_on_the_server(tmp_path: Path, server: Server) -> None:
    access = {"WANDB_API_KEY": API_KEY, "WANDB_BASE_URL": server.url}
    first = session(tmp_path, "online", steps=(1, 5), **access)
    assert (first["mode"], first["warnings"]) == ("online", [])
    assert_history({line["_step"]: line for line in server.lines}, range(1, 6))
    # Killed after step 5, resumed from the checkpoint of step 3: the server takes no step twice.
    second = session(tmp_path, "online", run_id=first["run_id"], steps=(4, 7), **access)
    assert (second["mode"], second["warnings"], second["stderr"]) == ("online", [], "")
    assert [line["_step"] for line in server.lines] == list(range(1, 8))
    assert_history({line["_step"]: line for line in server.lines}, range(1, 8))
    assert server.exit_codes == [0, 0]


def test_a_server_that_dies_does_not_hold_the_run(tmp_path: Path, server: Server) -> None:
    began = time.monotonic()
    report = session(tmp_path, "online", sabotage="server", WANDB_API_KEY=API_KEY, WANDB_BASE_URL=server.url)
    assert time.monotonic() - began < 40
    assert report["log"] < 5
    (warning,) = report["warnings"]
    assert f"wandb sync {report['folder']}" in warning
    assert_history(history(Path(report["folder"]) / f"run-{report['run_id']}.wandb"), range(1, 6))


def test_disabled_run_keeps_the_checkpoints_id(tmp_path: Path) -> None:
    run = WandbRun(WandbConfig(), RUN_CONFIG, tmp_path, "abcd1234")
    run.log(relu_record(1))
    run.finish()
    assert (run.run_id, run.folder, run.url) == ("abcd1234", None, None)
    assert list(tmp_path.iterdir()) == []


def test_row_holds_every_scalar_that_exists() -> None:
    row = history_row(relu_record(100))
    assert row["router/weighted_l1_loss"] == row["router/l1_coefficient"] * row["router/l1_loss"]
    assert {name for name in row if name.startswith("sparsity/layer_")} == {f"sparsity/layer_0{n}" for n in range(3)}
    assert row["loss/valid"] == 3.4
    assert "speed/mfu" not in row
    dense = history_row(dense_record(1))
    assert not [name for name in dense if name.startswith(("router/", "sparsity/"))]


def test_more_experts_than_bins_share_them_evenly() -> None:
    load = tuple(float(expert) for expert in range(1024))
    histogram = load_histograms(relu_record(1, expert_load=(load,)))["expert_load/layer_00"]
    assert histogram.histogram == [2 * bin + 0.5 for bin in range(512)]
    assert histogram.bins == list(range(0, 1025, 2))
    few = load_histograms(relu_record(1))["expert_load/layer_02"]
    assert len(few.histogram) == EXPERTS
