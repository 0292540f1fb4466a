"""Small networks of several exits on the digits, trained in a second or two, once a session."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

import swiftsure as ss
from attached import tuple_of
from swiftsure.ball import Ball
from swiftsure.exits import MultiExit
from trained import EPS, digits


def attached() -> MultiExit:
    """Three exits of digits_small, one of its heads with a hidden layer."""
    backbone = ss.models.build("digits_small", width=4, hidden=24)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(4 * 64, 10))
    hidden = nn.Sequential(nn.Flatten(), nn.Linear(8 * 16, 12), nn.ReLU(), nn.Linear(12, 10))
    return ss.attach(backbone, {"2": plain, "4": hidden})


def stages() -> MultiExit:
    """Four exits of a trunk of linear layers, one stage of which is a residual sum."""
    first = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU())
    rest = [nn.Sequential(nn.Linear(24, 24), nn.ReLU()), Sum(24), nn.Sequential(nn.Linear(24, 24), nn.Tanh())]
    return MultiExit([first, *rest], [nn.Linear(24, 10) for _ in range(4)])


class Sum(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.relu(self.inner(x))


def single() -> MultiExit:
    """The case K = 1."""
    return MultiExit([nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU())], [nn.Linear(20, 10)])


BUILDERS: dict[str, Callable[[], MultiExit]] = {"attached": attached, "stages": stages, "single": single}


@functools.cache
def exits(kind: str, proven: tuple[float, ...] = (), steps: int = 150) -> MultiExit:
    """A network of `BUILDERS` in evaluation mode, each exit with a share of its loss on interval bounds.

    Args:
        kind: which.
        proven: the share of each exit; () is plain training; of no steps, random weights.
        steps: of Adam.
    """
    torch.manual_seed(0)
    net = BUILDERS[kind]()
    train, generator = digits().train, torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for step in range(steps):
        x, y = train.batch(torch.randint(len(train), (64,), generator=generator))
        ramp = min(1.0, step / (0.6 * steps))
        loss = torch.stack([F.cross_entropy(z, y) for z in tuple_of(net(x))]).sum()
        if any(proven):
            bounds = tuple_of(ss.margins(net, x, y, Ball(1.2 * EPS * ramp)))
            for share, bound in zip(proven, bounds, strict=True):
                loss = loss + ramp * share * F.cross_entropy(-bound, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()
