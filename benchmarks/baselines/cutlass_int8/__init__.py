"""CUTLASS's int8 kernels as a baseline: build.py compiles them, kernels.py calls them."""
