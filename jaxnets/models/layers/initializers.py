"""Initialisers of kernels, by the names of those who found them, with the variance that keeps a signal's size.

Normal, cut off at two deviations and scaled to that variance. With ``n`` inputs and ``m`` outputs of a unit: LeCun's is
``1 / n``, for units of slope one at zero (LeCun et al. 1998, Efficient backprop); Glorot's ``2 / (n + m)``, which keeps
that of gradients too (Glorot and Bengio 2010); He's ``2 / n``, for ReLU (He et al. 2015,
https://arxiv.org/abs/1502.01852). Orthogonal ones, which are no such draws, keep every length (Saxe et al. 2014,
https://arxiv.org/abs/1312.6120).
"""

import flax.linen as nn

lecun = nn.initializers.lecun_normal()
glorot = nn.initializers.glorot_normal()
he = nn.initializers.he_normal()
orthogonal = nn.initializers.orthogonal()
