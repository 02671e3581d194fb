"""VAT's direction against the divergence's Hessian, its value and gradient against numpy, rows without labels."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import objective_references as ref
import pytest
from test_objective_contract import KEY, NET, problem

import jaxnets as jn
from jaxnets.objectives import virtual_adversarial
from jaxnets.types import Batch

FREE = jn.L2(0.3, -jnp.inf, jnp.inf)


def perturbation(iterations):
    params, stats, batch = problem()
    objective = virtual_adversarial(NET, FREE, iterations=iterations)
    return np.asarray(jax.jit(objective.inner)(params, stats, batch, KEY) - batch.x)


def hessians():
    """Of every row's divergence in its perturbation, at zero."""
    params, stats, batch = problem()
    model = NET.logits_fn(params, stats)

    def divergence(r, row):
        return jn.losses.kl(model((row + r)[None])[0], model(row[None])[0])

    return np.asarray(jax.jit(jax.vmap(jax.hessian(divergence)))(jnp.zeros_like(batch.x), batch.x))


def test_many_iterations_find_the_first_eigenvector(x64):
    values, vectors = np.linalg.eigh(hessians())
    assert (values[:, -1] > 1.5 * values[:, -2]).all()
    r = perturbation(60)
    np.testing.assert_allclose(np.linalg.norm(r, axis=1), 0.3, rtol=1e-9)
    cosines = np.abs((r * vectors[:, :, -1]).sum(axis=1)) / 0.3
    np.testing.assert_allclose(cosines, 1, rtol=1e-6)


def test_one_iteration_is_the_papers_difference(x64):
    """``H d`` for the random ``d``, and the gradient of the divergence at ``xi d``, which the paper takes for it."""
    _, _, batch = problem()
    noise = jax.vmap(lambda key: jax.random.normal(key, (4,), jnp.float64))
    d = np.asarray(noise(jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(len(batch.x)))))
    d = d / np.linalg.norm(d, axis=1, keepdims=True)
    expected = np.einsum("bij,bj->bi", hessians(), d)
    found = perturbation(1)
    np.testing.assert_allclose(found, 0.3 * expected / np.linalg.norm(expected, axis=1, keepdims=True), rtol=1e-8)
    params, stats, _ = problem()
    model = NET.logits_fn(params, stats)
    near = jax.jit(jax.grad(lambda x: jn.losses.kl(model(x), model(batch.x)).sum()))(batch.x + 1e-5 * d)
    np.testing.assert_allclose(found, 0.3 * near / np.linalg.norm(near, axis=1, keepdims=True), atol=1e-4)


def test_value_gradient_and_statistics_are_those_of_numpy(x64):
    """The clean prediction is fixed in the divergence; the second and the last row have no label."""
    params, stats, batch = problem()
    batch = batch._replace(y=batch.y.at[jnp.array([1, 5])].set(-1))
    objective = virtual_adversarial(NET, FREE, weight=0.7)

    @jax.jit
    def run(params):
        examples = objective.inner(params, stats, batch, jax.random.split(KEY)[0])
        return examples, *jax.value_and_grad(objective, has_aux=True)(params, stats, batch, KEY)

    x_adv, (value, (moved, metrics)), gradient = run(params)
    x, x_adv, y = map(np.asarray, (batch.x, x_adv, batch.y))
    arrays = ref.leaves(params)
    fixed = ref.forward(arrays, x)

    def at(arrays):
        labelled = ref.cross_entropy(ref.forward(arrays, x), y)[y >= 0]
        return labelled.mean() + 0.7 * ref.kl(ref.forward(arrays, x_adv), fixed).mean()

    np.testing.assert_allclose(value, at(arrays), rtol=1e-12)
    expected = ref.gradient(at, arrays)
    for name, found in ref.leaves(gradient).items():
        np.testing.assert_allclose(found, expected[name], rtol=1e-7, atol=1e-9)
    mean, _ = ref.moved(arrays, [x])
    np.testing.assert_allclose(moved["batch_stats"]["BatchNorm_0"]["mean"], mean, rtol=1e-10)
    right = fixed.argmax(axis=1) == y
    np.testing.assert_allclose(metrics["accuracy"], right.sum() / 4)


def test_rows_without_any_label(x64):
    params, stats, batch = problem()
    objective = virtual_adversarial(NET, FREE)
    value, (_, metrics) = jax.jit(objective)(params, stats, Batch(batch.x, jnp.full(6, -1)), KEY)
    assert value == metrics["divergence"] > 0
    assert metrics["accuracy"] == 0


def test_rows_without_a_label_among_distributions(x64):
    """Their likeliest class is the first; so is what the network says of all rows here."""
    params, stats, batch = problem()
    params = jax.tree.map(jnp.zeros_like, params)
    y = jnp.full((6, 3), -1.0).at[0].set(jnp.array([1.0, 0.0, 0.0])).at[1].set(jnp.array([0.0, 1.0, 0.0]))
    _, (_, metrics) = virtual_adversarial(NET, FREE)(params, stats, Batch(batch.x, y), KEY)
    assert metrics["accuracy"] == 0.5


@pytest.mark.parametrize("loss", [jn.losses.cross_entropy, jn.losses.dlr])
def test_gradients_of_rows_without_a_label_are_those_of_the_others(x64, loss):
    """A loss of no class is NaN, and behind a mask its gradient would be as well."""
    params, stats, batch = problem()
    y = jnp.where(jnp.arange(6) < 4, batch.y, -1)
    run = jax.jit(jax.grad(virtual_adversarial(NET, FREE, weight=0.0, loss=loss), has_aux=True))
    found, _ = run(params, stats, Batch(batch.x, y), KEY)

    def labelled(params):
        logits, _ = NET.train(params, stats, batch.x, KEY)
        return jnp.mean(loss(logits[:4], batch.y[:4]))

    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9), found, jax.grad(labelled)(params))


def test_at_least_one_iteration():
    with pytest.raises(ValueError, match="virtual_adversarial takes at least one step, got steps=0"):
        virtual_adversarial(NET, FREE, iterations=0)
