"""The memory that a forward and backward pass takes, from the allocations that torch's allocator reports."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

Outputs = tuple[list[Tensor], list[Tensor | None]]
"""What a forward pass returns: tensors, and the gradient of each; None for a scalar."""

MIB = 2**20
_BACKWARD = "ds_remoe.bench.backward"
_M_MMAP_THRESHOLD, _MMAP_FROM_BYTES = -3, 65536
_DEVICE_TYPES = {"cpu": 0, "cuda": 1}  # c10::DeviceType


@dataclass(frozen=True)
class Peak:
    """Bytes beyond what existed before the pass: parameters, inputs and labels do not count.

    Attributes:
        activations: most that was allocated at a time, without the gradients of the parameters.
        kept: what of it is alive between forward and backward.
        whole: most that the pass took in all, those gradients included: growth of the resident set on the CPU, which
            shows what no allocator reports; `max_memory_allocated` on CUDA. None where the system does not tell.
    """

    activations: int
    kept: int
    whole: int | None


def measure_peak(
    forward: Callable[[], Outputs], parameters: Iterable[nn.Parameter], others: Iterable[Tensor], device: torch.device
) -> Peak:
    """Run forward and backward twice: once for the resident set, once under the profiler.

    The profiled pass has one thread, as the profiler does not see what other threads allocate.

    Args:
        forward: one forward pass.
        parameters: their gradients are freed before each pass.
        others: further leaves with gradients, which count as activations.
        device: where it runs.
    """
    owners, leaves = list(parameters), list(others)

    def clear() -> None:
        for tensor in (*owners, *leaves):
            tensor.grad = None

    clear()
    whole = _whole(lambda: torch.autograd.backward(*forward()), device)
    clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        events = _trace(forward)
    finally:
        torch.set_num_threads(threads)
    gradients = {p.grad.untyped_storage().data_ptr() for p in owners if p.grad is not None}
    clear()
    activations, kept = _replay(events, gradients, _DEVICE_TYPES[device.type])
    return Peak(activations, kept, whole)


def _trace(forward: Callable[[], Outputs]) -> list[dict[str, Any]]:
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        outputs, gradients = forward()
        with record_function(_BACKWARD):
            torch.autograd.backward(outputs, gradients)
        del outputs
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return events


def _replay(events: list[dict[str, Any]], gradients: set[int], device_type: int) -> tuple[int, int]:
    """(peak, bytes at the start of backward), without the blocks that hold gradients in the end."""
    (backward_at,) = (event["ts"] for event in events if event["name"] == _BACKWARD)
    changes = [e for e in events if e["name"] == "[memory]" and e["args"]["Device Type"] == device_type]
    changes.sort(key=lambda event: (event["ts"], event["args"]["Ev Idx"]))
    last_allocation = {e["args"]["Addr"]: i for i, e in enumerate(changes) if e["args"]["Bytes"] > 0}
    of_gradients = {last_allocation[address] for address in gradients if address in last_allocation}
    alive: set[int] = set()
    total = peak = kept = 0
    for index, event in enumerate(changes):
        size, address = event["args"]["Bytes"], event["args"]["Addr"]
        if size > 0 and index not in of_gradients:
            alive.add(address)
            total += size
        elif size < 0 and address in alive:  # what existed before the pass is not ours to subtract
            alive.remove(address)
            total += size
        if event["ts"] < backward_at:
            kept = total
        peak = max(peak, total)
    return peak, kept


def _whole(work: Callable[[], object], device: torch.device) -> int | None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    if not _return_memory():
        work()
        return None
    before_kib = _status("VmRSS")
    work()
    return (_status("VmHWM") - before_kib) * 1024


def _return_memory() -> bool:
    """Give freed memory back to the system now and from now on, and forget the highest resident set so far."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_FROM_BYTES)
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except (OSError, AttributeError):
        return False
    return True


def _status(field: str) -> int:
    """A field of this process's status, in KiB."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0])
    raise OSError(f"/proc/self/status has no {field}")
