"""Freed memory on the CPU: kept for the next step, given back where the machine runs short."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from ds_remoe.training import host_memory
from ds_remoe.training.host_memory import MemoryRelief, available_share

KEEPS_AND_GIVES_BACK = """
import psutil, torch
from ds_remoe.training.host_memory import MemoryRelief, reuse_freed_memory

def resident():
    return psutil.Process().memory_info().rss / 2**20

assert reuse_freed_memory()
blocks = [torch.ones(32, 2**18) for _ in range(16)]  # 32 MiB each
full = resident()
del blocks[:-1]  # the last one keeps the heap from shrinking
assert MemoryRelief(least_share=0.0).look() is None
kept = resident()
relief = MemoryRelief(least_share=1.0, interval=0.0)
told = [relief.look(), relief.look()]
print(full, kept, resident(), told[0] is not None and "freed memory goes back" in told[0], told[1] is None)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_what_is_freed_stays_until_memory_is_short() -> None:
    done = subprocess.run([sys.executable, "-c", KEEPS_AND_GIVES_BACK], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    full, kept, left, told, told_once = done.stdout.split()
    assert float(kept) > float(full) - 50
    assert float(left) < float(full) - 400
    assert (told, told_once) == ("True", "True")


def test_it_does_not_look_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[float] = []
    monkeypatch.setattr(host_memory, "available_share", lambda: looks.append(1.0) or 1.0)
    relief = MemoryRelief(interval=3600.0)
    assert [relief.look() for _ in range(3)] == [None] * 3
    assert len(looks) == 1


@pytest.mark.parametrize(
    ("limit", "statistics", "left"),
    [
        ("1000\n", "file 900\nanon 750\n", 0.25),  # the page cache can be reclaimed
        ("max\n", "anon 750\n", None),
        ("1000\n", "file 900\n", None),
        (None, None, None),
    ],
)
def test_a_containers_limit_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str | None, statistics: str | None, left: float | None
) -> None:
    for name, text in (("max", limit), ("stat", statistics)):
        if text is not None:
            (tmp_path / name).write_text(text)
    monkeypatch.setattr(host_memory, "_CGROUPS", ((tmp_path / "max", tmp_path / "stat", "anon"),))
    memory = psutil.virtual_memory()
    expected = memory.available / memory.total if left is None else left
    assert available_share() == pytest.approx(expected, abs=0.05)
