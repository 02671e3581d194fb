"""Gradients against differences of values, in double precision."""

import jax
import numpy as np


def assert_slope(value, gradient, at, random, *, rtol, atol=0.0):
    """The gradient of ``value`` at a pytree, along a direction that ``random`` draws, is the central difference."""
    direction = jax.tree.map(lambda leaf: random.normal(size=leaf.shape), at)
    ahead, behind = (value(jax.tree.map(lambda a, d: a + h * d, at, direction)) for h in (1e-6, -1e-6))  # noqa: B023
    slope = sum(jax.tree.leaves(jax.tree.map(np.vdot, gradient, direction)))
    np.testing.assert_allclose(slope, (ahead - behind) / 2e-6, rtol=rtol, atol=atol)
