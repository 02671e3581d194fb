"""What the tests compare with: the definitions written again in numpy, in double precision, without jaxnets or JAX."""

import math

import numpy as np

ORDERS = {"Linf": np.inf, "L2": 2, "L1": 1, "L0": 0}
"""Norm of each threat, by the name of its class."""


def norm(order, delta):
    """Norms of the rows of ``delta[B, ...]``, in double precision."""
    return np.linalg.norm(np.asarray(delta, np.float64).reshape(len(delta), -1), order, axis=1)


def dual(order):
    """For L0 that of steps of one unit in one coordinate."""
    return {np.inf: 1, 2: 2, 1: np.inf, 0: np.inf}[order]


def assert_inside(threat, x_adv, x, tolerance=1e-6):
    """``x_adv[B, ...]`` is finite, in the box, and in the ball around ``x``; epsilon is a scalar or ``[B]``."""
    x_adv, x = np.asarray(x_adv, np.float64), np.asarray(x, np.float64)
    epsilon = np.asarray(threat.epsilon, np.float64)
    assert np.isfinite(x_adv).all()
    assert x_adv.min() >= threat.lower - 1e-6, f"below the box by {threat.lower - x_adv.min()}"
    assert x_adv.max() <= threat.upper + 1e-6, f"above the box by {x_adv.max() - threat.upper}"
    excess = norm(ORDERS[type(threat).__name__], x_adv - x) - epsilon
    assert (excess <= tolerance * np.maximum(1, epsilon)).all(), f"outside the ball by {excess.max()}"


# Projections of one flat example.


def project_ball(order, offset, epsilon):
    """The nearest point of the ball around 0, in closed form."""
    if order == np.inf:
        return np.clip(offset, -epsilon, epsilon)
    if order == 2:
        return offset * min(1, epsilon / max(np.linalg.norm(offset), 1e-300))
    if np.abs(offset).sum() <= epsilon:
        return offset
    # Duchi et al. 2008: the threshold from the sorted magnitudes.
    falling = np.sort(np.abs(offset))[::-1]
    excess = (np.cumsum(falling) - epsilon) / np.arange(1, len(falling) + 1)
    threshold = excess[np.nonzero(falling > excess)[0][-1]]
    return np.sign(offset) * np.maximum(np.abs(offset) - threshold, 0)


def project_dykstra(order, z, x, epsilon, lower, upper, rounds=3000):
    """The nearest point of ball and box by Dykstra's alternating projections on each."""
    point = np.asarray(z, np.float64)
    from_ball = from_box = np.zeros_like(point)
    for _ in range(rounds):
        in_ball = x + project_ball(order, point + from_ball - x, epsilon)
        from_ball = point + from_ball - in_ball
        point = np.clip(in_ball + from_box, lower, upper)
        from_box = in_ball + from_box - point
    return point


def project(order, z, x, epsilon, lower, upper):
    """The nearest point of ball and box by bisection on the multiplier of the ball's constraint."""
    z, x = np.asarray(z, np.float64), np.asarray(x, np.float64)
    if order == np.inf:
        return np.clip(z, np.maximum(x - epsilon, lower), np.minimum(x + epsilon, upper))
    if order == 0:
        boxed = np.clip(z, lower, upper)
        saved = (boxed - x) * ((z - x) + (z - boxed))  # (z - x)^2 - (z - boxed)^2
        dearest = np.argsort(-saved.ravel(), kind="stable")[: int(epsilon)]
        point = x.copy()
        point.ravel()[dearest] = boxed.ravel()[dearest]
        return point

    def at(multiplier):
        if order == 2:
            return np.clip((z + multiplier * x) / (1 + multiplier), lower, upper)
        offset = z - x
        return np.clip(x + np.sign(offset) * np.maximum(np.abs(offset) - multiplier, 0), lower, upper)

    def fits(multiplier):
        return np.linalg.norm((at(multiplier) - x).ravel(), order) <= epsilon

    if fits(0.0):
        return at(0.0)
    low, high = 0.0, 1.0
    while not fits(high) and high < 1e18:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return at(high)


def direction(order, gradient, x, lower, upper):
    """The steepest direction of size one at ``x`` among those that do not leave the box."""
    gradient = np.where(((x >= upper) & (gradient > 0)) | ((x <= lower) & (gradient < 0)), 0, gradient)
    if not gradient.any():
        return np.zeros_like(gradient)
    if order == np.inf:
        return np.sign(gradient)
    if order == 2:
        return gradient / np.linalg.norm(gradient)
    chosen = np.zeros_like(gradient)
    largest = np.unravel_index(np.argmax(np.abs(gradient)), gradient.shape)
    chosen[largest] = np.sign(gradient[largest])
    return chosen


# Losses of one row of logits.


def log_softmax(z):
    z = np.asarray(z, np.float64)
    z = z - z.max()
    return z - math.log(math.fsum(np.exp(z)))


def cross_entropy(z, y):
    return -log_softmax(z)[y]


def soft_cross_entropy(z, p):
    return -math.fsum(np.asarray(p, np.float64) * log_softmax(z))


def margin(z, y):
    z = np.asarray(z, np.float64)
    return np.delete(z, y).max() - z[y]


def dlr(z, y):
    first, _, third = np.sort(np.asarray(z, np.float64))[::-1][:3]
    return margin(z, y) / (first - third if first > third else 1)


def kl(z, reference):
    log_p, log_q = log_softmax(reference), log_softmax(z)
    return math.fsum(np.exp(log_p) * (log_p - log_q))


# A network with one hidden layer, its gradients by hand, and PGD on it, one row at a time.


class TanhMLP:
    """``z = tanh(x W_1 + b_1) W_2 + b_2`` of one flat row."""

    def __init__(self, seed, inputs, hidden, classes):
        random = np.random.default_rng(seed)
        self.w1 = random.normal(size=(inputs, hidden)) / np.sqrt(inputs)
        self.b1 = random.normal(size=hidden)
        self.w2 = random.normal(size=(hidden, classes)) / np.sqrt(hidden)
        self.b2 = random.normal(size=classes)

    def arrays(self):
        return self.w1, self.b1, self.w2, self.b2

    def logits(self, x):
        return np.tanh(x @ self.w1 + self.b1) @ self.w2 + self.b2

    def cross_entropy_gradient(self, x, y):
        """The gradient of cross-entropy with respect to ``x``."""
        hidden = np.tanh(x @ self.w1 + self.b1)
        error = np.exp(log_softmax(hidden @ self.w2 + self.b2))
        error[y] -= 1
        return self.w1 @ ((self.w2 @ error) * (1 - hidden**2))


def pgd(order, net, x, y, *, epsilon, steps, step_size, lower, upper, sign=1):
    """PGD on cross-entropy from the clean row: every iterate, and which of them is best. ``sign=-1`` is targeted."""
    iterates = [np.asarray(x, np.float64)]
    for _ in range(steps):
        gradient = sign * net.cross_entropy_gradient(iterates[-1], y)
        moved = iterates[-1] + step_size * direction(order, gradient, iterates[-1], lower, upper)
        iterates.append(project(order, moved, x, epsilon, lower, upper))

    def rank(point):
        logits = net.logits(point)
        return (logits.argmax() == y) == (sign < 0), sign * cross_entropy(logits, y)

    return iterates, max(iterates, key=rank)
