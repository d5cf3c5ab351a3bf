"""No kernel reads or writes outside its tensors, reads what nobody wrote, or needs its programs in an order.

A GPU runs the programs of a launch in any order and lets most accesses past a tensor's end go by. Here each tensor ends
at a page that kills the process, then begins after one, while the comparisons with the twins run once more.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

COMPARISONS = {
    "grouped_swiglu": "from test_kernels_grouped import compare_triton as compare",
    "relu_routing": "from test_kernels_routing import compare_with_twin as compare",
    "exchange": "from test_kernels_exchange import compare_with_twins as compare",
    "swiglu": "from test_kernels import compare_with_twin as compare",
}
STRAY = """
import torch, triton, triton.language as tl

@triton.jit
def _shift(x, out, n, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(out + index, tl.load(x + index + {offset}, mask=index < n), mask=index < n)

def compare(device):
    x = torch.ones(5)
    _shift[(1,)](x, torch.empty(5), 5, BLOCK=8)
"""


def run(program: str, interpret: str = "1") -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "PYTHONPATH": path}
    program = f"{program}\nfrom guarded_memory import run_guarded\nrun_guarded(lambda: compare('cpu'))"
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("kernels", COMPARISONS)
def test_triton_kernels_stay_inside_their_tensors(kernels: str) -> None:
    result = run(COMPARISONS[kernels])
    assert result.returncode == 0, f"exit {result.returncode}: {result.stderr[-3000:]}"


def test_cpu_kernels_stay_inside_what_they_are_given() -> None:
    """Their own buffers are not guarded."""
    result = run("from test_kernels_cpu import compare_with_twins as compare", interpret="0")
    assert result.returncode == 0, f"exit {result.returncode}: {result.stderr[-3000:]}"


@pytest.mark.parametrize("offset", [1, -1])
def test_a_stray_access_is_found(offset: int, tmp_path: Path) -> None:
    (tmp_path / "stray.py").write_text(STRAY.format(offset=offset))
    result = run(f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nfrom stray import compare")
    assert result.returncode == -signal.SIGSEGV, result.stderr[-3000:]
