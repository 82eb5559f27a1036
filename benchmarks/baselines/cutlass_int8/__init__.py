"""CUTLASS's int8 kernels as a rival of the products: build.py compiles them, rival.py calls them."""
