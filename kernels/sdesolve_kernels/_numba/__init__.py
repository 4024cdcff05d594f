"""Hand-written Numba kernels for CPU tensors. Importing a module of this package imports numba."""
