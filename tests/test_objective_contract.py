"""What holds for every objective: its value, gradient, and statistics against numpy; its compiled program."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import objective_references as ref
import pytest
from test_training import collectives, in_loops

import jaxnets as jn
from jaxnets import parallel
from jaxnets.objectives import statistics
from jaxnets.types import Batch

KEY = jax.random.key(0)
THREAT = jn.Linf(0.1)


class Normed(nn.Module):
    """The network of the references."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=ref.MOMENTUM)(nn.Dense(5)(x))
        return nn.Dense(3)(jnp.tanh(x))


NET = jn.from_linen(Normed())


def shifted(key, logits_fn, x, target, **options):
    """An attack that asks for nothing."""
    return x + 0.1 * jnp.cos(3 * jnp.arange(x.size).reshape(x.shape))


def problem():
    """Parameters, statistics and a batch, in double precision where that is on."""
    random = np.random.default_rng(0)
    params = {
        "Dense_0": {"kernel": random.normal(size=(4, 5)) / 2, "bias": random.normal(size=5)},
        "BatchNorm_0": {"scale": random.uniform(0.5, 2, 5), "bias": random.normal(size=5)},
        "Dense_1": {"kernel": random.normal(size=(5, 3)) / 2, "bias": random.normal(size=3)},
    }
    stats = {"batch_stats": {"BatchNorm_0": {"mean": np.zeros(5), "var": np.ones(5)}}}
    batch = Batch(random.uniform(0.2, 0.8, (6, 4)), np.array([0, 2, 1, 1, 0, 2]))
    return jax.tree.map(jnp.asarray, (params, stats, batch))


# Each objective, its value in numpy given the examples, and the batches that move its statistics.


def on_attacked(params, x, examples, y):
    return ref.cross_entropy(ref.forward(params, examples), y).mean()


def trades(params, x, examples, y):
    z, attacked = ref.forward(params, x), ref.forward(params, examples)
    return ref.cross_entropy(z, y).mean() + 2 * ref.kl(attacked, z).mean()


def mart(params, x, examples, y):
    z, attacked = ref.forward(params, x), ref.forward(params, examples)
    return ref.boosted_cross_entropy(attacked, y).mean() + 2 * ref.mart_divergence(attacked, z, y).mean()


def kurakin(params, x, examples, y):
    return ref.kurakin(ref.cross_entropy(ref.forward(params, examples), y), np.arange(6) % 3 < 1, 0.3)


def ensemble(params, x, examples, y):
    of_clean, of_attacked = (ref.cross_entropy(ref.forward(params, rows), y).mean() for rows in (x, examples))
    return 0.6 * of_clean + 0.4 * of_attacked


def aligned(params, x, examples, y):
    attacked, noisy = examples
    return on_attacked(params, x, attacked, y) + 0.7 * ref.misalignment(params, x, noisy, y)


def only_clean(x, examples):
    return [x]


def only_attacked(x, examples):
    return [examples]


def both(x, examples):
    return [x, examples]


