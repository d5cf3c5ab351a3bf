"""Compiles the C++ kernels for this machine's processor, once, and loads them.

torch.utils.cpp_extension does the like, but waits for ever on the lock file of a process that was killed while it
compiled; a lock of the operating system ends with its holder.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor
from torch.utils import cpp_extension
from torch.utils.flop_counter import register_flop_formula

from ds_remoe.kernels.backend import kernels_wanted

SOURCES = tuple(Path(__file__).with_name(name) for name in ("grouped_swiglu_cpu.cpp", "decoder_cpu.cpp"))
HEADERS = tuple(sorted(Path(__file__).parent.glob("*.h")))
INSTRUCTION_SETS = {
    "AVX2": ["-mavx2", "-mfma", "-DCPU_CAPABILITY_AVX2", "-DCPU_CAPABILITY=AVX2"],
    "AVX512": [
        *("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"),
        *("-DCPU_CAPABILITY_AVX512", "-DCPU_CAPABILITY=AVX512"),
    ],
}


class CompilerError(RuntimeError):
    """The C++ kernels could not be compiled."""


@functools.cache
def load_cpu_library() -> bool:
    """Load `torch.ops.ds_remoe`, compiling it first where this machine has not done so yet.

    Returns:
        False where there is no C++ compiler or it failed, after one warning: the plain-torch twins serve then.
    """
    try:
        torch.ops.load_library(compiled_library())
    except CompilerError as error:
        warnings.warn(f"the CPU kernels are not available, plain torch runs instead, slower: {error}", stacklevel=2)
        return False
    for name, matrix_products in (("grouped_swiglu", 3), ("grouped_up_projection", 2), ("grouped_swiglu_backward", 6)):
        _tell_flops(getattr(torch.ops.ds_remoe, name), matrix_products)
    return True


def _tell_flops(operator: Any, matrix_products: int) -> None:
    """Have a FlopCounterMode that is made from now on count the products of all pairs with so many [D, H] matrices."""
    names = [argument.name for argument in operator.default._schema.arguments]
    pairs, weights = names.index("row_ids"), names.index("gate_up")

    def flops(*shapes: Any, **_: Any) -> int:
        (num_pairs,), (_experts, double_width, hidden) = shapes[pairs], shapes[weights]
        return matrix_products * num_pairs * double_width * hidden

    register_flop_formula(operator)(flops)


def serves(*tensors: Tensor) -> bool:
    """True where the kernels can run: CPU tensors of one dtype, fp32 or fp64, and a compiler that made them."""
    dtypes = {tensor.dtype for tensor in tensors}
    return (
        all(tensor.device.type == "cpu" for tensor in tensors)
        and (dtypes == {torch.float32} or dtypes == {torch.float64})
        and kernels_wanted()
        and load_cpu_library()
    )


def compiled_library() -> Path:
    """The shared library for these sources, torch, compiler and instruction set; compiled if it is not there yet.

    It stands under TORCH_EXTENSIONS_DIR, by default in the home folder's cache.

    Raises:
        CompilerError: there is no compiler, or it failed.
    """
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = ["-O3", "-std=c++20", "-fPIC", "-shared", "-fopenmp", *_instruction_set()]
    texts = [path.read_text(encoding="utf-8") for path in (*SOURCES, *HEADERS)]
    key = hashlib.sha256("\0".join([*texts, torch.__version__, _version(compiler), *flags]).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()) / "ds_remoe"
    library = folder / f"cpu-{key}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"cpu-{key}.lock"):
        if not library.exists():
            print("ds_remoe: compiling the CPU kernels, once on this machine (20 s)", file=sys.stderr, flush=True)
            _compile(compiler, flags, library)
    return library


def _compile(compiler: list[str], flags: list[str], library: Path) -> None:
    """Compile beside the library and move it into place, so that no process ever loads half of it."""
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        result = Path(scratch) / library.name
        include = [f"-isystem{path}" for path in cpp_extension.include_paths()]
        link = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-lc10", "-ltorch_cpu"]
        command = [*compiler, *flags, *include, *map(str, SOURCES), "-o", str(result), *link]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise CompilerError(f"`{shlex.join(command)}` failed:\n{done.stderr[-2000:]}")
        os.replace(result, library)


def _instruction_set() -> list[str]:
    """What torch itself uses here, so that its vector classes and ours agree."""
    return INSTRUCTION_SETS.get(torch.backends.cpu.get_cpu_capability(), ["-DCPU_CAPABILITY=DEFAULT"])


def _version(compiler: list[str]) -> str:
    try:
        return subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        raise CompilerError(
            f"no C++ compiler `{shlex.join(compiler)}`; install g++, or name one in the environment variable CXX"
        ) from None
