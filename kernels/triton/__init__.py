"""Triton kernels of the decode family, for NVIDIA GPUs from sm80 up."""
