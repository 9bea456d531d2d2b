"""Benchmarks over the named shapes of kda_jax.testing.cases: ``python -m benchmarks --help``."""
