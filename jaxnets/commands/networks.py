"""The names of networks on the command line, and what they stand for."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from jaxnets import models


class Named(NamedTuple):
    """A network by name.

    Attributes:
      make: ``(classes, side)`` of the images ``-> module``.
      image: height, width and channels of the images that it was published for.
      classes: of the data that it was published for.
    """

    make: Callable[[int, int], Any]
    image: tuple[int, int, int] = (224, 224, 3)
    classes: int = 1000


_SMALL = 64
"""Images below this side are taken by the forms for 32x32."""


def _either(large: Callable[..., Any], small: Callable[..., Any]) -> Named:
    return Named(lambda classes, side: (small if side < _SMALL else large)(classes))


def _vgg(make: Callable[..., Any]) -> Named:
    return _either(lambda classes: make(classes), lambda classes: make(classes, hidden=512, places=1))


def _resnet(make: Callable[..., Any]) -> Named:
    return _either(lambda classes: make(classes), lambda classes: make(classes, stem=models.cifar_stem))


def _preact(make: Callable[..., Any]) -> Named:
    return _cifar(lambda classes: make(classes=classes))


def _on(image: tuple[int, int, int], make: Callable[[int], Any]) -> Named:
    return Named(lambda classes, side: make(classes), image, 10)


def _lenet5(classes: int) -> Any:
    if classes != 10:
        raise ValueError(f"lenet5 compares with drawings of ten digits, got {classes} classes: take lenet5_modern")
    return models.LeNet5()


_mnist, _cifar = partial(_on, (28, 28, 1)), partial(_on, (32, 32, 3))

MODELS: dict[str, Named] = {
    "perceptron": _mnist(models.Perceptron),
    "mlp": _mnist(lambda classes: models.MLP(classes=classes)),
    "rbf_network": _mnist(lambda classes: models.RBFNetwork(classes=classes)),
    "lenet5": _mnist(_lenet5),
    "lenet5_modern": _mnist(models.LeNet5.modern),
    "small_cnn": _mnist(models.SmallCNN),
    "madry_cnn": _mnist(models.MadryCNN),
    "alexnet": _either(models.AlexNet, models.AlexNet.small),
    "alexnet_one_column": Named(lambda classes, _: models.AlexNet.one_column(classes)),
    "zfnet": _either(models.ZFNet, models.ZFNet.small),
    **{name: _vgg(getattr(models, name)) for name in ("vgg11", "vgg13", "vgg16", "vgg19")},
    **{name: _vgg(getattr(models, name)) for name in ("vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn")},
    "googlenet": _either(models.GoogLeNet, models.GoogLeNet.small),
    "googlenet_bn": _either(models.GoogLeNet.with_batch_norm, models.GoogLeNet.small),
    **{name: _resnet(getattr(models, name)) for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")},
    **{f"cifar_resnet{layers}": _cifar(partial(models.cifar_resnet, layers)) for layers in (20, 56, 110)},
    **{name: _preact(getattr(models, name)) for name in ("preact_resnet18", "preact_resnet34", "preact_resnet50")},
    **{name: _preact(getattr(models, name)) for name in ("preact_resnet110", "preact_resnet164", "preact_resnet1001")},
    "preact_resnet200": _either(
        lambda classes: models.preact_resnet200(classes=classes),
        lambda classes: models.preact_resnet200(classes=classes, stem=models.cifar_stem),
    ),
    "wide_resnet28_10": _cifar(models.wide_resnet28_10),
    "wide_resnet34_10": _cifar(models.wide_resnet34_10),
    "wide_resnet70_16": _cifar(models.wide_resnet70_16),
    "vit_small": _either(
        lambda classes: models.vit_small(classes=classes), lambda classes: models.vit_small(patch=4, classes=classes)
    ),
}


def module(name: str, classes: int, image: tuple[int, ...]) -> Any:
    """The network of a name for images ``[H, W, C]``.

    Raises:
      ValueError: for an unknown name.
    """
    if name not in MODELS:
        raise ValueError(f"no network is called {name!r}: take one of {', '.join(MODELS)}")
    return MODELS[name].make(classes, min(image[:2]))
