"""Kernels, each beside its plain-torch twin, behind one function that picks."""