OBJECTIVES = jn.objectives
CASES = {
    "standard": (OBJECTIVES.standard(NET), lambda params, x, _, y: on_attacked(params, x, x, y), only_clean),
    "adversarial": (OBJECTIVES.adversarial(NET, shifted), on_attacked, only_attacked),
    "adversarial, clean": (
        OBJECTIVES.adversarial(NET, shifted, moved_by=statistics.clean), on_attacked, only_clean
    ),
    "adversarial, both": (OBJECTIVES.adversarial(NET, shifted, moved_by=statistics.both), on_attacked, both),
    "trades": (OBJECTIVES.trades(NET, shifted, beta=2.0), trades, both),
    "trades, attacked": (
        OBJECTIVES.trades(NET, shifted, beta=2.0, moved_by=statistics.attacked), trades, only_attacked
    ),
    "mart": (OBJECTIVES.mart(NET, shifted, beta=2.0), mart, both),
    "kurakin": (OBJECTIVES.kurakin(NET, shifted, threat=THREAT, share=1 / 3), kurakin, only_attacked),
    "fast": (OBJECTIVES.fast(NET, THREAT, start=jn.attacks.uniform), on_attacked, only_attacked),
    "n_fgsm": (OBJECTIVES.n_fgsm(NET, THREAT), on_attacked, only_attacked),
    "grad_align": (
        OBJECTIVES.grad_align(OBJECTIVES.adversarial(NET, shifted), NET, THREAT, weight=0.7),
        aligned,
        lambda x, examples: [examples[0]],
    ),
    "ensemble_adversarial": (
        OBJECTIVES.ensemble_adversarial(NET, shifted, [lambda x: x[:, :3]], weight=0.4), ensemble, both
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_value_gradient_and_statistics_are_those_of_numpy(name, x64):
    objective, value, passes = CASES[name]
    params, stats, batch = problem()
    before = jax.tree.map(np.array, stats)

    @jax.jit
    def run(params):
        examples = objective.inner(params, stats, batch, jax.random.split(KEY)[0]) if name != "standard" else batch.x
        return examples, *jax.value_and_grad(objective, has_aux=True)(params, stats, batch, KEY)

    examples, (got, (moved, metrics)), got_gradient = run(params)
    x, y, examples = np.asarray(batch.x), np.asarray(batch.y), jax.tree.map(np.asarray, examples)
    at = partial(value, x=x, examples=examples, y=y) if name != "standard" else lambda p: value(p, x, None, y)
    arrays = ref.leaves(params)
    np.testing.assert_allclose(got, at(arrays), rtol=1e-12)
    np.testing.assert_allclose(metrics["loss"], got, rtol=1e-12)
    expected = ref.gradient(at, arrays)
    for name_of, found in ref.leaves(got_gradient).items():
        np.testing.assert_allclose(found, expected[name_of], rtol=1e-7, atol=1e-9)
    mean, variance = ref.moved(arrays, passes(x, examples))
    np.testing.assert_allclose(moved["batch_stats"]["BatchNorm_0"]["mean"], mean, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(moved["batch_stats"]["BatchNorm_0"]["var"], variance, rtol=1e-10)
    jax.tree.map(np.testing.assert_array_equal, stats, before)


class Noisy(nn.Module):
    """Batch statistics and dropout."""

    @nn.compact
    def __call__(self, x, train=False):
        x = jnp.tanh(nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(5)(x)))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))


def neutral(net):
    """Every objective where nothing is left of it but `standard`."""
    standard, nothing = OBJECTIVES.standard(net), jn.Linf(0.0)
    clean = {"moved_by": statistics.clean}
    return {
        "adversarial": OBJECTIVES.adversarial(net, lambda key, model, x, y: x),
        "kurakin": OBJECTIVES.kurakin(net, shifted, threat=THREAT, share=0.0),
        "kurakin, epsilon 0": OBJECTIVES.kurakin(net, jn.attacks.fgsm, threat=nothing, weight=1.0),
        "fast": OBJECTIVES.fast(net, nothing, start=jn.attacks.uniform),
        "n_fgsm": OBJECTIVES.n_fgsm(net, nothing),
        "trades": OBJECTIVES.trades(net, shifted, beta=0.0, **clean),
        "ensemble_adversarial": OBJECTIVES.ensemble_adversarial(net, shifted, [lambda x: x], weight=0.0, **clean),
        "virtual_adversarial": OBJECTIVES.virtual_adversarial(net, THREAT, weight=0.0),
        "awp": OBJECTIVES.awp(standard, gamma=0.0),
        "grad_align": OBJECTIVES.grad_align(standard, net, THREAT, weight=0.0),
    }


@pytest.mark.parametrize("names", [
    ("adversarial", "kurakin", "trades", "awp"),
    pytest.param(("kurakin, epsilon 0", "fast", "n_fgsm", "grad_align"), marks=pytest.mark.slow),
    pytest.param(("ensemble_adversarial", "virtual_adversarial"), marks=pytest.mark.slow),
])  # fmt: skip
def test_without_what_makes_them_they_are_standard(names, x64):
    net, (_, _, batch) = jn.from_linen(Noisy()), problem()
    params, stats = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), net.init(KEY, batch.x))

    @jax.jit
    def run(params):
        def of(objective, key):
            return jax.value_and_grad(objective, has_aux=True)(params, stats, batch, key)

        expected = of(OBJECTIVES.standard(net), jax.random.split(KEY)[1])
        return expected, {name: of(neutral(net)[name], KEY) for name in names}

    ((value, (moved, metrics)), gradient), found = run(params)
    assert abs(value) > 0.1
    for name, ((got, (got_moved, got_metrics)), got_gradient) in found.items():
        expected, got = (value, moved, gradient), (got, got_moved, got_gradient)
        close = partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14, err_msg=name)
        jax.tree.map(close, got, expected)
        close(got_metrics["loss"], metrics["loss"])
        if name != "kurakin, epsilon 0":
            on_clean = "clean_accuracy" if name in ("trades", "ensemble_adversarial") else "accuracy"
            close(got_metrics[on_clean], metrics["accuracy"])


