"""For tests of one's own: the float64 oracle, the tolerances and the cases that this library is tested with.

The oracles (:mod:`kda_jax.testing.oracle`, :mod:`kda_jax.testing.oracle_q8_0`) and the tolerances need NumPy alone.
"""

from kda_jax.testing import cases as cases
from kda_jax.testing import oracle as oracle
from kda_jax.testing import oracle_q8_0 as oracle_q8_0
from kda_jax.testing.tolerances import Tolerance as Tolerance
from kda_jax.testing.tolerances import tolerance as tolerance
