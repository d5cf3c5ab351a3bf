"""`ds-remoe bench record` and `ds-remoe bench comm`: the trace file, the counted bytes, and both commands whole."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from test_resume import run_config

from ds_remoe.bench.comm_bytes import SentBytes, least_bytes
from ds_remoe.bench.comm_cases import traced_cases
from ds_remoe.bench.record_rank import RoutingRecorder
from ds_remoe.bench.trace import (
    COLUMNS,
    TracedRouting,
    TraceError,
    TraceMetadata,
    read_metadata,
    read_trace,
    write_trace,
)
from ds_remoe.cli import main
from ds_remoe.config.schema import ModelConfig, MoEConfig
from ds_remoe.model.decoder import Decoder
from ds_remoe.moe.sparsity import SparsityController

METADATA = TraceMetadata("run.json", ("remoe.moe.k=1",), (2, 5), 2, 2, hidden_size=8, expert_hidden_size=16, k=1)


def make_record(tokens: int, num_experts: int, density: float, seed: int, step: int = 1) -> TracedRouting:
    random = torch.Generator().manual_seed(seed)
    mask_TE = torch.rand(tokens, num_experts, generator=random) < density
    weights_TE = (torch.rand(tokens, num_experts, generator=random) + 0.1).bfloat16().float() * mask_TE
    return TracedRouting(step, 0, 0, num_experts, tokens, mask_TE, weights_TE)


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(1, 11), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 99)),
        max_size=4,
    )
)
@settings(max_examples=40, deadline=None)
def test_a_trace_is_read_as_it_was_written(shapes: list[tuple[int, int, float, int]]) -> None:
    records = [make_record(*shape, step=index + 1) for index, shape in enumerate(shapes)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.npz"
        write_trace(path, METADATA, records)
        read = read_trace(path)
        assert read_metadata(path) == METADATA
    assert len(read) == len(records)
    for mine, theirs in zip(records, read, strict=True):
        assert (mine.step, mine.tokens, mine.num_experts) == (theirs.step, theirs.tokens, theirs.num_experts)
        assert torch.equal(mine.mask_TE, theirs.mask_TE)
        assert torch.equal(mine.weights_TE, theirs.weights_TE)


def test_a_weight_that_is_active_stays_above_zero(tmp_path: Path) -> None:
    weights_TE = torch.tensor([[1e-30, 0.0], [3e38, 1.00001]])
    write_trace(tmp_path / "trace.npz", METADATA, [TracedRouting(1, 0, 0, 2, 2, weights_TE > 0, weights_TE)])
    (record,) = read_trace(tmp_path / "trace.npz")
    torch.testing.assert_close(record.weights_TE, weights_TE, rtol=2**-8, atol=0)
    with pytest.raises(FileExistsError):
        write_trace(tmp_path / "trace.npz", METADATA, [])


def _other_archive(path: Path) -> None:
    np.savez(path.open("wb"), masks=np.zeros(3))


def _with(**changes: Callable[[np.ndarray], object]) -> Callable[[Path], object]:
    """Rewrites arrays of a trace."""

    def rewrite(path: Path) -> None:
        arrays = dict(np.load(path))
        np.savez(path.open("wb"), **arrays | {name: change(arrays[name]) for name, change in changes.items()})

    return rewrite


def _with_metadata(**changes: object) -> Callable[[Path], object]:
    return _with(metadata=lambda old: np.array(json.dumps({**json.loads(str(old)), **changes})))


def _with_column(name: str, change: Callable[[int], int]) -> Callable[[Path], object]:
    def changed(table: np.ndarray) -> np.ndarray:
        table = table.copy()
        table[0, COLUMNS.index(name)] = change(table[0, COLUMNS.index(name)])
        return table

    return _with(table=changed)


def _flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(b"weights.npy") + 40] ^= 0xFF
    path.write_bytes(content)


def _marked_as_encrypted(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_text("step,layer"), "not a routing trace"),
        (lambda path: path.write_bytes(b""), "not a routing trace"),
        (_other_archive, "not a routing trace"),
        (lambda path: path.write_bytes(path.read_bytes()[:-200]), "truncated or damaged"),
        (_flipped, "truncated or damaged"),
        (_with_metadata(format="ds_remoe routing trace 2"), "its format is not"),
        (_with(metadata=lambda old: np.array("[1]")), "its format is not"),
        (_with(metadata=lambda old: np.array("{")), "truncated or damaged"),
        (_with(metadata=lambda old: np.array("[" * 100_000)), "truncated or damaged"),
        (_marked_as_encrypted, "truncated or damaged"),
        (_with_metadata(colour=1), "its metadata has a wrong colour"),
        (_with_metadata(steps=5), "its metadata has a wrong steps"),
        (_with_metadata(steps=[1, "x"]), "its metadata has a wrong steps.1"),
        (_with_metadata(k=0), r"its metadata has a wrong k \(Input should be greater than 0\)"),
        (_with(table=lambda old: old[0]), "its array table is int64 of 1 dimensions, not int64 of 2"),
        (_with(table=lambda old: old.astype(np.float64)), "its array table is float64"),
        (_with(masks=lambda old: old.astype(np.int64)), "its array masks is int64"),
        (_with(weights=lambda old: old[None]), "its array weights is int16 of 2 dimensions"),
        (_with(weights=lambda old: np.array(["a"])), "its array weights is <U1"),
        (_with(table=lambda old: old[:, :4]), "its table needs the 7 columns step, layer"),
        (_with_column("tokens", lambda old: -old), "none of them negative"),
        (_with_column("tokens", lambda old: 2**62), "its table does not fit"),
        (_with(masks=lambda old: old ^ 0xFF), "its table does not fit"),
        (_with(weights=lambda old: old[:-1]), "its table does not fit"),
    ],
)
def test_a_damaged_trace_is_named(damage: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    write_trace(path, METADATA, [make_record(50, 4, 0.5, 0)])
    damage(path)
    with pytest.raises(TraceError, match=message) as error:
        read_trace(path)
    assert str(path) in str(error.value)


def test_the_recorder_sees_what_the_controller_counts() -> None:
    """Wanted micro-batches only, each once, although checkpointing runs the routers again; evaluation left out."""
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "ffn_hidden_size": 24, "seq_length": 12}
    model = Decoder(ModelConfig(**sizes, activation_checkpointing=True), MoEConfig(num_experts=4), 64, seed=0)
    controller = SparsityController(model)
    tokens_BS = torch.randint(64, (3, 12), generator=torch.Generator().manual_seed(0))
    reports, ended = [], []
    with RoutingRecorder(model, [2], 2, rank=5, when_done=lambda: ended.append(len(reports))) as recorder:
        for _ in range(3):
            for roll in range(2):
                model(tokens_BS.roll(roll), tokens_BS.roll(roll + 1)).loss.backward()
            reports.append(controller.step())
            with torch.no_grad():
                model.eval()(tokens_BS)
                model.train()
            for parameter in model.parameters():
                parameter.data.sub_(0.5 * parameter.grad)
    model(tokens_BS, tokens_BS)
    assert [(r.step, r.micro_batch, r.layer, r.rank) for r in recorder.records] == [
        (2, micro_batch, layer, 5) for micro_batch in range(2) for layer in range(2)
    ]
    for layer in range(2):
        active_E = sum(r.mask_TE.sum(dim=0) for r in recorder.records if r.layer == layer)
        sums_E = sum(r.weights_TE.sum(dim=0) for r in recorder.records if r.layer == layer)
        assert tuple(active_E.tolist()) == reports[1].layers[layer].active != reports[0].layers[layer].active
        torch.testing.assert_close(sums_E, torch.tensor(reports[1].layers[layer].weight_sums))
    assert ended == [1], "when_done was not called exactly once, at the end of step 2"


def test_least_bytes_by_hand() -> None:
    """Two ranks of two experts, D = 3, fp32: a row costs 4·3·4 + 1 bytes, a pair 8."""
    rank0 = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]]).bool()
    rank1 = torch.tensor([[1, 1, 1, 1]]).bool()
    assert least_bytes([rank0, rank1], 3, 4) == (2 * 49 + 3 * 8) + (1 * 49 + 2 * 8)
    assert least_bytes([rank0, rank1[:0]], 3, 2) == 2 * 25 + 3 * 8
    wide = torch.ones(5, 18, dtype=torch.bool)
    assert least_bytes([wide, wide], 1, 4) == 2 * (5 * (16 + 2) + 45 * 8)
    assert least_bytes([wide], 1, 4) == 0


def test_a_trace_is_cut_for_any_number_of_ranks() -> None:
    first, second = make_record(5, 4, 0.5, 0), make_record(6, 4, 0.5, 1)
    (case,) = traced_cases([first, second], expert_width=16, ranks=4)
    assert [len(mask) for mask in case.masks_R] == [3, 3, 3, 2]
    assert torch.equal(torch.cat(case.weights_R), torch.cat([first.weights_TE, second.weights_TE]))
    with pytest.raises(ValueError, match=r"--ep-size 3: must divide the 4 experts"):
        traced_cases([first], expert_width=16, ranks=3)


def _count_bytes() -> dict[str, int]:
    rank = dist.get_rank()
    x = torch.zeros(5, 3)
    sent = {}

    def count(name: str, work: Callable[[], object]) -> None:
        with SentBytes() as counter:
            work()
        sent[name] = counter.total

    splits = [[1, 4], [2, 3]][rank], [[1, 2], [4, 3]][rank]
    count("uneven", lambda: dist.all_to_all_single(x.new_empty(sum(splits[1]), 3), x, splits[1], splits[0]))
    count("even", lambda: dist.all_to_all_single(torch.empty(4, 2), torch.zeros(4, 2), async_op=True).wait())
    count("empty", lambda: dist.all_to_all_single(x.new_empty(0, 3), x[:0], [0, 0], [0, 0]))
    count("reduce", lambda: dist.all_reduce(torch.zeros(7)))
    count("gather", lambda: dist.all_gather([torch.empty(5, 3)] * 2, x))
    point_to_point = [dist.P2POp(dist.isend, x, 1 - rank), dist.P2POp(dist.irecv, torch.empty(5, 3), 1 - rank)]
    count("point to point", lambda: [work.wait() for work in dist.batch_isend_irecv(point_to_point)])
    try:
        count("unknown", lambda: dist.broadcast(x, 0))
    except NotImplementedError:
        sent["unknown"] = -1
    return sent


def test_bytes_to_other_ranks_are_counted_by_hand() -> None:
    common = {"even": 2 * 2 * 4, "empty": 0, "reduce": 7 * 4, "gather": 60, "point to point": 60, "unknown": -1}
    assert run_ranks(_count_bytes, 2) == [{"uneven": 4 * 12} | common, {"uneven": 2 * 12} | common]


def test_a_rank_that_fails_is_told_without_a_traceback_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config, corpus = tmp_path / "tiny.json", tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "too short"}\n')
    content = run_config(tmp_path / "unused", tmp_path / "data")
    content["remoe"]["data"]["source"] = {"type": "jsonl", "paths": [str(corpus)]}
    config.write_text(json.dumps(content))
    assert main(["bench", "record", str(config), "--output", str(tmp_path / "trace.npz"), "--steps", "1"]) == 1
    error = capsys.readouterr().err
    assert re.match(r"rank \d of 2 failed, code \d:\n", error)
    assert "remoe.data.source: the text is too short" in error


def test_a_run_is_recorded_and_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config, trace, output = tmp_path / "tiny.json", tmp_path / "trace.npz", tmp_path / "results.json"
    config.write_text(json.dumps(run_config(tmp_path / "unused", tmp_path / "data")))
    record = ["bench", "record", str(config), "--output", str(trace)]
    assert main([*record, "--steps", "41"]) == 2, "the run has 40 steps"
    assert main([*record, "--steps", "6,1"]) == 0
    assert main([*record, "--steps", "1"]) == 2, "a recording was overwritten"
    assert not (tmp_path / "unused").exists()

    positions = [(r.step, r.micro_batch, r.layer, r.rank) for r in read_trace(trace)]
    assert positions == [(s, m, layer, r) for s in (1, 6) for m in range(2) for layer in range(2) for r in range(2)]
    assert all(r.mask_TE.shape == (128, 4) for r in read_trace(trace))
    assert read_metadata(trace).steps == (1, 6)

    replay = ["bench", "comm", "--ep-size", "2", "--trace", str(trace), "--workloads", "g2", "--tokens", "30"]
    assert main(["bench", "comm", "--ep-size", "3", "--trace", str(trace)]) == 2
    assert main([*replay, "--repeats", "2", "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["figures"]["rows"]
    assert [(row["workload"], row["step"], row["layer"]) for row in rows] == [
        *(("trace", step, layer) for step in (1, 6) for layer in range(2)),
        ("g2", None, None),
    ]
    for row in rows:
        ours, stock = (sum(row["sent_bytes"][rival].values()) for rival in ("ours", "stock"))
        assert row["least_bytes"] < ours < 1.05 * row["least_bytes"], "tiny rows, so more than at real sizes"
        assert stock > row["sent_bytes"]["stock"]["allreduce_"] > 0
    for case, row in zip(traced_cases(read_trace(trace), expert_width=48, ranks=2), rows, strict=False):
        capacity = max(int(mask_TE.sum(dim=0).max()) for mask_TE in case.masks_R)
        padded = 4 * (4 * capacity * 32 * 4)
        assert row["sent_bytes"]["stock"]["alltoall_base_"] == padded, "E·C rows of D floats, half of them sent, twice"
    assert main([*replay, "--output", str(output)]) == 2, "a results file was overwritten"
