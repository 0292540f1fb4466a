"""Building blocks that the papers' networks share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """(x - mean) / std per channel: the first layer of every network here, so that eps stays in pixel units.

    Args:
        mean: one value per channel, in pixel units.
        std: one positive value per channel, in pixel units.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) in [0, 1] to the same shape, normalised."""
        return (x - self.mean[:, None, None]) / self.std[:, None, None]

    def extra_repr(self) -> str:
        """Shown by print(net)."""
        return f"mean={self.mean.tolist()}, std={self.std.tolist()}"


class ResidualBlock(nn.Module):
    """relu(conv_b(relu(conv_a(x))) + skip(x)), with biases and without batch norm (MixTrain's block).

    Args:
        channels_in, channels_out: channels.
        down: halve height and width (conv_a 4x4 stride 2, skip 2x2 stride 2) or keep them (3x3 and 1x1).
    """

    def __init__(self, channels_in: int, channels_out: int, *, down: bool) -> None:
        super().__init__()
        kernel, stride, skip = (4, 2, 2) if down else (3, 1, 1)
        self.conv_a = nn.Conv2d(channels_in, channels_out, kernel, stride, 1)
        self.relu_a = nn.ReLU()
        self.conv_b = nn.Conv2d(channels_out, channels_out, 3, 1, 1)
        self.skip = nn.Conv2d(channels_in, channels_out, skip, stride, 0)
        self.relu_b = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels_in, H, W) to (batch, channels_out, H or H/2, W or W/2)."""
        return self.relu_b(self.conv_b(self.relu_a(self.conv_a(x))) + self.skip(x))


def init_convolutions(net: nn.Module) -> None:
    """Draw every convolution from N(0, 2 / (k * k * channels_out)) with zero bias, in place (MixTrain's code)."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, 0.0, (2 / fan_out) ** 0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
