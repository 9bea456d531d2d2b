"""Caller of the Pallas kernel in kda_jax.kernels.pallas, on the Mosaic GPU backend (sm90 up)."""
