"""Plain JAX implementations: every platform, shape and dtype, and the reference for the kernels.

Each takes the operands and the spec that the operation binds and returns the operation's outputs.
"""
