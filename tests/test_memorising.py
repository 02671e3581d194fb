"""Every family of networks can learn by heart 64 real images, at a width that two cores bear.

Without JAXNETS_DATA the images are noise.
"""

import os
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxnets as jn
from jaxnets import models, objectives

ROWS = 64


@pytest.fixture(scope="module")
def batch():
    """The first images of CIFAR-10 in the folder JAXNETS_DATA; where there is none, noise of their shape.

    Noise is a stand-in: that a family learns real images is shown only by a run with JAXNETS_DATA.
    """
    archive = Path(os.environ.get("JAXNETS_DATA", "")) / "cifar10" / "cifar-10-batches-bin.tar.xz"
    if not archive.is_file():
        random = np.random.default_rng(0)
        return jn.types.Batch(random.uniform(size=(ROWS, 32, 32, 3)).astype(np.float32), random.integers(10, size=ROWS))
    with tarfile.open(archive, "r|xz") as files:
        first = next(file for file in files if file.name.endswith("data_batch_1.bin"))
        records = np.frombuffer(files.extractfile(first).read(ROWS * 3073), np.uint8).reshape(ROWS, 3073)
    images = records[:, 1:].reshape(ROWS, 3, 32, 32).transpose(0, 2, 3, 1)
    return jn.types.Batch(jn.data.to_float(np.ascontiguousarray(images)), records[:, 0].astype(np.int32))


def at_rows(batch):
    """Centres of radial basis functions at the images themselves."""
    return models.RBFNetwork(ROWS, width=3.0, centers_init=lambda key, shape: jnp.asarray(batch.x).reshape(shape))


FAMILIES = {
    "perceptron": lambda _: models.Perceptron(),
    "linear_perceptron": lambda _: models.Perceptron(unit=models.layers.identity),
    # Of so few hidden units that the layer above does not learn all rows by itself.
    "threshold_mlp": lambda _: models.MLP((48,), activation=models.layers.threshold),
    "mlp": lambda _: models.MLP((64,)),
    "rbf_network": lambda _: models.RBFNetwork(256),
    "rbf_network_at_rows": at_rows,
    "lenet5": lambda _: models.LeNet5(),
    "lenet5_modern": lambda _: models.LeNet5.modern(),
    "small_cnn": lambda _: models.SmallCNN(),
    "madry_cnn": lambda _: models.MadryCNN(),
    "alexnet": lambda _: models.AlexNet.small(width=16),
    "zfnet": lambda _: models.ZFNet.small(width=16),
    "vgg": lambda _: models.vgg11(10, width=8, hidden=64, places=1),
    "vgg_bn": lambda _: models.vgg11_bn(10, width=8, hidden=64, places=1),
    "googlenet": lambda _: models.GoogLeNet.small(width=1 / 8),
    "resnet": lambda _: models.resnet18(10, width=8, stem=models.cifar_stem),
    "bottleneck": lambda _: models.ResNet((1, 1, 1, 1), models.resnet.Bottleneck, 10, 8, models.cifar_stem),
    "preact_resnet": lambda _: models.preact_resnet18(width=8),
    "wide_resnet": lambda _: models.WideResNet(10, 1),
    "vit": lambda _: models.ViT(patch=4, width=48, depth=3, heads=3, classes=10),
}

QUICK = (
    "perceptron", "linear_perceptron", "threshold_mlp", "mlp", "rbf_network", "rbf_network_at_rows", "small_cnn"
)  # fmt: skip


def objective_of(name, net):
    """The cross-entropy but for heads in the middle, and for outputs that are zero or one.

    One layer of threshold units can give any labels to 64 rows in general position of 3,072 numbers, but the
    cross-entropy does not let it stay there: the softmax of zeros and ones never gives a class of ten more than
    ``e / (e + 9) = 0.23``, so the slopes of rows that are right stay almost as large as those of rows that are wrong.
    Those of the squared error are output minus label: Rosenblatt's rule, by which units rest where they are right.
    Threshold units in a hidden layer learn by the cross-entropy.
    """
    if name == "perceptron":
        return objectives.standard(net, loss=lambda z, y: optax.l2_loss(z, jax.nn.one_hot(y, z.shape[-1])).sum(-1))
    return objectives.auxiliary(net) if name == "googlenet" else objectives.standard(net)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_all_rows_are_learnt(name, batch):
    net = jn.from_linen(FAMILIES[name](batch))
    optimizer = optax.adam(2e-3)
    state = jn.training.init_state(jax.random.key(1), *jax.jit(net.init)(jax.random.key(0), batch.x[:1]), optimizer)
    step = jax.jit(jn.training.make_step(objective_of(name, net), optimizer))
    accuracy = jax.jit(lambda s: jnp.mean(jnp.argmax(net.infer(s.params, s.stats, batch.x), axis=1) == batch.y))
    for number in range(400):
        state, _ = step(state, batch)
        if number % 20 == 19 and accuracy(state) == 1:
            return
    assert accuracy(state) == 1
