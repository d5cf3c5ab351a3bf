"""A process whose output goes nowhere goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from ds_remoe.training.lost_output import outlast_readers
outlast_readers()
print("step 1", flush=True)
sys.stdin.read()
for stream in (sys.stdout, sys.stderr):
    print("step 2" * 100_000, file=stream, flush=True)
open(sys.argv[1], "w").write("saved")
"""


def test_it_goes_on_when_its_reader_is_gone(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "file")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "step 1\n"
    process.stdout.close()
    process.stderr.close()
    process.stdin.close()
    assert process.wait(60) == 0
    assert (tmp_path / "file").read_text() == "saved"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_it_goes_on_when_the_disk_of_its_log_is_full(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "file")]
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=full, stderr=full, check=True, timeout=60)
    assert (tmp_path / "file").read_text() == "saved"


def test_a_character_that_the_encoding_has_not_is_written_as_its_escape() -> None:
    program = 'from ds_remoe.training.lost_output import outlast_readers\noutlast_readers()\nprint("λ = 1")'
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "\\u03bb = 1\n"
