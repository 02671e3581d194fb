"""Layers that the networks share: units, convolution, pooling, normalisation, and blocks of them.

Dropout is Flax's own.
"""

from flax.linen import Dropout

from jaxnets.models.layers.blocks import ConvBlock, DenseHead, conv_chain, in_turn, remat_if
from jaxnets.models.layers.convolution import Conv, conv_general_dilated
from jaxnets.models.layers.dense import Dense, dot_general
from jaxnets.models.layers.initializers import glorot, he, lecun, orthogonal
from jaxnets.models.layers.normalization import BatchNorm, LayerNorm, local_response_norm
from jaxnets.models.layers.pooling import adaptive_avg_pool, avg_pool, flatten, max_pool
from jaxnets.models.layers.units import (
    RadialBasis,
    identity,
    leaky_relu,
    logistic,
    maxout,
    piecewise_linear,
    relu,
    softmax,
    tanh,
    threshold,
)

__all__ = [
    "BatchNorm", "Conv", "ConvBlock", "Dense", "DenseHead", "Dropout", "LayerNorm", "RadialBasis",
    "adaptive_avg_pool", "avg_pool", "conv_chain", "conv_general_dilated", "dot_general", "flatten", "glorot", "he",
    "identity", "in_turn", "leaky_relu", "lecun", "local_response_norm", "logistic", "max_pool", "maxout", "orthogonal",
    "piecewise_linear", "relu", "remat_if", "softmax", "tanh", "threshold",
]  # fmt: skip
