"""What every attack promises under every threat. A new attack joins by one line in a table."""

from functools import cache, partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from references import assert_inside

import jaxnets as jn
from jaxnets.attacks.parts.calling import row_keys

margin = jn.losses.margin


def _fgsm(threat):
    return partial(jn.attacks.fgsm, threat=threat, loss=margin)


def _pgd(threat):
    return partial(jn.attacks.pgd, threat=threat, steps=3, loss=margin)


def _targeted(threat):
    return partial(_pgd(threat), loss=jn.losses.targeted(margin))


def _searched(attack):
    """A search over constants, in miniature."""
    return lambda threat: partial(attack, threat=threat, steps=20, step_size=0.05, rounds=5, initial_const=0.1)


BALLS = {"Linf": partial(jn.Linf, 0.1), "L2": partial(jn.L2, 0.4), "L1": partial(jn.L1, 0.9)}
FREE = {name: partial(getattr(jn, name), 12.0) for name in ("Linf", "L2", "L1", "L0")}
"""Balls that hold the whole box: what a minimum-norm attack finds is what it returns."""

# The margin does not saturate, so that the same gradients come at every scale of the logits.
GRADIENT = {
    "fgsm": _fgsm,
    "fgsm_rs": lambda threat: partial(_fgsm(threat), start=jn.attacks.uniform, step_size=1.25 * threat.epsilon),
    "pgd": _pgd,
    "pgd_targeted": _targeted,
    "worst_of": lambda threat: jn.attacks.worst_of(_fgsm(threat), _pgd(threat)),
    "restarts": lambda threat: jn.attacks.restarts(_pgd(threat), 2),
}
ITERATED = {
    "restarts_at_once": lambda t: jn.attacks.restarts(_pgd(t), 3, at_once=2),
    "bim": lambda t: partial(jn.attacks.bim, threat=t, steps=3, loss=margin),
    "mi_fgsm": lambda t: partial(jn.attacks.mi_fgsm, threat=t, steps=3, loss=margin),
    "ni_fgsm": lambda t: partial(jn.attacks.ni_fgsm, threat=t, steps=3, loss=margin),
    "adam_pgd": lambda t: partial(jn.attacks.adam_pgd, threat=t, steps=3, loss=margin),
    "apgd": lambda t: partial(jn.attacks.apgd, threat=t, steps=10, loss=margin),
    "apgd_targeted": lambda t: partial(jn.attacks.apgd_targeted, threat=t, steps=10, classes=2),
}
MINIMUM_NORM = {
    "fab": (lambda t: partial(jn.attacks.fab, threat=t, steps=5), "Linf L2 L1"),
    "fab_targeted": (lambda t: partial(jn.attacks.fab_targeted, threat=t, steps=5, classes=2), "L2"),
    "deepfool": (lambda t: partial(jn.attacks.deepfool, threat=t, steps=10), "L2 Linf"),
    "carlini_wagner": (_searched(jn.attacks.carlini_wagner), "L2"),
    "ead": (_searched(jn.attacks.ead), "L1"),
    "lbfgs": (lambda t: partial(jn.attacks.lbfgs, threat=t, steps=10, rounds=5, initial_const=0.1), "L2"),
    "jsma": (lambda t: partial(jn.attacks.jsma, threat=t, targets=3), "L0"),
    "ddn": (lambda t: partial(jn.attacks.ddn, threat=t, steps=10), "L2"),
    "fmn": (lambda t: partial(jn.attacks.fmn, threat=t, steps=10), "Linf L2 L1 L0"),
    "sigma_zero": (lambda t: partial(jn.attacks.sigma_zero, threat=t, steps=20), "L0"),
}
BLACK_BOX = {
    "square": lambda t: partial(jn.attacks.square, threat=t, queries=40),
    "nes": lambda t: partial(jn.attacks.nes, threat=t, samples=8, queries=52, sigma=0.1, step_size=0.5 * t.epsilon),
    "spsa": lambda t: partial(jn.attacks.spsa, threat=t, samples=8, queries=52, sigma=0.1, step_size=0.5 * t.epsilon),
}
ATTACKS = GRADIENT | ITERATED | {name: make for name, (make, _) in MINIMUM_NORM.items()} | BLACK_BOX
THREATS = {(name, norm): BALLS[norm] for name in (GRADIENT | ITERATED | BLACK_BOX) for norm in BALLS}
THREATS |= {(name, norm): FREE[norm] for name, (_, norms) in MINIMUM_NORM.items() for norm in norms.split()}
BY_GRADIENT = [(name, norm) for name, norm in THREATS if name in GRADIENT]
QUICK = {("pgd", norm) for norm in BALLS} | {next(case for case in THREATS if case[0] == name) for name in ATTACKS}
SHAPE, CLASSES, ROWS = (3, 4), 4, 8


