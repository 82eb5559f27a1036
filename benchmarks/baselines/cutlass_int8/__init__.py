"""CUTLASS's int8 kernels as a baseline of the products: build.py compiles them, kernels.py calls them."""
