"""The term by which side exits learn to leave provably, or to stay silent provably.

A certificate of an adaptive network asks two things of each side exit over the whole ball (`certificates._walk`): that
its label be right wherever it can fire, and, for the cost, that it always fire. So a sample whose label is proven at an
exit should leave there at every point of the ball: its highest entropy is pulled below the exit's threshold. Where the
label is not proven the exit had better never fire: the lowest entropy is pushed above the threshold. Ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swiftsure.bounds.entropy import (
    highest_entropy,
    highest_probability,
    lowest_entropy_bound,
    lowest_probability,
)


@dataclass(frozen=True)
class Leaving:
    """What the term needs to know.

    Attributes:
        weight: of the term, in units of the proven term's weight.
        rule: entropy or confidence.
        thresholds: one for each exit but the last.
    """

    weight: float
    rule: str
    thresholds: Sequence[float]


def leaving_loss(bounds: Sequence[tuple[Tensor, Tensor]], y: Tensor, leaving: Leaving) -> Tensor:
    """By how much each side exit's score lies on the wrong side of its threshold at worst: a scalar.

    The mean over samples of a hinge, summed over side exits; in nats for entropy. It has gradients to the bounds.

    Args:
        bounds: for each of K exits, lower and upper bounds of z_y - z_j over the ball, (batch, classes) each, entries
            y being 0.
        y: labels (batch,).
        leaving: rule and thresholds; its weight is not applied.
    """
    low_at, high_at = lowest_entropy_bound, highest_entropy
    sign = 1.0
    if leaving.rule == "confidence":
        low_at, high_at, sign = highest_probability, lowest_probability, -1.0
    parts = []
    for (lower, upper), threshold in zip(bounds[:-1], leaving.thresholds, strict=True):
        wrong = torch.ones_like(lower, dtype=torch.bool).scatter(1, y[:, None], False)
        proven = ((lower > 0) | ~wrong).all(1)
        for chosen, at, side in ((proven, high_at, sign), (~proven, low_at, -sign)):
            if chosen.any():
                score = at(-upper[chosen], -lower[chosen])
                parts.append((side * (score - threshold)).clamp_min(0).sum() / len(y))
    if not parts:
        return bounds[0][0].new_zeros(())
    return torch.stack(parts).sum().to(bounds[0][0].dtype)
