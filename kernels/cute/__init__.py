"""CuTe DSL kernels: each module has ``launch`` and says by ``operands`` which arrays it takes."""
