"""ds_remoe: train ReLU-routed mixture-of-experts language models (ReMoE, arXiv 2412.14711) with DeepSpeed."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_remoe.model.exported import load_exported
    from ds_remoe.moe.experts import SwiGLU
    from ds_remoe.moe.gate import ReLUGate
    from ds_remoe.moe.layer import MoE
    from ds_remoe.moe.sparsity import SparsityController
    from ds_remoe.training.engine import initialize

__version__ = "0.1.0"
__all__ = ["MoE", "ReLUGate", "SparsityController", "SwiGLU", "__version__", "initialize", "load_exported"]

_HOMES = {
    "MoE": "ds_remoe.moe.layer",
    "ReLUGate": "ds_remoe.moe.gate",
    "SparsityController": "ds_remoe.moe.sparsity",
    "SwiGLU": "ds_remoe.moe.experts",
    "initialize": "ds_remoe.training.engine",
    "load_exported": "ds_remoe.model.exported",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that `ds-remoe config check` answers without importing torch and deepspeed.
    if name not in _HOMES:
        raise AttributeError(f"module 'ds_remoe' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
