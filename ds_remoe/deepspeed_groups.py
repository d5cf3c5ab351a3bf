"""What DeepSpeed calls its process groups, checked against DeepSpeed 0.19.8."""

from __future__ import annotations

import torch.distributed as dist
from deepspeed.utils import groups


def expert_parallel_group(name: str) -> dist.ProcessGroup | None:
    """This rank's group of a name such as "ep_size_2"; None before it was made."""
    group: dist.ProcessGroup | None = groups._get_expert_parallel_group_dict().get(name)
    return group


def group_label(group: dist.ProcessGroup) -> str:
    """A name for messages: "all ranks", DeepSpeed's own such as "ep_size_2", or torch's name of another group."""
    for label, found in groups._get_expert_parallel_group_dict().items():
        if found is group:
            return str(label)
    # One rank in each expert-parallel group may make this the world again; the experts' name says more.
    for label, found in groups._get_expert_data_parallel_group_dict().items():
        if found is group:
            return f"data-parallel group of {label}"
    if dist.is_initialized() and dist.get_world_size(group) == dist.get_world_size():
        return "all ranks"
    return f"group {group.group_name}"
