"""For tests of one's own: the float64 oracle, the tolerances and the cases that this library is tested with.

The oracle (:mod:`kda_jax.testing.oracle`) and the tolerances need NumPy alone.
"""

from kda_jax.testing import cases as cases
from kda_jax.testing import oracle as oracle
from kda_jax.testing.tolerances import Tolerance as Tolerance
from kda_jax.testing.tolerances import tolerance as tolerance
