"""Tiny networks trained on the digits in a second or two, once a session: some samples are provable, some are not."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftsure import data, models
from swiftsure.ball import Ball
from swiftsure.data import ImageSet

EPS = 0.06
BALLS = (Ball(EPS), Ball(0.2, "2"), Ball(0.4, "1"))


@functools.cache
def digits() -> data.Splits:
    return data.load("digits")


def held_out(count: int, start: int = 0) -> ImageSet:
    return digits().test.select(slice(start, start + count))


def worst_case(net: nn.Sequential, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Lower bounds of z_y - z_j, by intervals written out plainly."""
    lower, upper = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
    for module in list(net)[:-1]:
        if isinstance(module, nn.Conv2d | nn.Linear):
            middle, radius = (lower + upper) / 2, (upper - lower) / 2
            apply = F.linear if isinstance(module, nn.Linear) else F.conv2d
            options = (
                {} if isinstance(module, nn.Linear) else {"stride": module.stride, "padding": module.padding}
            )
            middle, radius = module(middle), apply(radius, module.weight.abs(), **options)
            lower, upper = middle - radius, middle + radius
        else:
            lower, upper = module(lower), module(upper)
    last = net[-1]
    difference = last.weight[y][:, None] - last.weight
    constant = last.bias[y][:, None] - last.bias
    bounds = difference.clamp_min(0) * lower[:, None] + difference.clamp_max(0) * upper[:, None]
    return bounds.sum(2) + constant


@functools.cache
def network(proven: float = 0.5, seed: int = 0) -> nn.Module:
    """digits_small, narrow, with a share of its loss on the worst case; 0 is plain training. In training mode."""
    torch.manual_seed(seed)
    net = models.build("digits_small", width=4, hidden=24)
    train = digits().train
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    generator = torch.Generator().manual_seed(seed)
    steps = 180
    for step in range(steps):
        x, y = train.batch(torch.randint(len(train), (64,), generator=generator))
        share = min(1.0, step / (0.6 * steps))
        loss = F.cross_entropy(net(x), y)
        if proven:
            bounds = worst_case(net, x, y, 1.2 * EPS * share)
            loss = (1 - proven * share) * loss + proven * share * F.cross_entropy(-bounds, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net
