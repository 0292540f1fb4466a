"""Defences that seem to work: each hides from plain gradient attacks what it does not take away.

Those without exits are made of the same plainly trained network for the digits, so that the truth is known: at this
radius hardly an image withstands anything. Those with exits have a head that a pattern of single pixels always turns.
`DEFENCES` are what the tests and benchmarks/broken_defences.py put before an evaluation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftsure.ball import Ball
from swiftsure.exits import MultiExit, Policy
from trained import digits, network

BALL = Ball(0.15)


class Loud(nn.Module):
    """Logits times 1e4: the softmax is exact to the last bit, and the gradient of the cross-entropy is 0."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return 1e4 * self.net(x)


class Rounded(nn.Module):
    """Pixels rounded to 16 levels: the gradient of a step is 0."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x * 15).round() / 15)


class Dropping(nn.Module):
    """Dropout of pixels left on, whatever the mode: every pass says something else."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(F.dropout(x, 0.3, training=True))


class Gated(nn.Module):
    """An argmax picks the expert that answers. The gradient knows the expert's own opinion, which hardly matters."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        generator = torch.Generator().manual_seed(1)
        self.opinion = nn.Linear(64, 10)
        self.opinion.weight.data = torch.randn(10, 64, generator=generator) / 64

    def forward(self, x: Tensor) -> Tensor:
        gate = F.one_hot(self.net(x).argmax(1), 10).to(x)
        return 5 * gate + self.opinion(x.flatten(1))


class Detecting(nn.Module):
    """Images whose pixels lie between the 17 levels of the data are taken for attacks, and get no gradient."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        off = (x * 16 - (x * 16).round()).abs().flatten(1).mean(1) > 0.1
        z = self.net(x)
        return torch.where(off[:, None], z.detach(), z)


class Details(nn.Module):
    """A weak head: it reads patterns of single pixels that no digit has, and that every attacker can draw."""

    def __init__(self) -> None:
        super().__init__()
        x, _ = digits().train.batch(slice(None))
        # Patterns of +-1, less what the 30 main directions of the data have of them.
        directions = torch.linalg.svd(x.flatten(1) - x.flatten(1).mean(0), full_matrices=False).Vh[:30]
        patterns = torch.randn(10, 64, generator=torch.Generator().manual_seed(1)).sign()
        patterns = 0.6 * (patterns - patterns @ directions.T @ directions).sign()
        self.read = nn.Linear(64, 10)
        self.read.weight.data = patterns
        self.read.bias.data = -(patterns @ x.flatten(1).mean(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.read(x.flatten(1))


def masked() -> MultiExit:
    """A weak head behind a threshold that no clean image passes, before a sound one.

    Who attacks the sound one never meets the weak one, which speaks up when an attacker wants it to.
    """
    sound = network(0.5, seed=1).eval()
    return MultiExit([nn.Identity(), nn.Identity()], [Details(), sound], Policy("entropy", [1.0])).eval()


class Coarse(nn.Module):
    """Logits of a head rounded to halves: where it is deployed, its gradient is 0."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return (2 * self.head(x)).round() / 2


class Steps(nn.Module):
    """Pixels rounded to 32 levels before a head reads them."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x * 31).round() / 31)


class Misleading(nn.Module):
    """Rounded pixels, and a slope on top that leads nowhere: no gradient is 0, and none is true."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = Steps(head)
        self.slope = nn.Linear(64, 10)
        self.slope.weight.data = torch.randn(10, 64, generator=torch.Generator().manual_seed(2)) / 100

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) + self.slope(x.flatten(1))


class Rippling(nn.Module):
    """A head that gives no gradient, and ripples on top that move it more than a small random move of the image does.

    No gradient is 0, and slopes agree with what small random moves change.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        generator = torch.Generator().manual_seed(3)
        self.waves = nn.Linear(64, 10, bias=False)
        self.waves.weight.data = torch.randn(10, 64, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.detach()) + 0.3 * torch.sin(self.waves(x.flatten(1)))


def masked_and_rounded(cover: Callable[[nn.Module], nn.Module]) -> MultiExit:
    """The weak head behind its threshold gives no gradient either; the sound one does, so no attack is quite blind."""
    sound = network(0.5, seed=1).eval()
    heads = [cover(Details()), sound]
    return MultiExit([nn.Identity(), nn.Identity()], heads, Policy("entropy", [1.0])).eval()


DEFENCES: dict[str, Callable[[], nn.Module]] = {
    "logits times 1e4": lambda: Loud(network(0).eval()),
    "rounded inputs": lambda: Rounded(network(0).eval()),
    "dropout left on": lambda: Dropping(network(0).eval()),
    "argmax gate": lambda: Gated(network(0).eval()),
    "detector without gradients": lambda: Detecting(network(0).eval()),
    "masked weak exit": masked,
    "masked weak exit, rounded logits": lambda: masked_and_rounded(Coarse),
    "masked weak exit, rounded inputs": lambda: masked_and_rounded(Steps),
    "masked weak exit, false slopes": lambda: masked_and_rounded(Misleading),
    "masked weak exit, ripples": lambda: masked_and_rounded(Rippling),
}
"""By name: a builder of the defended network, in evaluation mode."""
