"""`run_and_exit`: the exit codes and last words of a process, and its end while gloo's threads lag behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import free_port

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}

ENDS = """
import atexit, ctypes, sys, threading, time
from ds_remoe.process_exit import run_and_exit

if {with_torch}:
    import types
    sys.modules["torch"] = types.ModuleType("torch")  # imported is all that is asked

def main():
    atexit.register(print, "handler")
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
    sys.stdout.write("main, ")
    {end}

run_and_exit(main)
"""


def ends(end: str, with_torch: bool = True) -> list[str]:
    return [sys.executable, "-c", ENDS.format(end=end, with_torch=with_torch)]


@pytest.mark.parametrize("with_torch", [True, False])
@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("return 0", 0, ""),
        ("return None", 0, ""),
        ("return 2", 2, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit('no such run')", 1, "no such run\n"),
        ("raise KeyError('step')", 1, "KeyError: 'step'\n"),
        ("raise KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt\n"),
    ],
)
def test_it_ends_as_a_script_does(end: str, code: int, said: str, with_torch: bool) -> None:
    done = subprocess.run(ends(end, with_torch), capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
    assert (done.returncode, done.stdout) == (code, "main, thread\nhandler\n")
    assert done.stderr.endswith(said)
    assert bool(done.stderr) == bool(said)


def test_what_c_has_buffered_is_printed() -> None:
    end = "ctypes.CDLL(None).printf(b'from C, '); return 0"
    done = subprocess.run(ends(end), capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
    assert "from C, " in done.stdout


def test_a_closed_stdout_is_no_failure() -> None:
    done = subprocess.run(ends("sys.stdout.flush(); sys.stdout = None; return 0"), timeout=60, env=ENVIRONMENT)
    assert done.returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_words_that_could_not_be_written_are_a_failure() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(ends("return 0"), stdout=full, timeout=60, env=ENVIRONMENT)
    assert done.returncode == 1


LAGGING = """
import os, sys
import torch
import torch.distributed as dist
from ds_remoe.process_exit import run_and_exit

def main():
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{sys.argv[1]}", rank=0, world_size=1)
    torch.kept = dist.group.WORLD  # as DeepSpeed's modules keep groups
    threads = os.listdir("/proc/self/task")
    slowed = [thread for thread in threads if "gloo" in open(f"/proc/self/task/{thread}/comm").read()]
    for thread in slowed:
        os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))
    for _ in range(20):
        dist.all_reduce(torch.ones(1000))
    dist.all_gather_object([None], {})
    dist.destroy_process_group()
    return 0 if slowed else 9

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
torch.set_num_threads(1)
codes = set()
for _ in range(40):
    child = os.fork()
    if child == 0:
        run_and_exit(main)
    codes.add(os.waitpid(child, 0)[1])
print(codes)
"""


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="needs Linux's scheduling classes")
def test_it_ends_well_while_threads_of_gloo_lag_behind() -> None:
    """On one core, with gloo's threads run only while nobody else wants it; `sys.exit(main())` aborts here."""
    command = [sys.executable, "-c", LAGGING, str(free_port())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "{0}\n", done.stderr[-2000:]
