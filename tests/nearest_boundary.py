"""How far the nearest decision boundary of a linear model is, inside the box: in numpy, in double precision."""

import numpy as np


def to_halfspace(order, w, need, x, lower, upper):
    """The least norm of ``d`` with ``w . d >= need`` and ``x + d`` in the box; infinite where there is none."""
    room = np.where(w > 0, upper - x, x - lower)
    if need <= 0:
        return 0.0
    if np.abs(w) @ room < need:
        return np.inf
    if order == 0:
        gains = np.sort(np.abs(w) * room)[::-1]
        return float(np.searchsorted(np.cumsum(gains), need * (1 - 1e-12)) + 1)
    if order == 1:
        spent = 0.0
        for i in np.argsort(-np.abs(w)):
            step = min(room[i], need / max(abs(w[i]), 1e-300))
            spent, need = spent + step, need - abs(w[i]) * step
            if need <= 1e-15:
                return spent

    def change(t):
        return np.minimum(t if order == np.inf else t * np.abs(w), room)

    low, high = 0.0, 1.0
    while np.abs(w) @ change(high) < need:
        high *= 2
        if high > 1e300:
            break
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if np.abs(w) @ change(middle) >= need else (middle, high)
    return np.linalg.norm(change(high), order)


def of_classes(order, weights, bias, x, y, lower=0.0, upper=1.0):
    """Where another class of ``x @ weights + bias`` leads ``y``: the nearest of ``K - 1`` hyperplanes."""
    logits = x @ weights + bias
    return min(
        to_halfspace(order, weights[:, k] - weights[:, y], logits[y] - logits[k], x, lower, upper)
        for k in range(weights.shape[1])
        if k != y
    )
