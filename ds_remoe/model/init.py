"""Initialisation that depends on the seed and on a parameter's place in the model, on nothing else."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from ds_remoe.moe.layer import MoE


def derive_seed(seed: int, place: str) -> int:
    """A seed in [0, 2^32) for one stream of random numbers of its own; torch's CPU generator uses no more bits."""
    digest = hashlib.blake2b(f"{seed}:{place}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


@torch.no_grad()
def init_weights(module: nn.Module, std: float, seed: int, place: str = "") -> None:
    """Draw every matrix from normal(0, std), set every vector (the norms) to one, and leave MoE layers to themselves.

    Each parameter has a generator of its own on the CPU, so its values depend neither on the order of construction
    nor on the device, the rank, ep_size or the global random state.

    Args:
        module: module whose parameters are set in place.
        std: standard deviation.
        seed: seed of the run.
        place: qualified name of `module` in the model.
    """
    if isinstance(module, MoE):
        module.init_weights(std, derive_seed(seed, place))
        return
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            generator = torch.Generator().manual_seed(derive_seed(seed, f"{place}.{name}"))
            parameter.copy_(torch.empty(parameter.shape, device="cpu").normal_(0.0, std, generator=generator))
    for name, child in module.named_children():
        init_weights(child, std, seed, f"{place}.{name}" if place else name)
