"""Hand-written Triton kernels for GPUs, and the launchers that the ops call."""
