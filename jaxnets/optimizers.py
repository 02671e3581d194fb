"""Learning rate schedules by the field's names; optimizers are optax's own."""

import jax.numpy as jnp
import optax


def triangular(peak: float, total_steps: int, *, top: float = 0.4) -> optax.Schedule:
    """From 0 up to ``peak`` at ``top * total_steps``, and down to 0 at ``total_steps``: one cycle of the cyclic rate.

    Step ``t`` (0, 1, ...) takes the value at ``t + 1``, so that no step but the last is taken at rate 0. On CIFAR-10
    Wong et al. have ``top`` at 0.5.

    Smith 2017, https://arxiv.org/abs/1506.01186; Wong et al. 2020, https://arxiv.org/abs/2001.03994.

    >>> schedule = triangular(1.0, 10)
    >>> print([round(float(schedule(step)), 3) for step in range(10)])
    [0.25, 0.5, 0.75, 1.0, 0.833, 0.667, 0.5, 0.333, 0.167, 0.0]
    """

    def schedule(count):
        return jnp.interp(count + 1.0, jnp.array([0, top * total_steps, total_steps]), jnp.array([0, peak, 0]))

    return schedule
