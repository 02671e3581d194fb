"""One step of training: optimizers, determinism, many devices, donation, and what the compiled program may contain."""

import re
from functools import cache, partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxnets as jn
from jaxnets import parallel
from jaxnets.training import TrainState, init_state, make_step
from jaxnets.types import Batch

OPTIMIZERS = {
    "sgd": optax.sgd(0.5, momentum=0.9),
    "adam": optax.adam(0.05),
    "adamw": optax.adamw(0.05, weight_decay=1e-3),
    "polyak_sgd": optax.polyak_sgd(max_learning_rate=1.0),
    "lbfgs": optax.lbfgs(),
}
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast")
ROWS = 32


class Small(nn.Module):
    """Batch statistics, and convolutions to shard."""

    @nn.compact
    def __call__(self, x, train=False):
        x = jn.models.layers.Conv(4, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(3)(jn.models.layers.max_pool(x).reshape(len(x), -1))


def batch_of(seed=0, shape=(4, 4, 1)):
    """Classes that can be told apart."""
    random = np.random.default_rng(seed)
    y = random.integers(0, 3, ROWS)
    means = np.random.default_rng(99).uniform(0.2, 0.8, size=(3, *shape))
    x = np.clip(means[y] + 0.1 * random.normal(size=(ROWS, *shape)), 0, 1)
    return Batch(jnp.asarray(x, jnp.float32), jnp.asarray(y))


def state_of(net, optimizer, shape=(4, 4, 1)):
    params, stats = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, *shape)))
    return init_state(jax.random.key(1), params, stats, optimizer)


ATTACKS = {
    "Linf": partial(jn.attacks.pgd, threat=jn.Linf(0.05), steps=3),
    "L1": partial(jn.attacks.pgd, threat=jn.L1(0.5), steps=3),
    "L1, several coordinates": partial(jn.attacks.pgd, threat=jn.L1(0.5, top=4), steps=3),
    "L0": partial(jn.attacks.pgd, threat=jn.L0(3), steps=3),
    "dlr": partial(jn.attacks.pgd, threat=jn.Linf(0.05), steps=3, loss=jn.losses.dlr),
    "restarts L2": jn.attacks.restarts(partial(jn.attacks.pgd, threat=jn.L2(0.2), steps=2), 2),
    "random start FGSM": partial(jn.attacks.fgsm, threat=jn.Linf(0.05), step_size=0.0625, start=jn.attacks.uniform),
}


# Optimizers.


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_lower_the_loss(name):
    net, batch = jn.from_linen(jn.models.MLP((8,), 3, jnp.tanh)), batch_of(shape=(5,))
    state = state_of(net, OPTIMIZERS[name], shape=(5,))
    step = jax.jit(chex.assert_max_traces(make_step(jn.objectives.standard(net), OPTIMIZERS[name]), n=1))
    losses = []
    for number in range(25):
        assert state.step == number
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    assert np.isfinite(losses).all()


@pytest.mark.parametrize("wrapped", [lambda multi: multi, lambda multi: multi.gradient_transformation()])
def test_accumulation_hands_on_what_an_optimizer_asks_for(wrapped):
    net, batch = jn.from_linen(jn.models.MLP((8,), 3)), batch_of(shape=(5,))
    alone = optax.polyak_sgd()
    ends = []
    for optimizer in (alone, wrapped(optax.MultiSteps(alone, 1))):
        step = jax.jit(make_step(jn.objectives.standard(net), optimizer))
        ends.append(step(step(state_of(net, optimizer, shape=(5,)), batch)[0], batch)[0].params)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *ends)


def test_a_step_of_sgd_is_its_formula():
    net, batch = jn.from_linen(jn.models.MLP((8,), 3)), batch_of(shape=(5,))
    objective, optimizer = jn.objectives.standard(net), optax.sgd(0.3)
    state = state_of(net, optimizer, shape=(5,))
    after, metrics = make_step(objective, optimizer)(state, batch)
    (value, _), gradient = jax.value_and_grad(objective, has_aux=True)(state.params, {}, batch, state.key)
    expected = jax.tree.map(lambda p, g: p - 0.3 * g, state.params, gradient)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), after.params, expected)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    assert after.step == 1
    assert after.step.dtype == jnp.int32
    assert (jax.random.key_data(after.key) == jax.random.key_data(state.key)).all()


