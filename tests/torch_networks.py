"""The published networks in plain PyTorch, with torchvision's names (or their authors'): what ours are held against.

Written from the papers, without a line of jaxnets; numbers of features are arguments so that tests can be small.
"""

from collections import OrderedDict
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional


def randomized(net, seed=0):
    """All weights and running statistics drawn anew, none left at the zeros and ones that would hide a mistake."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=draw)
            if value.ndim > 1:
                value.copy_(noise * (2 / value[0].numel()) ** 0.5)
            elif name.endswith("running_var"):
                value.copy_(0.5 + noise.abs())
            else:
                value.copy_(0.1 * noise + (name.endswith("weight")))
    return net.eval()


def conv3x3(inputs, outputs, stride=1):
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


def conv1x1(inputs, outputs, stride=1):
    return nn.Conv2d(inputs, outputs, 1, stride, bias=False)


def across_channels():
    """The alpha of the AlexNet paper is 1e-4; PyTorch divides its own by the number of channels."""
    return nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)


# Chains.


class Features(nn.Module):
    """torchvision's AlexNet and VGG: features, pooling to a size, classifier."""

    def __init__(self, features, classifier, places):
        super().__init__()
        self.features, self.classifier = nn.Sequential(*features), nn.Sequential(*classifier)
        self.avgpool = nn.AdaptiveAvgPool2d(places)

    def forward(self, x):
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def alexnet(classes=10, features=(64, 192, 384, 256, 256), hidden=4096, groups=1, norm=None):
    """Without groups and normalisation that of torchvision."""
    a, b, c, d, e = features
    across = [across_channels()] if norm else []
    layers = [
        nn.Conv2d(3, a, 11, 4, 2), nn.ReLU(), *across, nn.MaxPool2d(3, 2),
        nn.Conv2d(a, b, 5, padding=2, groups=groups), nn.ReLU(), *across, nn.MaxPool2d(3, 2),
        nn.Conv2d(b, c, 3, padding=1), nn.ReLU(),
        nn.Conv2d(c, d, 3, padding=1, groups=groups), nn.ReLU(),
        nn.Conv2d(d, e, 3, padding=1, groups=groups), nn.ReLU(), nn.MaxPool2d(3, 2),
    ]  # fmt: skip
    head = [
        nn.Dropout(), nn.Linear(36 * e, hidden), nn.ReLU(),
        nn.Dropout(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, classes),
    ]  # fmt: skip
    return Features(layers, head, 6)


def zfnet(classes=10, features=(96, 256, 384, 384, 256), hidden=4096):
    a, b, c, d, e = features
    layers = [
        nn.Conv2d(3, a, 7, 2, 1), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), across_channels(),
        nn.Conv2d(a, b, 5, 2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), across_channels(),
        nn.Conv2d(b, c, 3, padding=1), nn.ReLU(),
        nn.Conv2d(c, d, 3, padding=1), nn.ReLU(),
        nn.Conv2d(d, e, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
    ]  # fmt: skip
    head = [
        nn.Linear(36 * e, hidden), nn.ReLU(), nn.Dropout(),
        nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(), nn.Linear(hidden, classes),
    ]  # fmt: skip
    return Features(layers, head, 6)


def vgg(stages, classes=10, width=64, hidden=4096, places=7, norm=False):
    layers, inputs = [], 3
    for count, times in zip(stages, (1, 2, 4, 8, 8), strict=True):
        for _ in range(count):
            layers.append(nn.Conv2d(inputs, times * width, 3, padding=1))
            layers += [nn.BatchNorm2d(times * width)] * norm + [nn.ReLU()]
            inputs = times * width
        layers.append(nn.MaxPool2d(2))
    head = [
        nn.Linear(places**2 * inputs, hidden), nn.ReLU(), nn.Dropout(),
        nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(), nn.Linear(hidden, classes),
    ]  # fmt: skip
    return Features(layers, head, places)


def mlp(image, widths, classes=10):
    """Of images ``(C, H, W)``."""
    sizes = [image[0] * image[1] * image[2], *widths]
    hidden = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], classes))


def small_cnn(classes=10):
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(1568, 100), nn.ReLU(), nn.Linear(100, classes),
    )  # fmt: skip


def madry_cnn(classes=10):
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(3136, 1024), nn.ReLU(), nn.Linear(1024, classes),
    )  # fmt: skip


