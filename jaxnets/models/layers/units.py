"""Units: what a neuron does with its weighted sum. Functions of arrays of any shape, elementwise unless said.

Tanh, ReLU, leaky ReLU and softmax are those of `jax.nn`.
"""

from functools import reduce

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnets.types import Array

tanh, relu, leaky_relu, softmax = jnp.tanh, jax.nn.relu, jax.nn.leaky_relu, jax.nn.softmax


def identity(x: Array) -> Array:
    """``x``: a linear unit."""
    return x


@jax.custom_jvp
def threshold(x: Array) -> Array:
    """One where ``x >= 0``, zero elsewhere: McCulloch and Pitts 1943.

    Its derivative is zero almost everywhere. In its place stands that of the identity, the straight-through estimate
    (Bengio et al. 2013, https://arxiv.org/abs/1308.3432), so that such units can be trained.

    >>> print(threshold(jnp.array([-0.5, 0.0, 2.0])), jax.grad(threshold)(0.3))
    [0. 1. 1.] 1.0
    """
    return jnp.where(jnp.asarray(x) >= 0, jnp.ones_like(x), 0)


threshold.defjvp(lambda primals, tangents: (threshold(*primals), tangents[0]))


def piecewise_linear(x: Array) -> Array:
    """``min(max(x + 1/2, 0), 1)``: a ramp of slope one between the two values of `threshold`.

    >>> print(piecewise_linear(jnp.array([-1.0, 0.0, 0.25, 1.0])))
    [0.   0.5  0.75 1.  ]
    """
    return jnp.clip(x + 0.5, 0, 1)


def logistic(x: Array, alpha: float = 1.0) -> Array:
    """``1 / (1 + exp(-alpha x))``: a sigmoid whose slope at zero is ``alpha / 4``; `threshold` for large ``alpha``.

    >>> print(logistic(jnp.array([0.0, 100.0]), alpha=2.0))
    [0.5 1. ]
    """
    return jax.nn.sigmoid(alpha * x)


def maxout(x: Array, pieces: int = 2) -> Array:
    """The maximum of each ``pieces`` neighbours on the last axis, which becomes as many times shorter.

    After a dense layer or a convolution: the largest of as many linear functions (Goodfellow et al. 2013,
    https://arxiv.org/abs/1302.4389).

    Raises:
      ValueError: where the axis is no multiple of ``pieces``.

    >>> print(maxout(jnp.array([1.0, 3.0, -2.0, -5.0])))
    [ 3. -2.]
    """
    if x.shape[-1] % pieces:
        raise ValueError(f"maxout takes a multiple of {pieces} features, got {x.shape[-1]}")
    return reduce(jnp.maximum, [x[..., piece::pieces] for piece in range(pieces)])


class RadialBasis(nn.Module):
    """Gaussian radial basis functions: ``exp(-|x - c_k|^2 / (2 sigma_k^2))``, of ``x[B, N]`` for each centre ``c_k``.

    Attributes:
      features: number of centres.
      centers_init: of the centres ``[features, N]``; normal with deviation one unless given.
      width: every ``sigma_k`` at first.
    """

    features: int
    centers_init: nn.initializers.Initializer = nn.initializers.normal(1.0)
    width: float = 1.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        centers = self.param("centers", self.centers_init, (self.features, x.shape[-1]))
        # By its logarithm a width stays positive under any step.
        log_width = self.param("log_width", nn.initializers.constant(jnp.log(self.width)), (self.features,))
        squared = jnp.sum((x[:, None] - centers) ** 2, axis=-1)
        return jnp.exp(-squared / (2 * jnp.exp(2 * log_width)))
