"""What attacks are tried on: images at the ends of their range, small networks, and the optimum of a linear one."""

import torch
from torch import nn

from swiftsure.ball import Ball

NORMS = ("inf", "2", "1")


def images(seed: int, *shape: int) -> torch.Tensor:
    """Images with many pixels exactly at the ends of the range, where clipping happens."""
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 1.6 - 0.3).clamp(0, 1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(side: int, classes: int = 2, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(side * side, classes))


def conv_net(classes: int = 3, seed: int = 0) -> nn.Sequential:
    """Dropout and batch norm, in training mode but for a batch norm frozen in evaluation mode."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5),
        nn.Flatten(), nn.Linear(64, classes),
    )  # fmt: skip
    net[4].eval()
    return net


class TwoExits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.early, self.late = nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.early(x.flatten(1)), self.late(x.flatten(1))


class Counted(nn.Module):
    """Counts the samples of every forward pass."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        # Without it, attacks would pass one image to learn how many classes there are.
        self.config = {"classes": None}
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(x))
        return self.net(x)


def optimum(w: torch.Tensor, x: torch.Tensor, ball: Ball) -> torch.Tensor:
    """max <w, d> over the ball, per image, in float64: closed forms, or bisection on the dual variable."""
    w, x = w.double().expand(len(x), -1), x.flatten(1).double()
    room = torch.where(w > 0, ball.high - x, x - ball.low)
    size = w.abs()
    if ball.norm == "inf":
        return (size * room.clamp_max(ball.radius)).sum(1)
    if ball.norm == "1":
        best = []
        for row, space in zip(size, room, strict=True):
            left, total = ball.radius, 0.0
            for i in row.argsort(descending=True).tolist():
                move = min(left, space[i].item())
                left, total = left - move, total + move * row[i].item()
            best.append(total)
        return torch.tensor(best, dtype=torch.float64)
    low, high = torch.zeros(len(x), 1).double(), torch.full((len(x), 1), 1e9).double()
    for _ in range(200):
        middle = (low + high) / 2
        inside = torch.minimum(size * middle, room).norm(dim=1, keepdim=True) <= ball.radius
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return (size * torch.minimum(size * low, room)).sum(1)
