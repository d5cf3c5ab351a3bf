"""Bytes on the wire and time of one expert-parallel MoE layer, against DeepSpeed's stock layer and the least possible.

Each expert-parallel size is a process group of its own on this machine (see comm_rank.py).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from ds_remoe.bench.comm_cases import RoutingCase, traced_cases, workload_case
from ds_remoe.bench.ranks import run_module
from ds_remoe.bench.trace import read_trace
from ds_remoe.bench.workloads import Sizes

WHAT = (
    "bytes that all ranks send to each other for one MoE layer, forward and backward, fp32: ds_remoe.MoE, DeepSpeed's "
    "MOELayer with ReLUGate on the same routing, and the least possible; seconds until the last rank is done"
)


OURS, STOCK = RIVALS = ("ours", "stock")


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        trace: file of a recorded trace, or None.
        workloads: names that `build_workload` knows.
        tokens: each rank's T of the workloads; a trace brings its own.
        hidden_size, ffn_hidden_size: D, and the width of an expert at granularity 1.
        repeats: timed rounds.
    """

    trace: str | None
    workloads: tuple[str, ...]
    tokens: int
    hidden_size: int
    ffn_hidden_size: int
    repeats: int

    def cases(self, ranks: int) -> list[RoutingCase]:
        """Every routing to measure, on this number of ranks.

        Raises:
            ValueError: the trace is none, or something does not fit; the message says what.
        """
        sizes = Sizes(self.tokens, self.hidden_size, self.ffn_hidden_size)
        traced = [] if self.trace is None else traced_cases(read_trace(Path(self.trace)), self.ffn_hidden_size, ranks)
        return traced + [workload_case(name, sizes, ranks) for name in self.workloads]


@dataclass(frozen=True)
class Row:
    """One routing on `ep_size` ranks.

    Attributes:
        workload, step, layer, expert_width: see `RoutingCase`.
        tokens, pairs: of all ranks together.
        least_bytes: see `comm_bytes.least_bytes`.
        sent_bytes: of each rival, by operation, all ranks together.
        times: of each rival, see `Timing.as_figures`.
        stock_time_over_ours: median over the rounds.
        difference: largest difference between the rivals' outputs, and gradients of tokens and routing weights,
            relative to the largest value.
    """

    ep_size: int
    workload: str
    step: int | None
    layer: int | None
    expert_width: int
    num_experts: int
    tokens: int
    pairs: int
    least_bytes: int
    sent_bytes: dict[str, dict[str, int]]
    times: dict[str, dict[str, float | int]]
    stock_time_over_ours: float
    difference: float

    def sent(self, rival: str) -> int:
        """Bytes of all its operations."""
        return sum(self.sent_bytes[rival].values())


def measure(request: Request, ep_sizes: Sequence[int]) -> list[Row]:
    """Measure each routing on each number of ranks, one number after the other.

    Raises:
        ValueError: something of the request does not fit; nothing was started.
        RankError: a rank failed.
    """
    for ep_size in ep_sizes:
        request.cases(ep_size)
    rows: list[Row] = []
    for ep_size in ep_sizes:
        with tempfile.TemporaryDirectory(prefix="ds-remoe-comm-") as folder:
            task, results = Path(folder) / "request.json", Path(folder) / "rows.json"
            task.write_text(json.dumps(asdict(request)), encoding="utf-8")
            run_module("ds_remoe.bench.comm_rank", [str(task), str(results)], ep_size)
            rows += [Row(**row) for row in json.loads(results.read_text(encoding="utf-8"))]
    return rows


def figures(request: Request, rows: Sequence[Row]) -> dict[str, Any]:
    """The measurement for a results file: the sizes, a summary by ep_size and workload, every row."""
    summary = [
        {
            "ep_size": ep_size,
            "workload": workload,
            "least_bytes": sum(row.least_bytes for row in chosen),
            **{f"{rival}_over_least": _total_over_least(chosen, rival) for rival in RIVALS},
            "ours_over_least_at_worst": max(
                (row.sent(OURS) / row.least_bytes for row in chosen if row.least_bytes), default=None
            ),
            "stock_time_over_ours": _time_over_ours(chosen),
        }
        for (ep_size, workload), chosen in _groups(rows).items()
    ]
    return {"request": asdict(request), "summary": summary, "rows": [asdict(row) for row in rows]}


def table(rows: Sequence[Row]) -> Table:
    """The measurement for a terminal, bytes as multiples of the least."""
    title = "one MoE layer, forward and backward: bytes that all ranks send, and time"
    result = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    result.add_column("ranks", justify="right")
    result.add_column("routing", no_wrap=True)
    for name in ("active", "least\nMiB", "ours\n/least", "stock\n/least", "ours\nms", "stock\nms", "stock\n/ours"):
        result.add_column(name, justify="right", no_wrap=True)
    for (ep_size, workload), chosen in _groups(rows).items():
        for row in chosen:
            name = workload if row.step is None else f"step {row.step}, layer {row.layer}"
            result.add_row(str(ep_size), name, *_cells([row], row.stock_time_over_ours))
        if len(chosen) > 1:
            result.add_row(str(ep_size), f"{workload}, all", *_cells(chosen, _time_over_ours(chosen)), end_section=True)
    return result


def _cells(rows: Sequence[Row], stock_time_over_ours: float) -> list[str]:
    """Active experts of a token, least MiB, bytes over the least and times, of these rows together."""
    active = sum(row.pairs for row in rows) / max(sum(row.tokens for row in rows), 1)
    cells = [f"{active:.2f}", f"{sum(row.least_bytes for row in rows) / 2**20:.2f}"]
    over_least = [_total_over_least(rows, rival) for rival in RIVALS]
    cells += ["-" if value is None else f"{value:.3f}" for value in over_least]
    cells += [f"{_total_ms(rows, rival):.1f}" for rival in RIVALS]
    return [*cells, f"{stock_time_over_ours:.2f}"]


def _groups(rows: Sequence[Row]) -> dict[tuple[int, str], list[Row]]:
    groups: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.ep_size, row.workload), []).append(row)
    return groups


def _total_over_least(rows: Sequence[Row], rival: str) -> float | None:
    """All bytes of a rival over the least; None where nothing need be sent."""
    least = sum(row.least_bytes for row in rows)
    return sum(row.sent(rival) for row in rows) / least if least else None


def _time_over_ours(rows: Sequence[Row]) -> float:
    """Sum of the stock layer's median times over that of ours."""
    return _total_ms(rows, STOCK) / _total_ms(rows, OURS)


def _total_ms(rows: Sequence[Row], rival: str) -> float:
    return sum(row.times[rival]["median_ms"] for row in rows)
