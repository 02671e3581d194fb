"""Auto-PGD of one flat row in numpy, in double precision: by lists of all that happened, without jaxnets or JAX."""

import math

import numpy as np
import references


def looks(steps):
    """After which steps step sizes are looked at, from the integers of the published code."""
    interval, places = max(int(0.22 * steps), 1), []
    while sum(places) + interval <= steps:
        places.append(interval)
        interval = max(interval - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
    return list(np.cumsum(places))


def halving(order, loss, gradient, x, x_0, *, epsilon, steps, lower, upper):
    """Every iterate, the length of every step, and the points of the highest loss so far. The paper's algorithm 1."""
    project = lambda z: references.project(order, z, x, epsilon, lower, upper)  # noqa: E731
    iterates, begun, lengths, highest = [x_0], [], [2 * epsilon], [x_0]
    risen, last, halved = [], 0, False
    for step in range(steps):
        at = iterates[-1]
        if step in looks(steps):
            few = sum(risen[last:]) < 0.75 * (step - last)
            stuck = not halved and loss(highest[step]) == loss(highest[last])
            halved, last = few or stuck, step
            if halved:
                at = highest[-1]
                lengths[-1] /= 2
        z = project(at + lengths[-1] * references.direction(order, gradient(at), at, lower, upper))
        if begun:
            z = project(at + 0.75 * (z - at) + 0.25 * (at - begun[-1]))
        begun.append(at)
        risen.append(loss(z) > loss(at))
        iterates.append(z)
        lengths.append(lengths[-1])
        highest.append(max(highest[-1], z, key=loss))
    return iterates, lengths[:-1], highest


def sparse(loss, gradient, x, x_0, *, epsilon, steps, every, lower, upper):
    """One phase of l1-APGD: every iterate, how many entries each step took and its length, and the highest points."""
    project = lambda z: references.project(1, z, x, epsilon, lower, upper)  # noqa: E731
    changed = np.count_nonzero(x_0 != x)
    taken, support = (math.ceil(changed / 1.5), changed) if changed else (math.ceil(x.size / 5), x.size)
    iterates, highest, entries, lengths, length = [x_0], [x_0], [], [], epsilon
    for step in range(steps):
        at = iterates[-1]
        if step > 0 and step % every == 0:
            now = np.count_nonzero(highest[-1] != x)
            if now < 0.95 * support:
                at, length = highest[-1], epsilon
            else:
                length = max(length / 1.5, epsilon / 10)
            taken, support = max(math.ceil(now / 1.5), 1), now
        slope = gradient(at)
        chosen = np.argsort(-np.abs(slope))[:taken]
        move = np.zeros_like(x)
        move[chosen] = np.sign(slope[chosen])
        z = project(at + length * move / max(np.abs(move).sum(), 1))
        iterates.append(z)
        entries.append(taken)
        lengths.append(length)
        highest.append(max(highest[-1], z, key=loss))
    return iterates, entries, lengths, highest
