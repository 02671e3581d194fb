"""One-step attacks of training against numpy, and the guard against catastrophic overfitting."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from jax.tree_util import Partial

import jaxnets as jn
from jaxnets.checkpoint import Checkpoints
from jaxnets.diagnostics import CatastrophicOverfittingError, overfitting_guard
from jaxnets.types import Batch

KEY = jax.random.key(0)
TANH = references.TanhMLP(0, inputs=6, hidden=5, classes=3)
X = np.random.default_rng(0).uniform(0.0, 0.3, (4, 6))
Y = np.array([0, 1, 2, 0])


def tanh_mlp(params, x):
    w1, b1, w2, b2 = params
    return jnp.tanh(x @ w1 + b1) @ w2 + b2


class Net:
    """The reference's network under an attack; nothing is trained."""

    @staticmethod
    def logits_fn(params, stats):
        return Partial(tanh_mlp, params)


def attacked(objective):
    batch = Batch(jnp.asarray(X), jnp.asarray(Y))
    params = tuple(map(jnp.asarray, TANH.arrays()))
    return np.asarray(objective.inner(params, {}, batch, KEY))


def stepped(start, step_size):
    """A step of signs from ``start``, unclipped."""
    signs = [np.sign(TANH.cross_entropy_gradient(*row)) for row in zip(start, Y, strict=True)]
    return start + step_size * np.array(signs)


@pytest.fixture
def noise(x64):
    """What is drawn from a ball of radius one, ``[B, n]``."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(len(X)))
    return np.asarray(jax.vmap(lambda key: jax.random.uniform(key, (6,), jnp.float64, -1, 1))(keys))


@pytest.mark.parametrize("start", [jn.attacks.uniform, jn.attacks.uniform_unclipped])
def test_both_published_forms_of_fast(start, noise):
    """One takes the gradient at a start that is cut to the box, the other at one that is not."""
    x_0 = X + 0.2 * noise
    assert (x_0 < 0).any()
    at = np.clip(x_0, 0, 1) if start is jn.attacks.uniform else x_0
    expected = np.clip(stepped(at, 0.25), np.maximum(X - 0.2, 0), X + 0.2)
    found = attacked(jn.objectives.fast(Net, jn.Linf(0.2), start=start))
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_the_forms_differ(noise):
    one, other = (
        attacked(jn.objectives.fast(Net, jn.Linf(0.2), start=start, step_size=0.1))
        for start in (jn.attacks.uniform, jn.attacks.uniform_unclipped)
    )
    assert np.abs(one - other).max() > 0.01


def test_n_fgsm_is_not_clipped_to_the_ball(noise):
    """Noise of twice epsilon and a step of epsilon, cut to the box alone."""
    expected = np.clip(stepped(np.clip(X + 0.2 * noise, 0, 1), 0.1), 0, 1)
    found = attacked(jn.objectives.n_fgsm(Net, jn.Linf(0.1)))
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert np.abs(found - X).max() > 0.25
    stronger = attacked(jn.objectives.n_fgsm(Net, jn.Linf(0.1), noise=3.0, step_size=0.02))
    expected = np.clip(stepped(np.clip(X + 0.3 * noise, 0, 1), 0.02), 0, 1)
    np.testing.assert_allclose(stronger, expected, atol=1e-12)


def test_a_label_smoothing_loss_is_raised_too(noise):
    """Cross-entropy with 90% of the weight on the label has another gradient, and it is that which is followed."""
    loss = jn.losses.smoothed(0.9)
    smoothed = attacked(jn.objectives.fast(Net, jn.Linf(0.2), start=jn.attacks.at_clean, loss=loss))
    plain = attacked(jn.objectives.fast(Net, jn.Linf(0.2), start=jn.attacks.at_clean))
    assert (smoothed != plain).any()


# The guard.


def digits():
    data = jn.data.load("digits").train
    return data, np.asarray(jn.data.to_float(data.images[:256])), data.labels[:256]


def test_the_guard_ends_a_run_that_is_broken_on_purpose(tmp_path):
    """A step of epsilon from the clean rows, with an epsilon of 0.3 on digits: it learns to survive just that."""
    split, x, y = digits()
    net, threat = jn.from_linen(jn.models.MLP((64,))), jn.Linf(0.3)
    attack = partial(jn.attacks.fgsm, threat=threat)
    objective, optimizer = jn.objectives.adversarial(net, attack), optax.adam(3e-3)
    state = jn.training.init_state(KEY, *net.init(KEY, x[:1]), optimizer)
    guard, passed = overfitting_guard(KEY, net, x, y, attack=attack, threat=threat), []

    def watch(state):
        values = guard(state)
        passed.append(int(state.step))
        return values

    mesh = jn.parallel.data_mesh(jax.devices()[:1])
    options = {"epochs": 40, "batch_size": 64, "evaluate": watch, "evaluate_every": 5, "mesh": mesh}
    with pytest.raises(CatastrophicOverfittingError, match=r"survive the attack of training, [0-9.]+% PGD-10") as told:
        jn.fit.fit(jn.training.make_step(objective, optimizer), state, split, folder=tmp_path, **options)
    assert len(passed) >= 1
    stopped = int(str(told.value).split()[1].rstrip(":"))
    assert stopped == passed[-1] + 5 * 22
    newest = Checkpoints(tmp_path / "checkpoints").restore(state)
    assert int(newest.step) == stopped - 22


def test_the_guard_lets_a_sound_network_pass():
    """Trained on nothing, a network survives both attacks as badly; the values are for the log."""
    _, x, y = digits()
    net, threat = jn.from_linen(jn.models.MLP((64,))), jn.Linf(0.1)
    state = jn.training.init_state(KEY, *net.init(KEY, x[:1]), optax.sgd(0.1))
    guard = overfitting_guard(KEY, net, x, y, attack=partial(jn.attacks.fgsm, threat=threat), threat=threat)
    values = guard(state)
    assert list(values) == ["one step", "pgd"]
    assert values == guard(state)
    assert 0 <= values["pgd"] <= values["one step"] <= 1
