"""Block shapes of the grouped SwiGLU's Triton kernels: which there are, and how a device gets its own.

A kernel is timed with each shape when it first meets a (sizes, dtype, tile height) on a device, and Triton keeps the
timings on the disk (TRITON_CACHE_DIR), so that a resumed run takes the same shapes and gives the same bits. The ranks
of a machine tune one after the other, so that the first one's timings serve them all. On several machines without a
shared cache two devices may settle on different shapes, whose sums may differ in the last bit: DS_REMOE_AUTOTUNE=off
takes the first shape that fits the device.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

Shape = tuple[int, int, int, int]
"""BLOCK_N, BLOCK_K, warps, stages."""

# The one that should serve a large matrix best first.
SHAPES: tuple[Shape, ...] = (
    (128, 64, 8, 3),
    (128, 64, 8, 4),
    (256, 64, 8, 3),
    (128, 64, 4, 3),
    (64, 64, 8, 3),
    (64, 64, 4, 4),
    (64, 32, 4, 4),
    (64, 32, 4, 2),
    (64, 32, 8, 3),
)
WIDE_FLOAT_SHAPES: tuple[Shape, ...] = ((64, 32, 4, 3), (64, 32, 8, 2), (64, 16, 4, 3), (32, 32, 4, 3))
INTERPRETED_SHAPE: Shape = (32, 32, 4, 1)
MIN_BLOCK_N = min(shape[0] for shape in (*SHAPES, *WIDE_FLOAT_SHAPES, INTERPRETED_SHAPE))

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Read once, as Triton does when its kernels are defined."""

MAX_SUMS_PER_THREAD, MAX_SUMS_BESIDE_FACTORS = 128, 64
"""fp32 sums that a thread can hold without spilling registers: from Hopper on, and before, where the matrix
instructions take their factors from registers, too."""

SMALLEST_SHARED_MEMORY = 64 << 10


def tuned(
    key: Sequence[str], matrices: int = 1, max_sums: int = MAX_SUMS_PER_THREAD, restore: Sequence[str] = ()
) -> Callable[[Any], Any]:
    """Decorator: time a kernel with the shapes that fit, once for each value of `key` and dtype.

    Args:
        key: arguments that the timings depend on.
        matrices: blocks of columns that a program multiplies its rows with.
        max_sums: most sums per thread.
        restore: arguments that the kernel adds into, put back after each timing. Where there are any, BLOCK_M is a part
            of the shape; elsewhere the tile table gives it.
    """

    def decorate(kernel: Any) -> Any:
        configs = _configs(bool(restore))
        options: dict[str, Any] = {}
        if "cache_results" in inspect.signature(triton.autotune).parameters:  # from Triton 3.4
            options["cache_results"] = True
        tuner = triton.autotune(
            configs=configs,
            key=list(key),
            prune_configs_by={"early_config_prune": functools.partial(_that_fit, matrices, max_sums)},
            restore_value=list(restore) or None,
            **options,
        )(kernel)
        if "cache_results" in options and not INTERPRETED:
            tuner.check_disk_cache = one_at_a_time(tuner.check_disk_cache)
        return tuner

    return decorate


def one_at_a_time(read_or_time: Callable[..., bool]) -> Callable[..., bool]:
    """`read_or_time`, which reads a kernel's timings from Triton's cache or makes them, behind a lock of that cache.

    Otherwise the ranks of a machine would each time for themselves, and take other shapes than a resume finds.
    """

    @functools.wraps(read_or_time)
    def locked(*arguments: Any) -> bool:
        folder = Path(triton.knobs.cache.dir)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "ds_remoe_autotune.lock").open("w") as lock:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            return read_or_time(*arguments)

    return locked


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of the products: TF32 for fp32 only where torch's own GEMMs may use it."""
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # torch before 2.9 has the older switch alone; later ones refuse to read it once the newer was set.
    precision = getattr(matmul, "fp32_precision", None)
    allowed = matmul.allow_tf32 if precision is None else precision == "tf32"
    return "tf32" if allowed else "ieee"


def autotuning() -> bool:
    """Whether shapes are timed; see DS_REMOE_AUTOTUNE above."""
    choice = os.environ.get("DS_REMOE_AUTOTUNE", "on")
    if choice not in ("on", "off"):
        raise ValueError(f"DS_REMOE_AUTOTUNE = {choice!r}: must be 'on' or 'off'")
    return choice == "on"


def _configs(with_rows: bool) -> list[triton.Config]:
    shapes: dict[Shape, int] = dict.fromkeys(SHAPES, 128) | dict.fromkeys(WIDE_FLOAT_SHAPES, 64)
    if INTERPRETED:  # nothing to time there, and small blocks test the edges
        shapes = {INTERPRETED_SHAPE: 32}
    return [
        triton.Config(
            {"BLOCK_N": n, "BLOCK_K": k} | ({"BLOCK_M": rows} if with_rows else {}), num_warps=warps, num_stages=stages
        )
        for (n, k, warps, stages), rows in shapes.items()
    ]


def _that_fit(
    matrices: int, max_sums: int, configs: list[triton.Config], arguments: dict[str, Any], **options: Any
) -> list[triton.Config]:
    """The configurations whose blocks fit into the device's shared memory and registers; the first alone if not tuned.

    Raises:
        RuntimeError: none fits.
    """
    tensor = next(value for value in arguments.values() if isinstance(value, torch.Tensor))
    itemsize = tensor.element_size()
    wanted = WIDE_FLOAT_SHAPES if itemsize == 4 else SHAPES
    memory, most_sums = _limits(tensor.device)
    fitting = []
    for config in configs:
        n, k = config.kwargs["BLOCK_N"], config.kwargs["BLOCK_K"]
        rows = config.kwargs.get("BLOCK_M", options.get("BLOCK_M"))
        sums = rows * n * matrices // (32 * config.num_warps)
        needed = config.num_stages * (rows + matrices * n) * k * itemsize
        listed = (n, k, config.num_warps, config.num_stages) in wanted
        if (
            listed
            and sums <= min(max_sums, most_sums)
            and needed <= memory
            and not (rows < 64 and config.num_warps > 4)
        ):
            fitting.append(config)
    if not fitting:
        raise RuntimeError(
            f"grouped SwiGLU: no block shape for {tensor.dtype} fits into {memory} bytes of shared memory of "
            f"{tensor.device}; set DS_REMOE_KERNELS=torch"
        )
    return fitting if autotuning() else fitting[:1]


def _limits(device: torch.device) -> tuple[int, int]:
    """Shared memory that a program may have, in bytes, and the most sums of a thread."""
    properties = torch.cuda.get_device_properties(device)
    memory = int(getattr(properties, "shared_memory_per_block_optin", SMALLEST_SHARED_MEMORY))
    return memory, MAX_SUMS_PER_THREAD if properties.major >= 9 else MAX_SUMS_BESIDE_FACTORS