class LeNet(nn.Module):
    """With attributes, defined in order, in place of a sequence."""

    def __init__(self, classes=10):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, classes)

    def forward(self, x):
        x = functional.max_pool2d(functional.relu(self.conv1(x)), 2)
        x = torch.flatten(functional.max_pool2d(functional.relu(self.conv2(x)), 2), 1)
        return self.fc3(functional.relu(self.fc2(functional.relu(self.fc1(x)))))


# The first ones.


class Perceptron(nn.Module):
    """Units that are one or zero, with the slope of the identity."""

    def __init__(self, inputs, classes=10):
        super().__init__()
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x):
        z = self.linear(torch.flatten(x, 1))
        return (z >= 0).to(z.dtype) + (z - z.detach())


class RBFNetwork(nn.Module):
    """Widths by their logarithms."""

    def __init__(self, inputs, centers, classes=10):
        super().__init__()
        self.centers = nn.Parameter(torch.zeros(centers, inputs))
        self.log_width = nn.Parameter(torch.zeros(centers))
        self.linear = nn.Linear(centers, classes)

    def forward(self, x):
        distance = torch.cdist(torch.flatten(x, 1), self.centers, compute_mode="donot_use_mm_for_euclid_dist")
        return self.linear(torch.exp(-0.5 * (distance / torch.exp(self.log_width)) ** 2))


# A row for each map of S2, a column for each map of C3: table I of LeCun et al. 1998.
C3_TABLE = (
    "X...XXX..XXXX.XX",
    "XX...XXX..XXXX.X",
    "XXX...XXX..X.XXX",
    ".XXX..XXXX..X.XX",
    "..XXX..XXXX.XX.X",
    "...XXX..XXXX.XXX",
)


class Subsampling(nn.Module):
    """A coefficient and a bias for each map."""

    def __init__(self, maps):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(maps, 1, 1)), nn.Parameter(torch.zeros(maps, 1, 1))

    def forward(self, x):
        return self.weight * functional.avg_pool2d(x, 2) + self.bias


class LeNet1998(nn.Module):
    """For images of 28x28. The drawings ``[10, 84]`` are figures in the paper, and so an argument here."""

    def __init__(self, drawings):
        super().__init__()
        self.c1, self.s2 = nn.Conv2d(1, 6, 5, padding=2), Subsampling(6)
        self.c3, self.s4 = nn.Conv2d(6, 16, 5), Subsampling(16)
        self.c5, self.f6 = nn.Conv2d(16, 120, 5), nn.Linear(120, 84)
        self.drawings = drawings
        self.seen = torch.tensor([[mark == "X" for mark in row] for row in C3_TABLE]).T[:, :, None, None]

    def forward(self, x):
        x = self.squash(self.s2(self.squash(self.c1(x))))
        x = functional.conv2d(x, self.c3.weight * self.seen, self.c3.bias)
        x = self.squash(self.c5(self.squash(self.s4(self.squash(x)))))
        x = self.squash(self.f6(torch.flatten(x, 1)))
        return x @ self.drawings.T - (x**2).sum(1, keepdim=True) / 2 - (self.drawings**2).sum(1) / 2

    def squash(self, x):
        return 1.7159 * torch.tanh(x * 2 / 3)


# Residual networks.


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs, features, stride):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(inputs, features, stride), nn.BatchNorm2d(features)
        self.conv2, self.bn2 = conv3x3(features, features), nn.BatchNorm2d(features)
        self.downsample = projection(inputs, features, stride)

    def forward(self, x):
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs, features, stride):
        super().__init__()
        self.conv1, self.bn1 = conv1x1(inputs, features), nn.BatchNorm2d(features)
        self.conv2, self.bn2 = conv3x3(features, features, stride), nn.BatchNorm2d(features)
        self.conv3, self.bn3 = conv1x1(features, 4 * features), nn.BatchNorm2d(4 * features)
        self.downsample = projection(inputs, 4 * features, stride)

    def forward(self, x):
        y = functional.relu(self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x))))))
        return functional.relu(self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x)))


def projection(inputs, outputs, stride):
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))


class Stages(nn.Module):
    """``layer1`` and so on, the first block of each but the first with stride 2."""

    def make_stages(self, block, counts, width):
        inputs, self.count = width, len(counts)
        for stage, count in enumerate(counts):
            layers = []
            for number in range(count):
                layers.append(block(inputs, width * 2**stage, 2 if stage and not number else 1))
                inputs = width * 2**stage * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        return inputs

    def run_stages(self, x):
        for number in range(1, self.count + 1):
            x = getattr(self, f"layer{number}")(x)
        return x


