"""Triton kernels, each beside its plain-torch twin, behind one function that picks."""

from ds_remoe.kernels.swiglu import weighted_swiglu, weighted_swiglu_backward

__all__ = ["weighted_swiglu", "weighted_swiglu_backward"]
