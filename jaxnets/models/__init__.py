"""Networks: one architecture a file, from shared layers. Images are ``[B, H, W, C]`` in data space."""

from jaxnets.models.lenet import LeNet5
from jaxnets.models.madry_cnn import MadryCNN
from jaxnets.models.mlp import MLP
from jaxnets.models.resnet import (
    ResNet,
    cifar_stem,
    imagenet_stem,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
)
from jaxnets.models.small_cnn import SmallCNN

__all__ = [
    "MLP", "LeNet5", "MadryCNN", "ResNet", "SmallCNN", "cifar_stem", "imagenet_stem", "resnet18", "resnet34",
    "resnet50", "resnet101", "resnet152",
]  # fmt: skip
