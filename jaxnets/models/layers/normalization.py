"""Normalisation layers, with settings in the terms of their papers."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from jaxnets.types import Array


class BatchNorm(nn.Module):
    """``scale (x - mean) / sqrt(var + eps) + bias``, each channel by itself.

    In training by the mean and the variance of the batch, over rows and places; the running ones, which inference uses,
    move by ``running = (1 - momentum) running + momentum batch``, the variance as that of a sample (divided by
    ``n - 1``). Statistics are in single precision at least.

    Attributes:
      momentum: weight of the batch in the running statistics: PyTorch's, and one minus that of `flax.linen.BatchNorm`.
      eps: added to the variance.
      dtype: of the result; that of ``x`` unless given.

    Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167.

    >>> import jax
    >>> x = jnp.array([[1.0], [3.0]])
    >>> BatchNorm().init_with_output(jax.random.key(0), x, train=True)[0].round(3).ravel().tolist()
    [-1.0, 1.0]
    """

    momentum: float = 0.1
    eps: float = 1e-5
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        features, wide = x.shape[-1:], x.astype(jnp.promote_types(x.dtype, jnp.float32))
        scale, bias = (
            self.param("scale", nn.initializers.ones, features),
            self.param("bias", nn.initializers.zeros, features),
        )
        mean = self.variable("batch_stats", "mean", jnp.zeros, features)
        var = self.variable("batch_stats", "var", jnp.ones, features)
        center, spread = mean.value, var.value
        if train:
            axes = range(x.ndim - 1)
            center = jnp.mean(wide, axes)
            spread = jnp.mean((wide - center) ** 2, axes)
            if not self.is_initializing():
                count = x.size // x.shape[-1]
                mean.value += self.momentum * (center - mean.value)
                var.value += self.momentum * (spread * (count / max(count - 1, 1)) - var.value)
        out = (wide - center) * (scale * lax.rsqrt(spread + self.eps)) + bias
        return out.astype(self.dtype or x.dtype)


def local_response_norm(x: Array, size: int = 5, k: float = 2.0, alpha: float = 1e-4, beta: float = 0.75) -> Array:
    """``x_i / (k + alpha sum_j x_j^2)^beta`` over the ``size`` channels ``j`` around channel ``i``: AlexNet's.

    PyTorch's ``LocalResponseNorm`` divides its ``alpha`` by ``size``, this one does not.

    Krizhevsky et al. 2012, ImageNet classification with deep convolutional neural networks.

    >>> print(local_response_norm(jnp.array([3.0, 4.0, 0.0]), size=3, k=0.0, alpha=1.0, beta=0.5))
    [0.6 0.8 0. ]
    """
    before, wide = size // 2, x.astype(jnp.promote_types(x.dtype, jnp.float32))
    squares = jnp.pad(wide**2, [(0, 0)] * (x.ndim - 1) + [(before, size - 1 - before)])
    around = sum(squares[..., n : n + x.shape[-1]] for n in range(size))
    return (wide / (k + alpha * around) ** beta).astype(x.dtype)


LayerNorm = partial(nn.LayerNorm, epsilon=1e-5)
"""`flax.linen.LayerNorm` with PyTorch's epsilon: mean 0 and variance 1 over the last axis, then scale and bias."""
