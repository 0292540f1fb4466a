"""Several runs of an attack from different starts, of which each sample keeps the worst."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Found(NamedTuple):
    """What a run came to for each of its samples."""

    x_adv: Tensor
    """(B, C, H, W)."""
    loss: Tensor
    """(B,): the objective there."""
    broken: Tensor
    """(B,) bool: the judge's word."""


# Takes the number of the run, from 0, and the images and labels that are left.
Run = Callable[[int, Tensor, Tensor], Found]


def worst_of(x: Tensor, y: Tensor, restarts: int, run: Run) -> Tensor:
    """The worst image per sample: a broken one before any other, then the largest objective; shaped like x.

    A sample broken once takes no part in later runs. A NaN is never the larger objective; where no run came to a
    number, x itself stays.

    Args:
        x: images.
        y: (B, ...), what the runs need to know of each sample.
        restarts: how many runs at most.
        run: one of them.
    """
    worst = x.clone()
    largest = x.new_full((len(x),), -math.inf)
    left = torch.arange(len(x), device=x.device)
    for number in range(restarts):
        found = run(number, x[left], y[left])
        loss = found.loss.to(x.dtype)
        better = found.broken | (loss > largest[left])
        worst[left[better]] = found.x_adv[better]
        largest[left[better]] = loss[better]
        left = left[~found.broken]
        if len(left) == 0:
            break
    return worst
