"""Units: what a neuron does with its weighted sum. Functions of arrays of any shape, elementwise unless said.

Tanh, leaky ReLU and softmax are those of `jax.nn`.
"""

from functools import reduce
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxnets.types import Array

tanh, leaky_relu, softmax = jnp.tanh, jax.nn.leaky_relu, jax.nn.softmax


def relu(x: Array) -> Array:
    """``max(x, 0)``, whose slope at zero is zero.

    As a choice between two arrays: a maximum with a constant, and the normalisation before it, XLA's CPU backend would
    compute again for everything that reads it, for a convolution's gradient by its kernel one number at a time.

    >>> print(relu(jnp.array([-1.0, 2.0, jnp.nan])))
    [ 0.  2. nan]
    """
    # One array to compare with and to choose, as `jnp.where` has not: only so are certificates told of a maximum.
    zero = jnp.zeros_like(x)
    return lax.select(x <= zero, zero, jnp.asarray(x))


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

    Distances are computed in single precision at least.

    Attributes:
      features: number of centres.
      centers_init: of the centres ``[features, N]``; normal with deviation one unless given.
      width: every ``sigma_k`` at first; unless given a multiple of the distance between centres (Bishop 1995, Neural
        networks for pattern recognition, section 5.9): half of its root mean square, so that two bumps meet at one
        deviation. As distances do, it grows with the square root of ``N``: of narrow bumps all are zero everywhere.
      dtype: of the result; that of ``x`` unless given.

    Raises:
      ValueError: for a single centre without a width, and for a width that is not above 0.

    >>> out = RadialBasis(50).init_with_output(jax.random.key(0), jnp.zeros((1, 3072)))[0]
    >>> bool(jnp.allclose(out, jnp.exp(-1.0), atol=0.05))
    True
    """

    features: int
    centers_init: nn.initializers.Initializer = nn.initializers.normal(1.0)
    width: float | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        centers = self.param("centers", self.centers_init, (self.features, x.shape[-1]))
        # By its logarithm a width stays positive under any step.
        log_width = self.param("log_width", self._log_width, centers)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return jnp.exp(-squared_distances(wide, centers) / (2 * jnp.exp(2 * log_width))).astype(self.dtype or x.dtype)

    def _log_width(self, _: Array, centers: Array) -> Array:
        if self.width is None and self.features == 1:
            raise ValueError("a single centre has no distance to others for its width: give RadialBasis a width")
        if self.width is not None and not self.width > 0:
            raise ValueError(f"RadialBasis takes a width above 0, got {self.width}")
        # The mean squared distance of pairs is twice the variance of the sample, summed over inputs.
        width = jnp.sqrt(2 * jnp.sum(jnp.var(centers, axis=0, ddof=1))) / 2 if self.width is None else self.width
        return jnp.full(self.features, jnp.log(width), centers.dtype)


def squared_distances(x: Array, centers: Array) -> Array:
    """``|x_i - c_k|^2`` of ``x[B, N]`` and ``centers[C, N]``: ``[B, C]``, with nothing of the size of ``[B, C, N]``.

    As ``|x|^2 - 2 x c + |c|^2``, a product of matrices, all of the differences from the mean of the centres: where both
    are far from zero digits would be lost.

    >>> print(squared_distances(jnp.array([[3.0, 4.0]]), jnp.array([[0.0, 0.0], [3.0, 3.0]])))
    [[25.  1.]]
    """
    middle = lax.stop_gradient(jnp.mean(centers, axis=0))
    x, centers = x - middle, centers - middle
    products = jnp.dot(x, centers.T, precision=lax.Precision.HIGHEST)
    return jnp.maximum(jnp.sum(x**2, axis=1)[:, None] - 2 * products + jnp.sum(centers**2, axis=1), 0)
