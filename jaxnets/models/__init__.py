"""Networks: one architecture a file, from shared layers. Images are ``[B, H, W, C]`` in data space."""

from jaxnets.models.alexnet import AlexNet
from jaxnets.models.googlenet import GoogLeNet
from jaxnets.models.lenet import LeNet5
from jaxnets.models.madry_cnn import MadryCNN
from jaxnets.models.mlp import MLP
from jaxnets.models.perceptron import Perceptron
from jaxnets.models.preact_resnet import (
    PreActResNet,
    preact_resnet18,
    preact_resnet34,
    preact_resnet50,
    preact_resnet110,
    preact_resnet164,
    preact_resnet200,
    preact_resnet1001,
)
from jaxnets.models.rbf_network import RBFNetwork
from jaxnets.models.resnet import (
    ResNet,
    cifar_resnet,
    cifar_stem,
    imagenet_stem,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
)
from jaxnets.models.small_cnn import SmallCNN
from jaxnets.models.summary import Summary, summary
from jaxnets.models.vgg import VGG, vgg11, vgg11_bn, vgg13, vgg13_bn, vgg16, vgg16_bn, vgg19, vgg19_bn
from jaxnets.models.vit import ViT, vit_small
from jaxnets.models.wide_resnet import WideResNet, wide_resnet28_10, wide_resnet34_10, wide_resnet70_16
from jaxnets.models.zfnet import ZFNet

__all__ = [
    "MLP", "VGG", "AlexNet", "GoogLeNet", "LeNet5", "MadryCNN", "Perceptron", "PreActResNet", "RBFNetwork",
    "ResNet", "SmallCNN", "Summary", "ViT", "WideResNet", "ZFNet", "cifar_resnet", "cifar_stem", "imagenet_stem",
    "preact_resnet18", "preact_resnet34", "preact_resnet50", "preact_resnet110", "preact_resnet164",
    "preact_resnet200", "preact_resnet1001", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "summary",
    "vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn", "vit_small",
    "wide_resnet28_10", "wide_resnet34_10", "wide_resnet70_16",
]  # fmt: skip
