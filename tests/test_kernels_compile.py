"""Every Triton kernel compiled for GPUs as its launches here ask for it; no GPU is needed for that."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

KERNELS = {
    "grouped_swiglu_triton_kernels": {"swiglu_forward", "swiglu_backward", "pair_matmul", "weight_gradient"},
    "row_sums_triton": {"_sum_kernel"},
    "swiglu_triton": {"_forward_kernel", "_backward_kernel"},
    "relu_routing_triton": {
        "_activate",
        "_add_up",
        "_rank_experts",
        "_compact",
        "_compact_backward",
        "_activate_backward",
    },
    "exchange_triton": {"_pack_kernel", "_count_kernel", "_unpack_kernel", "_combine_kernel"},
}
FOLDER = Path(__file__).parents[1] / "ds_remoe" / "kernels"
LIMITS = {80: (163 << 10, 64), 90: (227 << 10, 128)}


class Driver:
    """Stands for a GPU of this compute capability, as far as compiling asks for one."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


def compile_launches(capability: int, dtype: torch.dtype) -> dict[str, list[Any]]:
    """Call every host function with tensors of the CPU; launches compile and stop there.

    Returns:
        for each kernel the (PTX, bytes of shared memory) of its launches.
    """
    from triton.runtime import driver
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    compiled: dict[str, list[Any]] = {}
    launch = JITFunction.run

    def only_compile(self: Any, *args: Any, **kwargs: Any) -> None:
        kernel = launch(self, *args, **{**kwargs, "warmup": True})
        name = f"{self.fn.__module__.split('.')[-1]}.{self.fn.__name__}"
        compiled.setdefault(name, []).append((kernel.asm["ptx"], kernel.metadata.shared))

    driver.set_active(Driver(capability))
    JITFunction.run = only_compile
    Autotuner._bench = lambda self, *args, config, **kwargs: [0.0]
    _launch_all(capability, dtype)
    return compiled


def _launch_all(capability: int, dtype: torch.dtype) -> None:
    from ds_remoe.kernels import exchange_triton, grouped_swiglu_triton, relu_routing_triton, swiglu_triton
    from ds_remoe.kernels import grouped_swiglu_triton_tuning as tuning
    from ds_remoe.kernels.exchange import PeerPrefix, Prefix, Room
    from ds_remoe.kernels.pair_groups import PairGroups, RowOrder

    tuning._limits = lambda device: LIMITS[capability]
    tokens, experts, d, h = 256, 4, 128, 64
    logits, mask = torch.randn(experts, tokens), torch.ones(experts, tokens, dtype=torch.bool)
    for used in (None, mask[0]):
        _, _, _, block_starts = relu_routing_triton.activate_(logits, used)
    ranks, starts = relu_routing_triton.token_places(mask)
    relu_routing_triton.compact(logits, mask, block_starts, ranks, starts, experts * tokens)
    relu_routing_triton.compact_backward(logits.flatten(), mask, block_starts)
    for grads in ((logits, logits[:, 0]), (logits, None), (None, logits[:, 0])):
        relu_routing_triton.activate_backward(*grads, mask)

    counts = [tokens, 0, 1, tokens - 1]
    x, pairs = torch.randn(tokens, d, dtype=dtype), sum(counts)
    ids = torch.arange(pairs) % tokens
    groups = PairGroups(ids, torch.rand(pairs), counts, RowOrder.of(ids, tokens))
    weights = x.new_empty(experts, 2 * h, d), x.new_empty(experts, d, h)
    for sums, accumulate in ((x.clone(), False), (x.float(), True)):
        pre = grouped_swiglu_triton.forward(x, groups, *weights, sums, accumulate)
        grouped_swiglu_triton.up_projection(x, groups, weights[0])
        outputs = sums, *map(torch.empty_like, weights)
        grouped_swiglu_triton.backward(x, x, groups, *weights, pre, *outputs, accumulate, accumulate)
    hidden = swiglu_triton.forward(pre, groups.weights_M)
    swiglu_triton.backward(hidden, pre, groups.weights_M)

    for local in (1, 40):  # experts of a rank: a mask of one word and one of two
        mask_TE = torch.ones(tokens, 2 * local, dtype=torch.bool)
        prefix, weights_TE, all_pairs = Prefix.of(mask_TE, 2, 0), torch.rand(mask_TE.shape), mask_TE.numel()
        for given in (weights_TE, weights_TE.t().contiguous().t()):
            packed = exchange_triton.pack(x, given, mask_TE, prefix, 0, Room(2 * tokens, all_pairs, tokens), dtype)
        exchange_triton.unpack(packed.words, PeerPrefix(prefix.rows[:3], prefix.pairs[:3]), local, tokens, all_pairs)
    exchange_triton.combine_rows(x, x, prefix.rows, tokens)


def spilled_bytes(ptx: str, capability: int, folder: Path) -> list[int]:
    """What the functions of a program keep in memory for want of registers, as NVIDIA's assembler says."""
    import triton

    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    (folder / "kernel.ptx").write_text(ptx)
    architecture = "sm_90a" if capability == 90 else f"sm_{capability}"
    command = [assembler, "-v", "--gpu-name", architecture, folder / "kernel.ptx", "-o", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return [int(count) for count in re.findall(r"(\d+) bytes spill stores", said)]


@pytest.mark.parametrize(("capability", "dtype"), [(90, "bfloat16"), (80, "bfloat16"), (80, "float32")])
def test_every_launch_compiles(capability: int, dtype: str, tmp_path: Path) -> None:
    """The GEMMs with asynchronous copies, on Hopper with its own matrix instructions, and without spilt registers."""
    program = (
        "import json, sys, torch; from test_kernels_compile import compile_launches;"
        f"json.dump(compile_launches({capability}, torch.{dtype}), open(sys.argv[1], 'w'))"
    )
    result = tmp_path / "ptx.json"
    cache = {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "DS_REMOE_AUTOTUNE": "off"}
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, **cache, "PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", program, str(result)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    compiled = json.loads(result.read_text())
    assert set(compiled) == {f"{module}.{kernel}" for module, kernels in KERNELS.items() for kernel in kernels}
    for name in KERNELS["grouped_swiglu_triton_kernels"]:
        for ptx, shared in dict(compiled[f"grouped_swiglu_triton_kernels.{name}"]).items():
            assert f".target sm_{capability}" in ptx
            assert "cp.async" in ptx, name
            assert capability < 90 or "wgmma.mma_async" in ptx, name
            assert shared <= LIMITS[capability][0], name
            assert spilled_bytes(ptx, capability, tmp_path) == [0], name


def test_no_kernel_is_left_out() -> None:
    """KERNELS has every Triton kernel that a host function launches."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in FOLDER.glob("*_triton*.py")}
    launched = set(re.findall(r"(\w+)\[.+\]\(", "".join(texts.values())))
    found = {stem: set(re.findall(r"@triton\.jit.*\ndef (\w+)", text)) & launched for stem, text in texts.items()}
    assert {stem: kernels for stem, kernels in found.items() if kernels} == KERNELS
