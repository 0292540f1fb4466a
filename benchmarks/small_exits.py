"""Networks of two to four inputs and a few dozen ReLUs, with exits, and what they do all over a ball: on a fine grid.

A grid over so few inputs leaves little unseen, so that it can stand for the truth: a certificate that contradicts it is
wrong, and a sample that holds on all of it but is not certified counts as missed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swiftsure as ss
from swiftsure.ball import Ball
from swiftsure.exits import MultiExit, Policy

WIDTH = 12
CENTERS = 12
AT_ONCE = 400_000


@dataclass(frozen=True)
class Truth:
    """What a grid over the ball around each of B images shows.

    Attributes:
        safe: (B,) bool, whether the deployed answer is the label everywhere.
        deepest: (B,) int64, the last exit that any point comes to.
        leaves: (B, K) bool, the exits by which points leave.
    """

    safe: Tensor
    deepest: Tensor
    leaves: Tensor


def network(inputs: int, exits: int = 3, proven: float = 0.5, seed: int = 0) -> MultiExit:
    """A network of linear layers in evaluation mode, trained for a second or two, each exit also on interval bounds.

    Args:
        inputs: numbers in an image (1, 1, inputs).
        exits: of `WIDTH` ReLUs each.
        proven: the weight of the loss on interval bounds at radius 0.05; 0 is plain training.
    """
    torch.manual_seed(seed)
    stages = [nn.Sequential(nn.Flatten(), nn.Linear(inputs, WIDTH), nn.ReLU())]
    stages += [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(exits - 1)]
    net = MultiExit(stages, [nn.Linear(WIDTH, 3) for _ in range(exits)])
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    x, y = images(2000, inputs, seed)
    generator = torch.Generator().manual_seed(seed)
    for step in range(250):
        batch = torch.randint(len(x), (128,), generator=generator)
        loss = sum_of(net(x[batch]), y[batch])
        if proven:
            bounds = ss.margins(net, x[batch], y[batch], Ball(0.05 * min(1.0, step / 150)))
            loss = loss + proven * sum_of(bounds, y[batch], -1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def sum_of(logits: Tensor | tuple[Tensor, ...], y: Tensor, sign: int = 1) -> Tensor:
    """The cross-entropies of all exits, of their logits or (sign -1) of lower bounds of their margins."""
    exits = (logits,) if isinstance(logits, Tensor) else logits
    return torch.stack([F.cross_entropy(sign * z, y) for z in exits]).sum()


def images(count: int, inputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points of the unit cube (count, 1, 1, inputs), labelled by which of some fixed points is nearest."""
    centers = torch.rand(CENTERS, inputs, generator=torch.Generator().manual_seed(100 + seed))
    x = torch.rand(count, inputs, generator=torch.Generator().manual_seed(count + seed))
    return x[:, None, None], torch.cdist(x, centers).argmin(1) % 3


def truth(net: MultiExit, x: Tensor, y: Tensor, ball: Ball, policy: Policy, points: int) -> Truth:
    """Run the network, as it is deployed, on a grid over the ball around each image.

    Args:
        net, policy: what is deployed.
        x, y: images and the labels that should hold.
        ball: corners of the grid that lie outside are moved to its edge.
        points: along each axis.
    """
    axes = torch.cartesian_prod(*[torch.linspace(-1, 1, points)] * x[0].numel())
    offsets = ball.radius * axes.view(-1, 1, *x.shape[1:])
    safe, deepest = torch.ones_like(y, dtype=torch.bool), torch.zeros_like(y)
    leaves = torch.zeros(len(x), net.exits, dtype=torch.bool)
    with torch.no_grad():
        for part in offsets.split(max(1, AT_ONCE // len(x))):
            images = x.expand(len(part), *x.shape)
            found = ball.project((images + part).flatten(0, 1), images.flatten(0, 1))
            answer = net.adaptive(found, policy)
            exit = answer.exit.view(len(part), len(x))
            safe &= (answer.label.view(len(part), len(x)) == y).all(0)
            deepest = torch.maximum(deepest, exit.amax(0))
            leaves |= F.one_hot(exit, net.exits).bool().any(0)
    return Truth(safe, deepest, leaves)
