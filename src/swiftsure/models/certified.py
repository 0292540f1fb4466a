"""The networks that certified training is compared on (as in Shi et al. 2021): CNN7 and CNN5, with batch norm."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from swiftsure.models.layers import Normalize
from swiftsure.models.mixtrain import CIFAR_STATISTICS, MNIST_STATISTICS
from swiftsure.models.registry import register

_STATISTICS = {1: MNIST_STATISTICS, 3: CIFAR_STATISTICS}
_HIDDEN = 512


def _build(
    convolutions: Sequence[tuple[int, int, int]], input_shape: Sequence[int], classes: int
) -> nn.Module:
    """Convolutions (channels out, kernel, stride), all padded by 1, and one hidden layer; batch norm and ReLU each."""
    shape = tuple(input_shape)
    if len(shape) != 3 or shape[0] not in _STATISTICS or min(shape[1:]) < 8 or any(n % 4 for n in shape[1:]):
        raise ValueError(
            f"input_shape {list(shape)}; allowed: [1 or 3, height, width], both multiples of 4, from 8"
        )
    channels, area = shape[0], shape[1] * shape[2]
    layers: list[nn.Module] = [Normalize(*_STATISTICS[channels])]
    for out, kernel, stride in convolutions:
        layers += [nn.Conv2d(channels, out, kernel, stride, 1), nn.BatchNorm2d(out), nn.ReLU()]
        channels, area = out, area // stride**2
    layers += [nn.Flatten(), nn.Linear(channels * area, _HIDDEN), nn.BatchNorm1d(_HIDDEN), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Linear(_HIDDEN, classes))
    _keep_widths(net)
    net.input_shape, net.classes = shape, classes  # type: ignore[assignment]
    return net


def _keep_widths(net: nn.Sequential) -> None:
    """Draw all weights but the last layer's from N(0, 2 pi / fan_in^2), in place (Shi et al. 2021).

    A row's absolute values then sum to 2 on average and a ReLU halves, so that intervals neither grow nor shrink.
    """
    *hidden, _ = (layer for layer in net if isinstance(layer, nn.Conv2d | nn.Linear))
    for layer in hidden:
        nn.init.normal_(layer.weight, 0.0, math.sqrt(2 * math.pi) / layer.weight[0].numel())


@register("cnn7")
def cnn7(input_shape: Sequence[int] = (3, 32, 32), classes: int = 10) -> nn.Module:
    """Five 3x3 convolutions (64, 64, 128 stride 2, 128, 128 channels), linear layers (512, classes), batch norm."""
    return _build([(64, 3, 1), (64, 3, 1), (128, 3, 2), (128, 3, 1), (128, 3, 1)], input_shape, classes)


@register("cnn5")
def cnn5(input_shape: Sequence[int] = (3, 32, 32), classes: int = 10) -> nn.Module:
    """Convolutions 3x3 of 64, 4x4 stride 2 of 64 and 128 channels, linear layers (512, classes), batch norm."""
    return _build([(64, 3, 1), (64, 4, 2), (128, 4, 2)], input_shape, classes)
