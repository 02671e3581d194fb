"""The benchmarks: sides do the same work on the same weights, and what is said of them is what was measured."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from matplotlib.image import imread

import jaxnets as jn
from benchmarks import compilers, limit, networks, report, speed, work
from benchmarks.process import Answer, Side, environment
from benchmarks.sides import NotOfferedError, by_hand, jaxnets, jaxnets_unrolled, to_torch
from jaxnets.types import Batch

KEY = jax.random.key(0)
SMALLER = {"wrn28_10": jn.models.WideResNet(10, 2)}
"""Networks of the same layers, for those too large to test."""


@pytest.fixture
def loaded(monkeypatch):
    """By name: a network with random weights and statistics, and four rows of noise."""

    def load(name, precision="float32"):
        network = networks.NETWORKS[name]._replace(training=None)
        network = network._replace(module=SMALLER.get(name, network.module))
        monkeypatch.setitem(networks.NETWORKS, name, network)
        found = networks.load(name, rows=4, precision=precision)
        draw = np.random.default_rng(1)
        params, stats = jax.tree.map(lambda leaf: leaf * draw.uniform(0.5, 1.5), (found.params, found.stats))
        return found._replace(params=params, stats=stats, twin=networks.twin_of(network, params, stats, precision))

    return load


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_twins_give_the_same_logits(name, loaded):
    found = loaded(name)
    rows, _ = to_torch(found.x, found.y)
    with torch.no_grad():
        theirs = found.twin()(rows).numpy()
    np.testing.assert_allclose(found.model(found.x), theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


def test_twins_compute_in_the_precision_of_the_work(loaded):
    """Sixteen times coarser than float32 would be, and near what it gives."""
    rows, exact = to_torch((found := loaded("madry_cnn")).x, found.y)[0], found.model(found.x)
    coarse = loaded("madry_cnn", "bf16")
    assert jax.tree.leaves(coarse.params)[0].dtype == jnp.float32
    with torch.no_grad():
        theirs = coarse.twin()(rows)
    assert theirs.dtype == torch.float32
    assert not coarse.twin().training
    for logits in (np.asarray(coarse.model(found.x), float), theirs.numpy()):
        assert 1e-4 < np.abs(logits - exact).max() / np.abs(exact).max() < 0.03


def test_training_of_networks_is_asked_for_by_name(monkeypatch):
    for arguments in ([], ["resnet18_64"]):
        monkeypatch.setattr("sys.argv", ["benchmarks.networks", *arguments])
        with pytest.raises(SystemExit, match="name networks to train of small_cnn, madry_cnn, resnet18_8, wrn28_10"):
            networks.main()


def test_attacks_without_loops_are_the_same(loaded, monkeypatch):
    found, done = loaded("madry_cnn"), work.parse("madry_cnn pgd-3 linf 4")
    looped = jaxnets.make(done, found)()
    jax.clear_caches()
    loops = []
    monkeypatch.setattr("jax.lax.fori_loop", lambda *loop: loops.append(loop))
    unrolled = jaxnets_unrolled.make(done, found)()
    assert not loops
    np.testing.assert_allclose(unrolled, looped, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("side", [jaxnets, by_hand])
def test_attacks_stay_in_the_ball_and_raise_the_loss(side, norm, loaded):
    done = work.Work("madry_cnn", "pgd", 3, norm, 4)
    found = loaded("madry_cnn")
    x_adv = side.make(done, found)()
    jn.verification.verify(norm, x_adv, found.x, jaxnets._threat(done))
    before, after = (float(jnp.mean(jn.losses.cross_entropy(found.model(x), found.y))) for x in (found.x, x_adv))
    assert after > before + 0.1


@pytest.mark.parametrize("method", ["train-pgd-2", "train-trades-2", "train-fgsm"])
def test_training_by_hand_takes_the_step_of_ours(method, loaded, monkeypatch):
    """Without room to attack, both take a step of SGD on the rows as they are."""
    monkeypatch.setitem(work.EPSILONS["madry_cnn"], "linf", 1e-9)
    found = loaded("madry_cnn")
    net = found.twin()
    by_hand.make(work.parse(f"madry_cnn {method} linf 4"), found._replace(twin=lambda: net))()
    optimizer = optax.sgd(0.01, momentum=0.9)
    state = jn.training.init_state(KEY, found.params, found.stats, optimizer)
    step = jax.jit(jn.training.make_step(jn.objectives.standard(found.net), optimizer))
    after = networks.twin_of(networks.NETWORKS["madry_cnn"], step(state, Batch(found.x, found.y))[0].params, {})()
    for ours, theirs, before in zip(after.parameters(), net.parameters(), found.twin().parameters(), strict=True):
        np.testing.assert_allclose(theirs.detach(), ours.detach(), atol=1e-6)
        assert (theirs - before).abs().max() > 1e-5


def test_work_is_read_as_it_is_written():
    for one in work.ON_CPU + work.ON_GPU:
        assert work.parse(str(one)) == one
    assert work.parse("small_cnn pgd-10 linf 4 bf16").precision == "bf16"
    for wrong in ("small_cnn pgd-10 linf", "nothing pgd-10 linf 4", "small_cnn pgd-10 l3 4", "small_cnn pgd-1 l2 4 f8"):
        with pytest.raises(ValueError, match="work is said as"):
            work.parse(wrong)


def test_what_a_side_lacks_is_said(loaded):
    with pytest.raises(NotOfferedError):
        by_hand.make(work.parse("madry_cnn square-10 linf 4"), loaded("madry_cnn"))


def test_the_limit_counts_gradients(loaded):
    found = loaded("madry_cnn")
    ten, forty, square = (
        limit.of_work(work.parse(f"madry_cnn {said} linf 4"), found) for said in ("pgd-10", "pgd-40", "square-10")
    )
    assert ten.times(4) == forty
    # Two convolutions of 5x5 without the products with their padding, two dense layers, two operations a product.
    first, second = (28 * 5 - 6) ** 2 * 32, (14 * 5 - 6) ** 2 * 64 * 32
    forward = 2 * 4 * (first + second + 3136 * 1024 + 1024 * 10)
    np.testing.assert_allclose(square.flops, 10 * forward, rtol=0.05)
    np.testing.assert_allclose(ten.flops, 10 * 2 * forward, rtol=0.05)
    trained = limit.of_work(work.parse("madry_cnn train-pgd-10 linf 4"), found)
    # The first convolution has no gradient by its input.
    np.testing.assert_allclose(trained.flops - ten.flops, 3 * forward - 2 * 4 * first, rtol=0.05)
    trades = limit.of_work(work.parse("madry_cnn train-trades-10 linf 4"), found)
    np.testing.assert_allclose(trades.flops - ten.flops, 2 * (trained.flops - ten.flops), rtol=0.05)
    assert limit.of_work(work.parse("madry_cnn autoattack linf 4"), found) is None
    assert limit.Cost(6.0, 1.0).seconds(limit.Rates(2.0, 4.0)) == (3.0, 0.25)


def test_the_limit_counts_no_products_with_zeros():
    """Which a convolution with few outputs has on a CPU."""
    convolve = lambda x, k: jn.models.layers.conv_general_dilated(x, k, (1, 1), "VALID")  # noqa: E731
    found = limit.cost(convolve, jnp.zeros((2, 8, 10, 6)), jnp.zeros((3, 3, 6, 8)))
    assert found.flops == 2 * (2 * 6 * 8 * 8) * (3 * 3 * 6)


def test_a_side_answers_from_its_own_process():
    side = Side("jaxnets")
    try:
        answer = side.ask(work.parse("resnet18_16 pgd-1 linf 2"))
        assert 0 < answer.seconds < 600
        assert 0 <= answer.survivors <= 1
        assert not answer.missing
        assert side.ask(work.parse("resnet18_16 nothing linf 2")).missing == "not offered"
    finally:
        side.close()
    assert side.ask(work.parse("resnet18_16 pgd-1 linf 2")).missing


def test_memory_is_kept_unless_the_caller_has_settings_of_his_own(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert "trim_threshold=17179869184" in environment()["GLIBC_TUNABLES"]
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    assert environment()["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=0"


def test_the_page_shows_what_was_measured(tmp_path):
    done = work.parse("small_cnn pgd-40 linf 512")
    ours = speed.timing([Answer(9.0, 0.5)] + [Answer(s, 0.5) for s in (1.0, 3.0, 2.0)])
    theirs = speed.timing([Answer(5.0, 0.6)] + [Answer(s, 0.6) for s in (5.0, 4.0, 9.0)])
    lacking = speed.timing([Answer(missing="not offered")] * 4)
    row = speed.Row(done, limit.Seconds(0.5, 0.1), {"jaxnets": ours, "by_hand": theirs, "art": lacking})
    assert row.ratio("by_hand") == 2.5
    rates = {"float32": limit.Rates(1.5e11, 2e10)}
    failed = speed.Row(done, None, dict.fromkeys(row.sides, lacking))
    report.write(tmp_path, rates, 3, [failed])
    assert "not offered" in (tmp_path / "RESULTS.md").read_text()
    report.write(tmp_path, rates, 3, [failed, row._replace(limit=None), row])
    page = (tmp_path / "RESULTS.md").read_text()
    assert "150 GFLOP/s in float32" in page
    assert "20 GB/s" in page
    last = [line for line in page.splitlines() if line.startswith("|")][-1]
    for said in (
        "small_cnn pgd-40 linf",
        "512",
        "0.5 (4.0) | 0.1 (20.0)",
        "| 256 | 9 |",
        "2 (1-3), 50.0% left",
        "**2.50x** 5 (4-9)",
        "not offered",
    ):
        assert said in last
    assert imread(tmp_path / "speed.png").std() > 0.02
    assert math.isnan(lacking.median)
    assert speed.timing([Answer(9.0, 0.5)]).median == 9.0


@pytest.mark.slow
def test_settings_of_compilers_are_timed_in_turns(monkeypatch):
    kept = {name: compilers.SETTINGS[name] for name in ("as it is", "attacks without loops", "no autotuning")}
    monkeypatch.setattr(compilers, "SETTINGS", kept)
    found = compilers.measured(work.parse("resnet18_16 pgd-2 linf 2"), rounds=1)
    assert list(found) == list(kept)
    assert all(0 < timing.median < timing.first for timing in found.values())