def test_extra_arguments_are_those_of_the_objective():
    """Value, gradient and function, as line searches ask for them."""
    net, batch = jn.from_linen(jn.models.MLP((), 3)), batch_of(shape=(5,))
    objective, seen = jn.objectives.standard(net), {}

    def update(updates, state, params=None, **extra):
        seen.update(extra, at_params=extra["value_fn"](params), updates=updates)
        return updates, state

    watching = optax.GradientTransformationExtraArgs(lambda params: (), update)
    make_step(objective, watching)(state_of(net, watching, shape=(5,)), batch)
    assert seen["at_params"] == seen["value"]
    jax.tree.map(np.testing.assert_array_equal, seen["grad"], seen["updates"])


# Randomness.


def drawing(params, stats, batch, key):
    """An objective that shows what it drew."""
    draw = jax.random.uniform(key)
    return draw * jnp.sum(params["w"]), (stats, {"draw": draw})


def run_drawing(state, steps):
    step, draws = jax.jit(make_step(drawing, optax.sgd(0.1))), []
    for _ in range(steps):
        state, metrics = step(state, None)
        draws.append(float(metrics["draw"]))
    return state, draws


def test_step_t_draws_from_the_key_folded_with_t():
    state = init_state(jax.random.key(7), {"w": jnp.ones(3)}, {}, optax.sgd(0.1))
    _, draws = run_drawing(state, 4)
    assert draws == [float(jax.random.uniform(jax.random.fold_in(jax.random.key(7), t))) for t in range(4)]
    assert len(set(draws)) == 4


def test_resumed_is_never_stopped():
    net, optimizer = jn.from_linen(Small()), optax.adam(0.01)
    step = jax.jit(make_step(jn.objectives.adversarial(net, ATTACKS["random start FGSM"]), optimizer))
    whole = state_of(net, optimizer)
    for number in range(4):
        if number == 2:
            key = np.asarray(jax.random.key_data(whole.key))
            saved = jax.tree.map(np.array, whole._replace(key=key))
        whole, _ = step(whole, batch_of(number))
    resumed = jax.tree.map(jnp.asarray, saved)
    resumed = resumed._replace(key=jax.random.wrap_key_data(resumed.key))
    for number in (2, 3):
        resumed, _ = step(resumed, batch_of(number))
    for got, expected in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
        assert (got == expected).all()


# Many devices.


@cache
def compiled(name, devices):
    """The jitted step on a mesh of the first devices, and a state that lies there."""
    net, optimizer = jn.from_linen(Small()), optax.sgd(0.1, momentum=0.9)
    mesh = parallel.data_mesh(jax.devices()[:devices])
    attack = ATTACKS.get(name)
    objective = jn.objectives.adversarial(net, attack) if attack else jn.objectives.standard(net)
    rows, whole = parallel.by_rows(mesh), parallel.replicated(mesh)
    step = make_step(objective, optimizer)

    def counted(state, batch):
        return step(state, batch)

    counted.__name__ = f"{name}_{devices}"
    shardings = {"in_shardings": (whole, rows), "out_shardings": (whole, whole)}
    jitted = jax.jit(chex.assert_max_traces(counted, n=1), donate_argnums=0, **shardings)
    state = parallel.replicate(state_of(net, optimizer), mesh)
    return jitted, state, lambda batch: jax.device_put(batch, rows)


def fresh(state):
    """A copy: the step eats its argument."""
    return jax.tree.map(lambda leaf: leaf.copy(), state)


@pytest.mark.parametrize("name", ["standard", *ATTACKS])
def test_eight_devices_train_as_one_does(name, eight_devices):
    ends, losses = [], []
    for devices in (1, 8):
        step, state, place = compiled(name, devices)
        state, seen = fresh(state), []
        for number in range(4):
            state, metrics = step(state, place(batch_of(number)))
            seen.append(float(metrics["loss"]))
        ends.append(jax.tree.map(np.asarray, state._replace(key=0)))
        losses.append(seen)
    # Sums over rows come in another order; nothing else differs.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5), *ends)
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert losses[0][0] != losses[0][-1]


def test_attacked_rows_do_not_depend_on_the_devices(eight_devices):
    net, batch = jn.from_linen(Small()), batch_of()
    params, stats = net.init(jax.random.key(0), batch.x)
    results = []
    for devices in (1, 8):
        mesh = parallel.data_mesh(eight_devices[:devices])
        model = parallel.replicate(net.logits_fn(params, stats), mesh)
        x, y = jax.device_put(batch, parallel.by_rows(mesh))
        results.append(ATTACKS["restarts L2"](jax.random.key(3), model, x, y))
    np.testing.assert_allclose(*results, atol=1e-5)
    assert np.abs(results[0] - batch.x).max() > 0.01


