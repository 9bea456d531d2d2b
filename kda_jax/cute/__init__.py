"""Callers of the CuTe DSL kernels in kda_jax.kernels.cute, compiled ahead of time and run as XLA custom calls (sm90 up)."""