def test_losses_of_a_network_in_bfloat16_are_in_single_precision():
    net, (_, _, batch) = jn.from_linen(jn.models.MLP((4,), 3, dtype=jnp.bfloat16)), problem()
    params, stats = jax.eval_shape(net.init, KEY, batch.x)
    for name, objective in neutral(net).items():
        value, (_, metrics) = jax.eval_shape(objective, params, stats, batch, KEY)
        assert {leaf.dtype for leaf in (value, *metrics.values())} == {np.dtype(np.float32)}, name


# The compiled programs.


def looping(net, steps, threat=THREAT):
    """Objectives whose attacks loop."""
    pgd = partial(jn.attacks.pgd, threat=threat, steps=steps)
    return {
        "adversarial": OBJECTIVES.adversarial(net, pgd),
        "trades": OBJECTIVES.trades(net, partial(pgd, start=jn.attacks.gaussian())),
        "mart": OBJECTIVES.mart(net, pgd),
        "kurakin": OBJECTIVES.kurakin(net, partial(jn.attacks.pgd, steps=steps), threat=threat),
        "awp": OBJECTIVES.awp(OBJECTIVES.adversarial(net, pgd)),
        "grad_align": OBJECTIVES.grad_align(OBJECTIVES.adversarial(net, pgd), net, threat),
        "ensemble_adversarial": OBJECTIVES.ensemble_adversarial(net, pgd, [lambda x: x.reshape(len(x), -1)[:, :3]]),
        "virtual_adversarial": OBJECTIVES.virtual_adversarial(net, jn.L2(0.5), iterations=steps),
    }


ROWS, SHAPE = 32, (4, 4, 1)


def slow_but(*quick):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in looping(NET, 1)]


def compiled(objective, net, mesh):
    """The gradient of an objective as a program for the devices of a mesh, and arguments that lie there."""
    batch = Batch(jax.random.uniform(KEY, (ROWS, *SHAPE)), jnp.arange(ROWS) % 3)
    params, stats = net.init(KEY, batch.x)
    rows, whole = parallel.by_rows(mesh), parallel.replicated(mesh)
    shardings = (whole, whole, Batch(rows, rows), whole)
    arguments = jax.device_put((params, stats, batch, KEY), shardings)
    run = jax.jit(jax.value_and_grad(objective, has_aux=True), in_shardings=shardings, out_shardings=whole)
    return run.lower(*arguments).compile(), arguments


@pytest.mark.parametrize("name", slow_but("trades", "kurakin"))
def test_devices_do_not_talk_inside_the_attack(name, eight_devices):
    net = jn.from_linen(jn.models.MLP((8,), 3))
    program, arguments = compiled(looping(net, 3)[name], net, parallel.data_mesh(eight_devices))
    text = program.as_text()
    lines, loops = in_loops(text)
    assert loops >= 1
    assert any(" dot(" in line for line in lines), "the attack is not in a loop"
    assert collectives(lines) == []
    assert collectives(text.splitlines())
    alone, on_one = compiled(looping(net, 3)[name], net, parallel.data_mesh(eight_devices[:1]))
    together = jax.tree.map(np.asarray, program(*arguments))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), together, alone(*on_one))


@pytest.mark.parametrize("name", slow_but("trades"))
def test_steps_of_the_attack_add_no_memory(name, eight_devices):
    net, one = jn.from_linen(jn.models.MLP((8,), 3)), parallel.data_mesh(eight_devices[:1])
    # In L2, whose steps have a derivative that could be kept, unlike signs.
    objectives = (looping(net, steps, jn.L2(0.5))[name] for steps in (4, 400))
    few, many = (compiled(one_of, net, one)[0].memory_analysis().temp_size_in_bytes for one_of in objectives)
    # The images of one step more are 2 kB.
    assert abs(many - few) < 1000


def flops(objective, net=NET):
    params, stats, batch = problem()
    run = jax.jit(jax.value_and_grad(objective, has_aux=True))
    return run.lower(params, stats, batch, KEY).compile().cost_analysis()["flops"]


def test_a_pass_that_moves_nothing_is_not_made():
    identity = lambda key, model, x, y: x  # noqa: E731
    plain = flops(OBJECTIVES.standard(NET))
    assert flops(OBJECTIVES.adversarial(NET, identity)) == pytest.approx(plain, rel=0.02)
    assert flops(OBJECTIVES.adversarial(NET, shifted, moved_by=statistics.both)) > 1.1 * plain
