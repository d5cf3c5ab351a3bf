"""Parameters of one rank, in the order and in the groups in which DeepSpeed's ZeRO lays them out."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ds_remoe.config.schema import ModelConfig, MoEConfig

MAX_EXPERT_GROUP = 178_956_971
"""Elements after which `split_params_into_different_moe_groups_for_optimizer` begins another group (0.19.8)."""
ALIGNMENT = 2
"""Elements per rank to which a group's flat buffer is padded (nccl_start_alignment_factor)."""


def moe_layers(model: ModelConfig, moe: MoEConfig) -> int:
    """Layers with routed experts."""
    return 0 if moe.router == "dense" else model.num_layers // moe.layer_frequency


@dataclass(frozen=True)
class ParamGroup:
    """One optimizer group: parameters that the same `replicas` ranks hold, partitioned over them by ZeRO.

    Attributes:
        sizes: elements of each parameter, in the model's order.
        replicas: ranks that reduce its gradients: the world, or the ranks with the same experts.
        is_expert: whether these are experts.
    """

    sizes: tuple[int, ...]
    replicas: int
    is_expert: bool

    @property
    def elements(self) -> int:
        return sum(self.sizes)

    @property
    def padded(self) -> int:
        """Elements of the flat buffer."""
        unit = ALIGNMENT * self.replicas
        return math.ceil(self.elements / unit) * unit

    @property
    def partition(self) -> int:
        """Elements of one rank's share of the optimizer states."""
        return self.padded // self.replicas

    @property
    def touched(self) -> int:
        """Elements of the parameters that lie in a partition, wholly or in part: the most of any rank.

        ZeRO keeps whole gradients of these after a backward pass.
        """
        most = [0] * self.replicas
        start = 0
        for size in self.sizes:
            for rank in range(start // self.partition, (start + size - 1) // self.partition + 1):
                most[rank] += size
            start += size
        return max(most)


def param_groups(
    model: ModelConfig, moe: MoEConfig, vocab_size: int, world_size: int
) -> tuple[ParamGroup, tuple[ParamGroup, ...]]:
    """The group of everything that all ranks share, and the groups of this rank's experts."""
    width, key_value = model.hidden_size, model.kv_heads * model.head_size
    norm = width
    attention = [width * width, width * key_value, width * key_value, width * width]
    ffn = [width * model.d_ffn] * 3
    expert = width * model.d_ffn // moe.granularity
    shared: list[int] = [vocab_size * width]
    experts: list[int] = []
    for layer in range(model.num_layers):
        shared += [norm, *attention, norm]
        if moe.router == "dense" or (layer + 1) % moe.layer_frequency:
            shared += ffn
            continue
        shared += [width * moe.total_experts, *[moe.num_shared_experts * expert] * (3 if moe.num_shared_experts else 0)]
        local = moe.total_experts // moe.ep_size
        experts += [2 * local * expert, local * expert]
    shared += [norm, vocab_size * width]
    groups = [ParamGroup(tuple(sizes), world_size // moe.ep_size, True) for sizes in _split(experts)]
    return ParamGroup(tuple(shared), world_size, False), tuple(groups)


def _split(sizes: list[int]) -> list[list[int]]:
    groups: list[list[int]] = []
    for size in sizes:
        if groups and sum(groups[-1]) + size <= MAX_EXPERT_GROUP:
            groups[-1].append(size)
        else:
            groups.append([size])
    return groups
