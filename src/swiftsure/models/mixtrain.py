"""The six networks of MixTrain (Wang et al. 2018, as in its released code) and a small one for 8x8 digits."""

from __future__ import annotations

from torch import nn

from swiftsure.models.layers import Normalize, ResidualBlock, init_convolutions
from swiftsure.models.registry import register

MNIST_STATISTICS = ([0.1307], [0.3081])
# MixTrain's code divides each colour by the same .225.
CIFAR_STATISTICS = ([0.485, 0.456, 0.406], [0.225, 0.225, 0.225])
DIGITS_STATISTICS = ([0.3054], [0.3760])


def _finish(net: nn.Module, input_shape: tuple[int, int, int], classes: int) -> nn.Module:
    init_convolutions(net)
    net.input_shape, net.classes = input_shape, classes  # type: ignore[assignment]
    return net


def _small(channels: int, size: int, statistics: tuple[list[float], list[float]], classes: int) -> nn.Module:
    net = nn.Sequential(
        Normalize(*statistics),
        nn.Conv2d(channels, 16, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * (size // 4) ** 2, 100),
        nn.ReLU(),
        nn.Linear(100, classes),
    )
    return _finish(net, (channels, size, size), classes)


def _large(channels: int, size: int, statistics: tuple[list[float], list[float]], classes: int) -> nn.Module:
    net = nn.Sequential(
        Normalize(*statistics),
        nn.Conv2d(channels, 32, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 4, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * (size // 4) ** 2, 512),
        nn.ReLU(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Linear(512, classes),
    )
    return _finish(net, (channels, size, size), classes)


def _resnet(stem: nn.Conv2d, size: int, hidden: int, classes: int) -> nn.Module:
    net = nn.Sequential(
        Normalize(*CIFAR_STATISTICS),
        stem,
        nn.ReLU(),
        ResidualBlock(16, 16, down=True),
        ResidualBlock(16, 16, down=False),
        ResidualBlock(16, 32, down=True),
        ResidualBlock(32, 64, down=True),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    )
    return _finish(net, (3, size, size), classes)


@register("mnist_small")
def mnist_small(classes: int = 10) -> nn.Module:
    """Two 4x4 stride-2 convolutions (16, 32 channels) and two linear layers (100, 10) for 1x28x28 images."""
    return _small(1, 28, MNIST_STATISTICS, classes)


@register("cifar_small")
def cifar_small(classes: int = 10) -> nn.Module:
    """`mnist_small` for 3x32x32 images."""
    return _small(3, 32, CIFAR_STATISTICS, classes)


@register("mnist_large")
def mnist_large(classes: int = 10) -> nn.Module:
    """Four convolutions (32, 32, 64, 64 channels) and three linear layers (512, 512, 10) for 1x28x28 images."""
    return _large(1, 28, MNIST_STATISTICS, classes)


@register("cifar_large")
def cifar_large(classes: int = 10) -> nn.Module:
    """`mnist_large` for 3x32x32 images."""
    return _large(3, 32, CIFAR_STATISTICS, classes)


@register("cifar_resnet")
def cifar_resnet(classes: int = 10) -> nn.Module:
    """A 3x3 stem and four residual blocks (16, 16, 32, 64 channels), then linear 1000 and 10, for 3x32x32 images."""
    return _resnet(nn.Conv2d(3, 16, 3, 1, 1), 32, 1000, classes)


@register("imagenet200_resnet")
def imagenet200_resnet(classes: int = 200) -> nn.Module:
    """`cifar_resnet`'s blocks behind a 7x7 stride-2 stem, then linear 512 and 200, for 3x64x64 images."""
    return _resnet(nn.Conv2d(3, 16, 7, 2, 3), 64, 512, classes)


@register("digits_small")
def digits_small(width: int = 16, hidden: int = 64, classes: int = 10) -> nn.Module:
    """`mnist_small`'s shape scaled to 1x8x8 images: convolutions of width and 2 * width channels, linear layers."""
    net = nn.Sequential(
        Normalize(*DIGITS_STATISTICS),
        nn.Conv2d(1, width, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 4, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * 4 * 4, hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    )
    return _finish(net, (1, 8, 8), classes)