def test_state_is_donated_and_the_step_traced_once(eight_devices):
    step, state, place = compiled("Linf", 8)
    given = fresh(state)
    leaves = [leaf for leaf in jax.tree.leaves(given._replace(key=())) if leaf.ndim]
    after, _ = step(given, place(batch_of()))
    assert all(leaf.is_deleted() for leaf in leaves)
    for number in range(1, 4):
        after, _ = step(after, place(batch_of(number)))
    assert after.step == 4


# The compiled program: devices talk once a step, never inside the attack.


def computations(text):
    """The instructions of each computation of a compiled program, by its name."""
    found, name = {}, None
    for line in text.splitlines():
        head = re.match(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if head:
            name = head.group(1)
            found[name] = []
        elif name is not None and " = " in line:
            found[name].append(line)
    return found


def in_loops(text):
    """All instructions that some while loop runs, and how many loops there are."""
    parts = computations(text)
    names_of = r"=\{?([^,})]+(?:, *%[^,})]+)*)"
    referred = re.compile(r"(?:body|condition|calls|to_apply|(?:branch|true|false)_computations?)" + names_of)
    loops = [line for lines in parts.values() for line in lines if re.search(r"\bwhile\(", line)]
    waiting = [name for line in loops for name in re.findall(r"(?:body|condition)=%?([\w.\-]+)", line)]
    seen = set()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            names = [names for line in parts[name] for names in referred.findall(line)]
            waiting += [one.strip().lstrip("%") for group in names for one in group.split(",")]
    return [line for name in sorted(seen) for line in parts[name]], len(loops)


def collectives(lines):
    return [line for line in lines if any(re.search(rf"\b{name}(-start)?\(", line) for name in COLLECTIVES)]


@pytest.mark.parametrize("name", sorted(ATTACKS.keys() - {"random start FGSM"}))
def test_devices_do_not_talk_inside_the_attack(name, eight_devices):
    step, state, place = compiled(name, 8)
    text = step.lower(state, place(batch_of())).compile().as_text()
    lines, loops = in_loops(text)
    assert loops >= 1
    assert any("convolution" in line or "dot" in line for line in lines), "the attack is not in a loop"
    assert collectives(lines) == []
    assert collectives(text.splitlines()), "the gradient is summed over devices somewhere"


@pytest.mark.parametrize(
    "attack",
    [
        partial(jn.attacks.apgd_targeted, threat=jn.Linf(0.05), steps=5, classes=3),
        partial(jn.attacks.deepfool, threat=jn.L2(jnp.inf), steps=5),
    ],
)
def test_devices_tell_each_other_nothing_of_their_rows(attack, eight_devices):
    """But whether some row goes on, where an attack ends with its last row."""
    mesh, net = parallel.data_mesh(eight_devices), jn.from_linen(jn.models.MLP((6,), classes=5))
    model = parallel.replicate(net.logits_fn(*net.init(jax.random.key(0), jnp.zeros((1, 7)))), mesh)
    rows = jax.device_put((jnp.full((16, 7), 0.5), jnp.arange(16) % 5), parallel.by_rows(mesh))
    text = jax.jit(attack).lower(jax.random.key(0), model, *rows).compile().as_text()
    lines, loops = in_loops(text)
    assert loops >= 1
    assert [line for line in collectives(lines) if "pred[] " not in line] == []


def test_the_search_for_collectives_finds_one(eight_devices):
    mesh = parallel.data_mesh(eight_devices)

    def talkative(x):
        return jax.lax.fori_loop(0, 5, lambda _, x: x / jnp.sum(jnp.sin(x)), x)

    x = jax.device_put(jnp.ones((16, 3)), parallel.by_rows(mesh))
    text = jax.jit(talkative, in_shardings=parallel.by_rows(mesh)).lower(x).compile().as_text()
    assert collectives(in_loops(text)[0])


def test_the_state_is_a_tree_of_arrays():
    net = jn.from_linen(Small())
    state = state_of(net, optax.adam(0.1))
    assert isinstance(jax.tree.map(lambda leaf: leaf, state), TrainState)
    assert state.averaged is None
    assert state.step == 0
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype(np.float32)}