class ResNet(Stages):
    """For 224x224, or with ``small`` for 32x32."""

    def __init__(self, block, counts, classes=10, width=64, small=False):
        super().__init__()
        self.conv1 = conv3x3(3, width) if small else nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.pool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        self.fc = nn.Linear(self.make_stages(block, counts, width), classes)

    def forward(self, x):
        x = self.run_stages(self.pool(functional.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


class PreActBlock(nn.Module):
    """The shortcut is a sequence of one convolution."""

    expansion = 1

    def __init__(self, inputs, features, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv3x3(inputs, features, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(features), conv3x3(features, features)
        if stride != 1 or inputs != features:
            self.shortcut = nn.Sequential(conv1x1(inputs, features, stride))

    def forward(self, x):
        active = functional.relu(self.bn1(x))
        past = self.shortcut(active) if hasattr(self, "shortcut") else x
        return self.conv2(functional.relu(self.bn2(self.conv1(active)))) + past


class PreActResNet(Stages):
    def __init__(self, counts, classes=10, width=64):
        super().__init__()
        self.conv1 = conv3x3(3, width)
        outputs = self.make_stages(PreActBlock, counts, width)
        self.bn, self.linear = nn.BatchNorm2d(outputs), nn.Linear(outputs, classes)

    def forward(self, x):
        x = self.run_stages(self.conv1(x))
        return self.linear(functional.relu(self.bn(x)).mean((2, 3)))


class WideBlock(nn.Module):
    """By the names of TRADES."""

    def __init__(self, inputs, features, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv3x3(inputs, features, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(features), conv3x3(features, features)
        self.convShortcut = None if inputs == features else conv1x1(inputs, features, stride)

    def forward(self, x):
        active = functional.relu(self.bn1(x))
        past = x if self.convShortcut is None else self.convShortcut(active)
        return past + self.conv2(functional.relu(self.bn2(self.conv1(active))))


class WideGroup(nn.Module):
    def __init__(self, count, inputs, features, stride):
        super().__init__()
        first = WideBlock(inputs, features, stride)
        self.layer = nn.Sequential(first, *(WideBlock(features, features, 1) for _ in range(count - 1)))

    def forward(self, x):
        return self.layer(x)


class WideResNet(nn.Module):
    """With the group that TRADES has and never calls."""

    def __init__(self, depth, widen, classes=10):
        super().__init__()
        count, (a, b, c, d) = (depth - 4) // 6, (16, 16 * widen, 32 * widen, 64 * widen)
        self.conv1, self.block1 = conv3x3(3, a), WideGroup(count, a, b, 1)
        self.sub_block1 = WideGroup(count, a, b, 1)
        self.block2, self.block3 = WideGroup(count, b, c, 2), WideGroup(count, c, d, 2)
        self.bn1, self.fc = nn.BatchNorm2d(d), nn.Linear(d, classes)

    def forward(self, x):
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(functional.relu(self.bn1(x)).mean((2, 3)))


# GoogLeNet: with batch norm as torchvision has it, and as published without.


class BasicConv2d(nn.Module):
    def __init__(self, inputs, outputs, kernel, **settings):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, bias=False, **settings)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x):
        return functional.relu(self.bn(self.conv(x)))


class PlainConv2d(nn.Module):
    def __init__(self, inputs, outputs, kernel, **settings):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, **settings)

    def forward(self, x):
        return functional.relu(self.conv(x))


class Inception(nn.Module):
    def __init__(self, conv, largest, inputs, one, before_three, three, before_five, five, after_pool):
        super().__init__()
        self.branch1 = conv(inputs, one, 1)
        self.branch2 = nn.Sequential(conv(inputs, before_three, 1), conv(before_three, three, 3, padding=1))
        last = conv(before_five, five, largest, padding=largest // 2)
        self.branch3 = nn.Sequential(conv(inputs, before_five, 1), last)
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), conv(inputs, after_pool, 1))
        self.outputs = one + three + five + after_pool

    def forward(self, x):
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class InceptionAux(nn.Module):
    """Dense layers take as many ``places`` as ``pool`` leaves."""

    def __init__(self, conv, pool, places, inputs, features, hidden, classes):
        super().__init__()
        self.pool, self.conv = pool, conv(inputs, features, 1)
        self.fc1, self.fc2 = nn.Linear(places * features, hidden), nn.Linear(hidden, classes)

    def forward(self, x):
        x = torch.flatten(self.conv(self.pool(x)), 1)
        return self.fc2(functional.dropout(functional.relu(self.fc1(x)), 0.7, self.training))


class GoogLeNet(nn.Module):
    """``forward`` gives the logits and those of both auxiliary heads."""

    table = {  # noqa: RUF012
        "3a": (64, 96, 128, 16, 32, 32), "3b": (128, 128, 192, 32, 96, 64), "4a": (192, 96, 208, 16, 48, 64),
        "4b": (160, 112, 224, 24, 64, 64), "4c": (128, 128, 256, 24, 64, 64), "4d": (112, 144, 288, 32, 64, 64),
        "4e": (256, 160, 320, 32, 128, 128), "5a": (256, 160, 320, 32, 128, 128),
        "5b": (384, 192, 384, 48, 128, 128),
    }  # fmt: skip
    conv, largest, last_window, head_pool = BasicConv2d, 3, 2, nn.AdaptiveAvgPool2d(4)

    def __init__(self, classes=10, divide=1, places=16):
        super().__init__()
        inputs, heads = 192 // divide, {"4a": "aux1", "4d": "aux2"}
        self.conv1 = self.conv(3, 64 // divide, 7, stride=2, padding=3)
        self.conv2 = self.conv(64 // divide, 64 // divide, 1)
        self.conv3 = self.conv(64 // divide, inputs, 3, padding=1)
        for name, features in self.table.items():
            module = Inception(self.conv, self.largest, inputs, *(number // divide for number in features))
            inputs = module.outputs
            self.add_module(f"inception{name}", module)
            if name in heads:
                sizes = places, inputs, 128 // divide, 1024 // divide, classes
                self.add_module(heads[name], InceptionAux(self.conv, self.head_pool, *sizes))
        self.dropout, self.fc = nn.Dropout(0.2), nn.Linear(inputs, classes)

    def forward(self, x):
        halve = nn.MaxPool2d(3, 2, ceil_mode=True)
        x = self.inception4a(halve(self.inception3b(self.inception3a(self.stem(x, halve)))))
        first, x = self.aux1(x), self.inception4d(self.inception4c(self.inception4b(x)))
        second, x = self.aux2(x), self.inception4e(x)
        x = functional.max_pool2d(x, self.last_window, 2, ceil_mode=True)
        x = self.inception5b(self.inception5a(x))
        return self.fc(self.dropout(x.mean((2, 3)))), first, second

    def stem(self, x, halve):
        return halve(self.conv3(self.conv2(halve(self.conv1(x)))))


def googlenet_module(classes=10, divide=1):
    """Cut off after the first module, with an auxiliary head at its end."""
    module = Inception(BasicConv2d, 3, 192 // divide, *(number // divide for number in GoogLeNet.table["3a"]))
    head = 16, module.outputs, 128 // divide, 1024 // divide, classes
    layers = {
        "conv1": BasicConv2d(3, 64 // divide, 7, stride=2, padding=3), "pool1": nn.MaxPool2d(3, 2, ceil_mode=True),
        "conv2": BasicConv2d(64 // divide, 64 // divide, 1),
        "conv3": BasicConv2d(64 // divide, 192 // divide, 3, padding=1), "pool2": nn.MaxPool2d(3, 2, ceil_mode=True),
        "inception3a": module, "aux": InceptionAux(BasicConv2d, nn.AdaptiveAvgPool2d(4), *head),
    }  # fmt: skip
    return nn.Sequential(OrderedDict(layers))


class PublishedGoogLeNet(GoogLeNet):
    """Of the paper's table 1 and figure 3; heads see means of 5x5 places, every three."""

    conv, largest, last_window, head_pool = PlainConv2d, 5, 3, nn.AvgPool2d(5, 3)

    def stem(self, x, halve):
        across = across_channels()
        return halve(across(self.conv3(self.conv2(across(halve(self.conv1(x)))))))


# Transformers.


class ViT(nn.Module):
    """Blocks are PyTorch's own encoder layers, normalising first."""

    def __init__(self, image, patch, width, depth, heads, classes=10):
        """Of images ``(C, H, W)``."""
        super().__init__()
        self.patches = nn.Conv2d(image[0], width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + (image[1] // patch) * (image[2] // patch), width))
        settings = {"dropout": 0.0, "activation": "gelu", "layer_norm_eps": 1e-6, "batch_first": True}
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(width, heads, 4 * width, norm_first=True, **settings) for _ in range(depth))
        )
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, classes)

    def forward(self, x):
        x = torch.flatten(self.patches(x), 2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])
