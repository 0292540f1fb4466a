"""A backbone to attach exits to, with what real code has."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """A residual block with what real code has: a module used twice, in-place operations, `+=`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.b = nn.Conv2d(channels, channels, 3, 1, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm(self.a(x)))
        y = self.b(y)
        y += x
        return self.relu(y)


class Backbone(nn.Module):
    """A number from the batch that is used late, a buffer, a constant, chunks, functional dropout, an argument more."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]))
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.first = nn.Sequential(Block(8), Block(8))
        self.second = nn.Sequential(Block(8), Block(8))
        self.unused = nn.Linear(2, 2)
        self.fc = nn.Linear(8 * 16, classes)

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        count = x.size(0)
        x = F.dropout(F.relu(self.stem(x - self.mean[:, None, None])), 0.3, self.training)
        front, back = self.first(x).chunk(2, 1)
        x = self.second(torch.cat([back, front], 1)) * torch.tensor(2.0)
        if scale is not None:
            x = x * scale
        x = F.adaptive_avg_pool2d(x, 4)
        return self.fc(x.view(count, -1))


def backbone(seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    net = Backbone()
    net.train()
    with torch.no_grad():
        for _ in range(3):
            net(torch.rand(8, 3, 8, 8))
    return net


def images(count: int = 6, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def tuple_of(logits: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (logits,) if isinstance(logits, Tensor) else logits
