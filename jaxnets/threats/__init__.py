"""Threats: what an attacker may do to one example, a norm ball around it inside the box of valid data.

A threat works on one example of any shape; `each_row` lifts its verbs to a batch. ``epsilon`` is a pytree leaf in the
units of the data, so one compiled program serves every epsilon, and `jax.vmap` over a threat sweeps it; the box is
static.
"""

from jaxnets.threats.balls import L0, L1, L2, Linf
from jaxnets.threats.masked import Masked
from jaxnets.threats.rows import a_row, check_one_a_row, each_row, sizes
from jaxnets.threats.threat import Threat

__all__ = ["L0", "L1", "L2", "Linf", "Masked", "Threat", "a_row", "check_one_a_row", "each_row", "sizes"]