def each_of(cases, quick=QUICK):
    """Attacks in their norms; those that are not quick are slow."""
    marked = [pytest.param(*case, marks=[] if case in quick else pytest.mark.slow) for case in cases]
    return pytest.mark.parametrize(("name", "norm"), marked)


every_case = each_of(THREATS)
every_case_compiled_anew = each_of(THREATS, QUICK & set(BY_GRADIENT))
every_basic_case = each_of(BY_GRADIENT)
every_attack = pytest.mark.parametrize("name", GRADIENT)
every_threat = pytest.mark.parametrize("norm", BALLS)


class Small(nn.Module):
    """Every row sees statistics that came from other data."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(8)(x.reshape(len(x), -1))
        x = jnp.tanh(nn.BatchNorm(use_running_average=not train, momentum=0.5)(x))
        return nn.Dense(CLASSES)(x)


NET = jn.from_linen(Small())


def scaled_logits(scale, params, stats, x):
    return scale * NET.infer(params, stats, x)


@cache
def variables(seed=0):
    init_key, data_key, train_key = jax.random.split(jax.random.key(seed), 3)
    params, stats = NET.init(init_key, jnp.zeros((1, *SHAPE)))
    _, stats = NET.train(params, stats, 3 * jax.random.normal(data_key, (32, *SHAPE)), train_key)
    return params, stats


def model(scale=1.0, seed=0, dtype=jnp.float32):
    leaves = jax.tree.map(lambda leaf: leaf.astype(dtype), variables(seed))
    return Partial(scaled_logits, jnp.asarray(scale, dtype), *leaves)


def data(rows=ROWS, dtype=np.float32, seed=0):
    """Rows in the box, many of whose coordinates lie on its faces."""
    random = np.random.default_rng(seed)
    x = np.clip(random.uniform(-0.3, 1.3, size=(ROWS, *SHAPE)), 0, 1).astype(dtype)
    return jnp.asarray(x[:rows]), jnp.asarray(random.integers(0, CLASSES, ROWS)[:rows])


def standard(name, rows=ROWS, dtype=np.float32):
    """The rows and targets of an attack; what looks for the first success starts at rows that are right."""
    x, y = data(rows, dtype)
    return x, y if name in GRADIENT | ITERATED else jnp.argmax(model(dtype=dtype)(x), axis=-1)


def keys(rows=ROWS, seed=1):
    return row_keys(jax.random.key(seed), rows)


def threat_of(norm, dtype=jnp.float32, factor=1.0, name="pgd"):
    threat = THREATS[name, norm]()
    return type(threat)(jnp.asarray(factor * threat.epsilon, dtype))


@cache
def compiled(name, norm, rows=ROWS, dtype="float32"):
    """One compiled program an attack, threat, size and type: traced again, it raises."""

    def attack(threat, key, logits_fn, x, y):
        return ATTACKS[name](threat)(key, logits_fn, x, y)

    attack.__name__ = f"{name}_{norm}_{rows}_{dtype}"
    return jax.jit(chex.assert_max_traces(attack, n=1))


def run(name, norm, *, threat=None, key=None, logits_fn=None, x=None, y=None):
    """The attack on the standard rows, with what is given in place."""
    threat = threat_of(norm, name=name) if threat is None else threat
    logits_fn = model() if logits_fn is None else logits_fn
    x, y = (standard(name)[0] if x is None else x), (standard(name)[1] if y is None else y)
    return compiled(name, norm, len(x), str(x.dtype))(threat, keys() if key is None else key, logits_fn, x, y)


@every_case
def test_result_is_like_x_inside_the_threat_and_moves(name, norm):
    x, _ = data()
    x_adv = run(name, norm)
    assert x_adv.shape == x.shape
    assert x_adv.dtype == x.dtype
    assert_inside(threat_of(norm, name=name), x_adv, x)
    moved = np.abs(np.asarray(x_adv - x)).reshape(ROWS, -1).max(axis=1)
    assert (moved > 1e-3).sum() >= ROWS - 2, "an attack that hardly moves promises nothing"


@every_basic_case
def test_attack_raises_its_loss(name, norm):
    x, y = data()
    sign = -1 if name == "pgd_targeted" else 1
    gain = sign * (margin(model()(run(name, norm)), y) - margin(model()(x), y))
    assert np.median(gain) > 0.01


@every_case_compiled_anew
def test_same_key_gives_same_result_and_jit_equals_eager(name, norm):
    """The second in double precision, for steps of APGD amplify rounding a thousandfold."""
    np.testing.assert_array_equal(run(name, norm), run(name, norm))
    with jax.enable_x64(True):
        (x, y), logits_fn = standard(name, dtype=np.float64), model(dtype=jnp.float64)
        threat = threat_of(norm, jnp.float64, name=name)
        jitted = run(name, norm, threat=threat, logits_fn=logits_fn, x=x, y=y)
        # One key for all rows is the same as one key a row made from it.
        eager = ATTACKS[name](threat)(jax.random.key(1), logits_fn, x, y)
    assert jitted.dtype == np.float64
    np.testing.assert_allclose(eager, jitted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["fgsm_rs", "pgd", "restarts"])
def test_another_key_gives_another_result(name):
    assert np.abs(np.asarray(run(name, "L2") - run(name, "L2", key=keys(seed=2)))).max() > 1e-3


@every_case
def test_rows_do_not_depend_on_the_batch(name, norm):
    whole = run(name, norm)
    for rows in (1, 7) if (name in GRADIENT and norm == "Linf") or name == "pgd" else (7,):
        x, y = standard(name, rows)
        first = run(name, norm, key=keys()[:rows], x=x, y=y)
        np.testing.assert_allclose(first, whole[:rows], rtol=0, atol=1e-5)


@every_case
def test_permuted_rows_give_permuted_results(name, norm):
    x, y = standard(name)
    order = np.random.default_rng(3).permutation(ROWS)
    permuted = run(name, norm, key=keys()[order], x=x[order], y=y[order])
    np.testing.assert_allclose(permuted, run(name, norm)[order], rtol=0, atol=1e-5)


@every_case
def test_new_epsilon_data_and_parameters_mean_no_new_trace(name, norm):
    chex.clear_trace_counter()
    results = [run(name, norm)]
    wider = run(name, norm, threat=threat_of(norm, factor=2.0, name=name))
    # What minimum-norm attacks find does not hang on the epsilon that allows it.
    results += [] if name in MINIMUM_NORM else [wider]
    results += [run(name, norm, logits_fn=model(seed=1)), run(name, norm, x=data(seed=5)[0], key=keys(seed=6))]
    for number, one in enumerate(results):
        for other in results[:number]:
            assert np.abs(np.asarray(one - other)).max() > 1e-3, "an argument was not used"


@pytest.mark.parametrize("name", ["fgsm", "pgd", "worst_of", "restarts"])
def test_eager_calls_do_not_trace_the_model_again(name):
    traces = []

    def counted(params, stats, x):
        traces.append(0)
        return NET.infer(params, stats, x)

    x, y = data()
    attack = ATTACKS[name](threat_of("Linf"))
    attack(jax.random.key(0), Partial(counted, *variables(0)), x, y)
    first = len(traces)
    attack(jax.random.key(1), Partial(counted, *variables(1)), 1 - x, y)
    assert 0 < first == len(traces)
    if name in ("fgsm", "pgd"):
        ATTACKS[name](threat_of("Linf", factor=0.5))(jax.random.key(1), Partial(counted, *variables(1)), x, y)
        assert first == len(traces)


@every_case
def test_zero_gradients_leave_the_result_inside(name, norm):
    x, _ = data()
    x_adv = run(name, norm, logits_fn=model(scale=0.0))
    assert_inside(threat_of(norm, name=name), x_adv, x)
    if name == "fgsm":
        np.testing.assert_array_equal(x_adv, x)


@every_case_compiled_anew
def test_constant_model_survives(name, norm):
    x, _ = data()
    threat, y = threat_of(norm, name=name), jnp.zeros(ROWS, int)
    constant = ATTACKS[name](threat)(jax.random.key(0), lambda x: jnp.zeros((len(x), CLASSES)), x, y)
    assert_inside(threat, constant, x)


@every_basic_case
def test_gradients_at_any_scale_give_the_same_step(name, norm):
    expected = run(name, norm)
    for scale in (1e-20, 1e-6, 1e6, 1e20):
        scaled = run(name, norm, logits_fn=model(scale=scale))
        np.testing.assert_allclose(scaled, expected, rtol=0, atol=1e-5, err_msg=f"scale {scale}")


@every_case
def test_no_budget_gives_x(name, norm):
    x, _ = data()
    np.testing.assert_array_equal(run(name, norm, threat=threat_of(norm, factor=0.0, name=name)), x)


@every_attack
def test_statistics_are_left_as_they_were(name):
    x, y = data()
    logits_fn = model(seed=2)
    before = jax.tree.map(np.array, logits_fn)
    ATTACKS[name](threat_of("Linf"))(jax.random.key(0), logits_fn, x, y)
    jax.tree.map(np.testing.assert_array_equal, before, logits_fn)


@every_case_compiled_anew
def test_double_precision(name, norm, x64):
    x, y = standard(name, dtype=np.float64)
    threat = threat_of(norm, jnp.float64, name=name)
    x_adv = run(name, norm, threat=threat, logits_fn=model(dtype=jnp.float64), x=x, y=y)
    assert x_adv.dtype == np.float64
    assert_inside(threat, x_adv, x, tolerance=1e-12)


@pytest.mark.parametrize("name", ["fgsm", "pgd"])
@every_threat
def test_type_of_epsilon_does_not_change_that_of_x(name, norm):
    x, y = data(dtype=jnp.bfloat16)
    assert ATTACKS[name](threat_of(norm, jnp.float32))(jax.random.key(0), model(), x, y).dtype == jnp.bfloat16


@every_threat
def test_epsilon_and_step_size_a_row(norm):
    x, y = data()
    factors = np.linspace(0, 1, ROWS, dtype=np.float32)
    threat = type(threat_of(norm))(threat_of(norm).epsilon * factors)
    together = _pgd(threat)(jax.random.key(1), model(), x, y)
    assert_inside(threat, together, x)
    row = 5
    alone = run("pgd", norm, threat=threat_of(norm, factor=factors[row]))[row]
    np.testing.assert_allclose(together[row], alone, rtol=0, atol=1e-5)


@every_threat
def test_images_stay_inside(norm):
    random = np.random.default_rng(0)
    x = jnp.asarray(np.clip(random.normal(0.2, 0.5, size=(4, 28, 28, 1)), 0, 1), jnp.float32)
    weights = jnp.asarray(random.normal(size=(784, 10)), jnp.float32)
    threat = {"Linf": jn.Linf(0.3), "L2": jn.L2(3.0), "L1": jn.L1(20.0, top=16)}[norm]
    attack = partial(jn.attacks.pgd, threat=threat, steps=10)
    x_adv = attack(jax.random.key(0), lambda x: x.reshape(len(x), -1) @ weights, x, jnp.arange(4))
    assert_inside(threat, x_adv, x)


# Bad arguments.


@every_attack
@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (jnp.zeros((2, 3), jnp.int32), jnp.zeros(2, jnp.int32), "x must be a float array"),
        (jnp.zeros(3), jnp.zeros(3, jnp.int32), "x must be a float array of rows"),
        (jnp.zeros((2, 3)), jnp.zeros(3, jnp.int32), "B = 2 rows"),
        (jnp.zeros((2, 3)), jnp.zeros((), jnp.int32), "B = 2 rows"),
    ],
)
def test_bad_data_raises(name, x, y, words):
    with pytest.raises(ValueError, match=words):
        ATTACKS[name](jn.Linf(0.1))(jax.random.key(0), lambda x: x, x, y)


@every_attack
def test_logits_of_the_wrong_shape_raise(name):
    x, y = data()
    with pytest.raises(ValueError, match=r"logits_fn must return \[B, K\] with B = 8"):
        ATTACKS[name](jn.Linf(0.1))(jax.random.key(0), lambda x: x.sum(axis=(1, 2)), x, y)


@every_attack
def test_wrong_number_of_keys_raises(name):
    x, y = data()
    with pytest.raises(ValueError, match="one for each of the 8 rows"):
        ATTACKS[name](jn.Linf(0.1))(keys()[:3], model(), x, y)


@every_attack
def test_wrong_number_of_epsilons_raises(name):
    x, y = data()
    with pytest.raises(ValueError, match="epsilon must be a scalar or have one entry for each of the 8 rows"):
        ATTACKS[name](jn.Linf(jnp.full(3, 0.1)))(jax.random.key(0), model(), x, y)


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_raise(steps):
    x, y = data()
    with pytest.raises(ValueError, match=f"at least one step, got steps={steps}"):
        jn.attacks.pgd(jax.random.key(0), model(), x, y, threat=jn.Linf(0.1), steps=steps)


def test_bad_combinations_raise():
    plain = _pgd(jn.Linf(0.1))
    wanted = partial(plain, loss=jn.losses.targeted(margin))
    with pytest.raises(ValueError, match="times=0"):
        jn.attacks.restarts(plain, 0)
    with pytest.raises(ValueError, match="at least one attack"):
        jn.attacks.worst_of()
    with pytest.raises(ValueError, match="no common goal"):
        jn.attacks.worst_of(plain, wanted)
    with pytest.raises(ValueError, match="no common goal"):
        jn.attacks.worst_of(plain, jn.attacks.restarts(wanted, 2))
    assert jn.attacks.worst_of(plain, wanted, loss=margin).loss is margin
    assert jn.attacks.worst_of(wanted, jn.attacks.restarts(wanted, 2)).loss == jn.losses.targeted(margin)


def test_attacks_print_their_settings():
    printed = repr(jn.attacks.worst_of(_pgd(jn.Linf(0.25)), jn.attacks.restarts(_fgsm(jn.L2(1.5)), 7)))
    for part in ("worst_of", "restarts", "epsilon=0.25", "steps=3", "L2(epsilon=1.5", "7"):
        assert part in printed


INFINITE_BOX = {
    "apgd": (jn.attacks.apgd, jn.L1),
    "apgd_targeted": (jn.attacks.apgd_targeted, jn.L1),
    "carlini_wagner": (jn.attacks.carlini_wagner, jn.L2),
    "ead": (jn.attacks.ead, jn.L1),
    "fab": (jn.attacks.fab, jn.L1),
    "fab_targeted": (jn.attacks.fab_targeted, jn.L1),
    "jsma": (jn.attacks.jsma, jn.threats.L0),
    "lbfgs": (jn.attacks.lbfgs, jn.L2),
}


@pytest.mark.parametrize("name", INFINITE_BOX)
def test_a_box_without_ends_is_refused_where_lengths_are_shares_of_it(name):
    attack, cls = INFINITE_BOX[name]
    x, y = jnp.full((1, 6), 0.5), jnp.array([0])
    with pytest.raises(ValueError, match=f"{name} needs a finite box, got "):
        attack(jax.random.key(0), lambda x: x, x, y, threat=cls(1.0, -jnp.inf, jnp.inf))


@pytest.mark.parametrize("name", ["fgsm", "pgd", "bim", "mi_fgsm", "ni_fgsm", "apgd", "apgd_targeted"])
def test_an_infinite_epsilon_is_refused_where_steps_are_shares_of_it(name):
    x, y = jnp.full((1, 6), 0.5), jnp.array([0])
    with pytest.raises(ValueError, match="shares of epsilon, which must be finite, got L2"):
        getattr(jn.attacks, name)(jax.random.key(0), lambda x: x, x, y, threat=jn.L2(jnp.inf))


@pytest.mark.parametrize("cls", [jn.Linf, jn.L2, jn.L1])
def test_fmn_of_rows_in_half_precision(cls):
    x, y = jnp.array([[0.7, 0.5, 0.1]], jnp.bfloat16), jnp.array([0])
    x_adv = jn.attacks.fmn(jax.random.key(0), lambda x: x, x, y, threat=cls(jnp.inf), steps=50)
    assert x_adv.dtype == jnp.bfloat16
    assert jnp.argmax(x_adv) == 1
