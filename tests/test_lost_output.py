"""A process whose output nobody reads any more goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
