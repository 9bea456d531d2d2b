"""Device code, one folder a technology; installed as kda_jax.kernels. A kernel knows nothing of JAX tracing."""
