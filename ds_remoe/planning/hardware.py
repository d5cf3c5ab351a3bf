"""Accelerators by name, what a machine reaches of its published figures, and how ranks lie on nodes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

GB, GIB, TERA = 1e9, 2**30, 1e12

Dtype = Literal["bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class Accelerator:
    """Published figures of one accelerator, dense (without structured sparsity).

    Attributes:
        name: as shown.
        half_tflops: TFLOP/s of bf16 and fp16 with fp32 accumulation.
        fp32_tflops: TFLOP/s of fp32; torch leaves TF32 off for matrix products.
        memory_gib: device memory as the driver reports it.
        memory_gbs: device memory bandwidth, GB/s.
        link_gbs: to the other accelerators of the node, GB/s each way.
        network_gbs: network of the node for each accelerator, GB/s each way, in the maker's own system.
        source: where the figures stand.
    """

    name: str
    half_tflops: float
    fp32_tflops: float
    memory_gib: float
    memory_gbs: float
    link_gbs: float
    network_gbs: float
    source: str


ACCELERATORS = {
    "a100-40gb": Accelerator(
        "A100 SXM 40 GB", 312, 19.5, 39.6, 1555, 300, 25, "NVIDIA A100 datasheet; DGX A100: 8 x 200 Gb/s"
    ),
    "a100": Accelerator(
        "A100 SXM 80 GB", 312, 19.5, 79.2, 2039, 300, 25, "NVIDIA A100 datasheet; DGX A100: 8 x 200 Gb/s"
    ),
    "h100": Accelerator("H100 SXM", 989.4, 66.9, 79.2, 3350, 450, 50, "NVIDIA H100 datasheet; DGX H100: 8 x 400 Gb/s"),
    "h200": Accelerator("H200 SXM", 989.4, 66.9, 139.8, 4800, 450, 50, "NVIDIA H200 datasheet; DGX H200: 8 x 400 Gb/s"),
    "b200": Accelerator("B200 SXM", 2250, 75, 178.4, 7700, 900, 50, "NVIDIA B200 datasheet; DGX B200: 8 x 400 Gb/s"),
    "l40s": Accelerator("L40S", 362, 91.6, 44.4, 864, 32, 25, "NVIDIA L40S datasheet; PCIe 4.0 x16; 200 Gb/s assumed"),
}


GEMM_EFFICIENCY = 0.6
ATTENTION_EFFICIENCY = 0.35
COPY_EFFICIENCY = 0.8
LINK_EFFICIENCY = 0.8
MEMORY_USABLE = 0.94
LAYER_SECONDS = 3e-4


@dataclass(frozen=True)
class Hardware:
    """What the time model computes with: peaks, and how much of them is reached.

    Attributes:
        name: of the accelerator.
        peak_flops: FLOP/s of one accelerator at the training dtype; MFU is relative to it.
        gemm_flops: FLOP/s that the matrix products reach, those of routed experts left out.
        expert_flops: FLOP/s that the routed experts reach.
        attention_flops: FLOP/s that the attention scores reach.
        memory_bytes: device memory.
        copy_bytes: bytes/s of device memory, read and written together: the optimizer's.
        elementwise_bytes: bytes/s that the model's elementwise kernels read and write together.
        link_bytes: to the other accelerators of the node, bytes/s each way.
        network_bytes: of one node, bytes/s each way.
        link_latency, network_latency: seconds of one hop within a node and between nodes.
        layer_seconds: host time of one layer that nothing hides, forward and backward, in each micro-batch.
        is_cpu: whether a rank trains on the processor, where torch has other norms and attention.
        notes: for the foot of the table: where the figures are from, and what is assumed.
    """

    name: str
    peak_flops: float
    gemm_flops: float
    expert_flops: float
    attention_flops: float
    memory_bytes: float
    copy_bytes: float
    elementwise_bytes: float
    link_bytes: float
    network_bytes: float
    link_latency: float = 5e-6
    network_latency: float = 20e-6
    layer_seconds: float = LAYER_SECONDS
    is_cpu: bool = False
    notes: tuple[str, ...] = ()


def published(
    accelerator: Accelerator,
    dtype: Dtype,
    gpus_per_node: int,
    *,
    peak_tflops: float | None = None,
    gemm_efficiency: float | None = None,
) -> Hardware:
    """Hardware from published figures and assumed efficiencies; the notes say which is which.

    Args:
        peak_tflops: in place of the published peak at `dtype`.
        gemm_efficiency: share of the peak that matrix products reach, in place of the assumed one.
    """
    listed = accelerator.fp32_tflops if dtype == "fp32" else accelerator.half_tflops
    peak = (peak_tflops or listed) * TERA
    efficiency = gemm_efficiency or GEMM_EFFICIENCY
    attention = min(ATTENTION_EFFICIENCY, efficiency)
    return Hardware(
        name=accelerator.name,
        peak_flops=peak,
        gemm_flops=peak * efficiency,
        expert_flops=peak * efficiency,
        attention_flops=peak * attention,
        memory_bytes=accelerator.memory_gib * GIB,
        copy_bytes=accelerator.memory_gbs * GB * COPY_EFFICIENCY,
        elementwise_bytes=accelerator.memory_gbs * GB * COPY_EFFICIENCY,
        link_bytes=accelerator.link_gbs * GB * LINK_EFFICIENCY,
        network_bytes=accelerator.network_gbs * gpus_per_node * GB * LINK_EFFICIENCY,
        notes=(
            f"published ({accelerator.source}): {listed:,g} TFLOP/s {dtype}, {accelerator.memory_gib:g} GiB, "
            f"{accelerator.memory_gbs:,g} GB/s memory, {accelerator.link_gbs:g} GB/s to the node's others, "
            f"{accelerator.network_gbs:g} GB/s network an accelerator",
            f"assumed shares of these: GEMM {efficiency:g}, attention {attention:g}, memory {COPY_EFFICIENCY:g}, links "
            f"and network {LINK_EFFICIENCY:g}; share of the memory that a run can use: {MEMORY_USABLE:g}; "
            f"{LAYER_SECONDS * 1e6:.0f} us of host time for a layer in each micro-batch",
        ),
    )


def with_options(
    hardware: Hardware,
    *,
    peak_tflops: float | None = None,
    memory_gib: float | None = None,
    memory_gbs: float | None = None,
    link_gbs: float | None = None,
    network_gbs: float | None = None,
) -> Hardware:
    """Hardware with the given figures in place of its own, taken as they are reached; None leaves one alone.

    Args:
        network_gbs: of a whole node.
    """
    given = {
        "peak_flops": peak_tflops and peak_tflops * TERA,
        "memory_bytes": memory_gib and memory_gib * GIB,
        "copy_bytes": memory_gbs and memory_gbs * GB,
        "elementwise_bytes": memory_gbs and memory_gbs * GB,
        "link_bytes": link_gbs and link_gbs * GB,
        "network_bytes": network_gbs and network_gbs * GB,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    if not changes:
        return hardware
    note = "by option: " + ", ".join(f"{name} = {value:.4g}" for name, value in changes.items())
    return replace(hardware, **changes, notes=(*hardware.notes, note))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal accelerators; ranks are numbered node by node, as every launcher does."""

    nodes: int
    gpus_per_node: int
    hardware: Hardware

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Group:
    """How one kind of process group lies on the nodes.

    Attributes:
        size: ranks of each group.
        nodes: nodes that a group touches, at most.
        groups_in_node: groups that have a rank in one node, at most.
        near: other ranks of the group in a rank's own node, mean over all ranks.
        node_far: pairs of one node's ranks with ranks of their group elsewhere, at most over the nodes.
    """

    size: int
    nodes: int
    groups_in_node: int
    near: float
    node_far: int

    @classmethod
    def of(cls, cluster: Cluster, size: int, stride: int = 1) -> Group:
        """Groups of `size` ranks `stride` apart that together hold every rank, as DeepSpeed makes them.

        stride 1 gives expert-parallel groups (and, with the world's size, the data-parallel group); stride ep_size and
        size world / ep_size the expert-data-parallel groups.
        """
        per_node = cluster.gpus_per_node
        members: dict[tuple[int, int], int] = {}
        for rank in range(cluster.world_size):
            key = (rank // (size * stride) * stride + rank % stride, rank // per_node)
            members[key] = members.get(key, 0) + 1
        near = sum(count * (count - 1) for count in members.values()) / cluster.world_size
        touched: dict[int, int] = {}
        in_node: dict[int, int] = {}
        far: dict[int, int] = {}
        for (group, node), count in members.items():
            touched[group] = touched.get(group, 0) + 1
            in_node[node] = in_node.get(node, 0) + 1
            far[node] = far.get(node, 0) + count * (size - count)
        return cls(size, max(touched.values()), max(in_node.values()), near, max(far.values()))

    @property
    def crosses_nodes(self) -> bool:
        return self.nodes > 1

    @property
    def hops(self) -> tuple[int, int]:
        """Steps of a tree within the nodes and between them, for latency."""
        inside = math.ceil(self.size / self.nodes)
        return math.ceil(math.log2(inside)) if inside > 1 else 0, math.ceil(math.log2(self.nodes))
