"""Settings of every run: virtual devices, hypothesis' profile, and quicker compilation for the files that ask for it."""

import os

import jax
import pytest
from hypothesis import settings

# Eight CPU devices for the sharding tests; read when the CPU backend starts. Accelerators are not touched by it.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

# Where there is no GPU, Triton kernels are made for its interpreter. Read when a kernel's module is imported.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples on every machine; a compilation may take as long as it takes.
settings.register_profile("kda_jax", derandomize=True, max_examples=20, deadline=None, database=None)
settings.load_profile("kda_jax")


@pytest.fixture(scope="module")
def quick_compilation():
    """Compiles without LLVM's optimisations, which takes a third of the time: for files that test transformations, where
    compilation is nearly all of the work. Values, bits and memory are tested as users compile them."""
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
