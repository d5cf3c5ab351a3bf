"""The MoE layer in pieces: routers, sparsity control, dispatch, experts, layer, and the gate for DeepSpeed's layer."""

from ds_remoe.moe.experts import SwiGLU
from ds_remoe.moe.gate import ReLUGate
from ds_remoe.moe.layer import MoE
from ds_remoe.moe.sparsity import SignRule, SparsityController
from ds_remoe.moe.statistics import RoutingReport

__all__ = ["MoE", "ReLUGate", "RoutingReport", "SignRule", "SparsityController", "SwiGLU"]
