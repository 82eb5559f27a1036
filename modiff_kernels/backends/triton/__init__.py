"""Triton kernels for NVIDIA GPUs from sm_80 (A100) on; no compiler is needed on the user's machine."""
