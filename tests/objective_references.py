"""The objectives' definitions written again in numpy, in double precision, without jaxnets or JAX.

On a network with batch statistics, ``z = tanh(norm(x W_1 + b_1)) W_2 + b_2``, by its values alone: gradients are
central differences, those with respect to the input derivatives by a complex step.
"""

import numpy as np

MOMENTUM = 0.5
"""What is left of the averages after a batch."""


def leaves(params):
    """The arrays of `forward` by name, from the parameters of the Linen module."""
    named = {f"{layer}/{name}": array for layer, arrays in params.items() for name, array in arrays.items()}
    return {name: np.asarray(array, np.float64) for name, array in named.items()}


def hidden(params, x):
    return x @ params["Dense_0/kernel"] + params["Dense_0/bias"]


def forward(params, x):
    """Logits in training: normalised by the batch's own mean and variance."""
    h = hidden(params, x)
    centred = h - h.mean(axis=0)
    h = centred / np.sqrt((centred**2).mean(axis=0) + 1e-5) * params["BatchNorm_0/scale"] + params["BatchNorm_0/bias"]
    return np.tanh(h) @ params["Dense_1/kernel"] + params["Dense_1/bias"]


def moved(params, passes):
    """Mean and variance that averages from 0 and 1 come to when the batches ``passes`` have gone through."""
    mean, variance = 0.0, 1.0
    for x in passes:
        h = hidden(params, x)
        mean = MOMENTUM * mean + (1 - MOMENTUM) * h.mean(axis=0)
        variance = MOMENTUM * variance + (1 - MOMENTUM) * h.var(axis=0)
    return mean, variance


def log_softmax(z):
    z = z - z.real.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def cross_entropy(z, y):
    return -log_softmax(z)[np.arange(len(z)), y]


def kl(z, reference):
    """``KL(softmax(reference) || softmax(z))`` of every row."""
    return (np.exp(log_softmax(reference)) * (log_softmax(reference) - log_softmax(z))).sum(axis=1)


def boosted_cross_entropy(z, y):
    p = np.exp(log_softmax(z))
    others = np.where(np.arange(z.shape[1]) == y[:, None], -np.inf, p)
    return cross_entropy(z, y) - np.log(1.0001 - others.max(axis=1) + 1e-12)


def mart_divergence(z, reference, y):
    p, q = np.exp(log_softmax(reference)), np.exp(log_softmax(z))
    return (p * (np.log(p) - np.log(q + 1e-12))).sum(axis=1) * (1.0000001 - p[np.arange(len(y)), y])


def kurakin(losses, is_attacked, weight):
    clean, attacked = losses[~is_attacked], losses[is_attacked]
    return (clean.sum() + weight * attacked.sum()) / (len(clean) + weight * len(attacked))


def input_gradient(params, x, y):
    """Of the summed cross-entropy, by a complex step: exact to rounding."""
    gradient = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        nudged = x.astype(complex)
        nudged[place] += 1e-30j
        gradient[place] = cross_entropy(forward(params, nudged), y).sum().imag / 1e-30
    return gradient


def misalignment(params, x, noisy, y):
    first, second = (input_gradient(params, rows, y) for rows in (x, noisy))
    cosines = (first * second).sum(axis=1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
    return (1 - cosines).mean()


def gradient(value, params, step=1e-5):
    """Of ``value(params)`` with respect to every entry, by central differences of fourth order."""
    found = {}
    for name, array in params.items():
        found[name] = np.zeros_like(array)
        for place in np.ndindex(array.shape):
            at = {}
            for times in (-2, -1, 1, 2):
                changed = array.copy()
                changed[place] += times * step
                at[times] = value({**params, name: changed})
            found[name][place] = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * step)
    return found


def weight_perturbation(params, gradients, gamma):
    """That of AWP."""
    return {
        name: gamma * np.linalg.norm(array) / np.linalg.norm(gradients[name]) * gradients[name] if array.ndim > 1 else 0
        for name, array in params.items()
    }
