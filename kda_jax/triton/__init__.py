"""Callers of the Triton kernels in kda_jax.kernels.triton: arrays in, one custom call out, through jax-triton."""
