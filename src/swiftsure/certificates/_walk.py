"""The walk of a certificate over the exits of an adaptive network: which can fire, with what label, where it ends.

Given bounds of the logit differences z_j - z_y of every exit over the whole ball, the exits are visited in order. An
exit *cannot fire* if its score cannot pass its threshold anywhere in its box; then it asks for nothing. Where it can
fire, its label must be y whenever it does: for every other class j, either z_j - z_y < 0 throughout, or no point of the
box at which j is the largest logit lets the exit fire (the *second look*). An exit that *always fires* ends the walk,
as does the last one; what lies behind it is never reached. The deployed answer at any point of the ball is that of the
first exit that fires there, so it is y if every exit that was visited holds; and it costs no more than that last one.

Cost and label are independent: how far an image can get is known even where its label is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swiftsure.bounds.entropy import (
    highest_entropy,
    highest_probability,
    lowest_entropy,
    lowest_probability,
)
from swiftsure.exits import Policy

Box = tuple[Tensor, Tensor]
"""Lower and upper ends of z_j - z_y, (B, classes) each, entries y being 0."""

ROUNDING = 1e-12
"""Of a probability in float64. Ranges of entropies have their own slack already."""


@dataclass(frozen=True, eq=False)
class Walk:
    """What the walk finds of B samples.

    Attributes:
        margin: (B,) the least lower bound of z_y - z_j that the label needs: over the exits that can fire before the
            walk ends and the classes that could fire there. +inf where none is needed, -inf where it is no number.
        required: (B, K) bool, the exits at which an image of the ball may leave.
        max_exit: (B,) int64, the last exit that an image of the ball can reach.
    """

    margin: Tensor
    required: Tensor
    max_exit: Tensor


@dataclass(frozen=True)
class _Range:
    """A rule's answers for boxes of differences (n, classes) and a threshold: (n,) bool each."""

    silent: Callable[[Tensor, Tensor, float], Tensor]
    """Whether it cannot fire anywhere in the box."""
    certain: Callable[[Tensor, Tensor, float], Tensor]
    """Whether it fires everywhere in the box."""


_RANGES = {
    "entropy": _Range(
        silent=lambda low, high, limit: lowest_entropy(low, high, limit) >= limit,
        certain=lambda low, high, limit: highest_entropy(low, high) < limit,
    ),
    "confidence": _Range(
        silent=lambda low, high, limit: highest_probability(low, high) <= limit - ROUNDING,
        certain=lambda low, high, limit: lowest_probability(low, high) > limit + ROUNDING,
    ),
}


def walk(boxes: Sequence[Box], y: Tensor, policy: Policy, delta: float, logits: Sequence[Tensor]) -> Walk:
    """Visit the exits of each sample in order; see the head of this file.

    Args:
        boxes: for each of K exits, bounds of z_j - z_y over the ball, as computed: each box is widened by ``delta``,
            so that it holds the differences that the deployed network computes. NaN bounds nothing.
        y: (B,) int64, the label that must hold.
        policy: the rule and its K - 1 thresholds.
        delta: the allowance for rounding, in units of logits.
        logits: of the images themselves, (B, classes) for each exit: an exit that fires there can fire, and one that
            does not cannot always fire, which saves the search.
    """
    count, classes = boxes[0][0].shape
    device = y.device
    inside = torch.ones(count, dtype=torch.bool, device=device)
    margin = torch.full((count,), torch.inf, dtype=torch.float64, device=device)
    required = torch.zeros(count, len(boxes), dtype=torch.bool, device=device)
    max_exit = torch.full((count,), len(boxes) - 1, device=device)
    own = torch.nn.functional.one_hot(y, classes).bool()
    for exit, (lower, upper) in enumerate(boxes):
        last = exit == len(boxes) - 1
        low = (lower.double().nan_to_num(-torch.inf, torch.inf, -torch.inf) - delta).masked_fill(own, 0.0)
        high = (upper.double().nan_to_num(torch.inf, torch.inf, -torch.inf) + delta).masked_fill(own, 0.0)
        can, always = inside.clone(), inside.clone()
        if not last:
            ranges, limit = _RANGES[policy.rule], policy.thresholds[exit]
            fires = policy.fires(exit, logits[exit])
            asked = (inside & ~fires).nonzero()[:, 0]
            can[asked] = ~ranges.silent(low[asked], high[asked], limit)
            always = inside & fires
            asked = always.nonzero()[:, 0]
            always[asked] = ranges.certain(low[asked], high[asked], limit)
        # Where the bound says nothing, the margin is -inf, as is that of a NaN.
        needed = -upper.double().nan_to_num(torch.inf, torch.inf, -torch.inf)
        needed = needed.masked_fill(own, torch.inf)
        if not last:
            sample, rival = ((high >= 0) & ~own & can[:, None]).nonzero(as_tuple=True)
            harmless = _second_look(low[sample], high[sample], rival, ranges, limit)
            needed[sample[harmless], rival[harmless]] = torch.inf
        margin = torch.where(can, torch.minimum(margin, needed.amin(1)), margin)
        required[:, exit] = can
        max_exit[always] = exit
        inside = inside & ~always
    return Walk(margin, required, max_exit)


def rival_boxes(low: Tensor, high: Tensor, rival: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The part of each box at which a rival class is the largest logit, and whether it is empty.

    There z_rival - z_y >= 0, and no other difference exceeds it, so none exceeds its upper end.

    Args:
        low, high: (pairs, classes) boxes of differences; rival: (pairs,) int64.
    """
    column = rival[:, None]
    highest = high.gather(1, column)
    low = low.scatter(1, column, low.gather(1, column).clamp_min(0))
    high = torch.minimum(high, highest)
    return low, high, (low > high).any(1)


def _second_look(low: Tensor, high: Tensor, rival: Tensor, ranges: _Range, limit: float) -> Tensor:
    """Whether no point of a box at which the rival class is the largest lets the exit fire: (pairs,) bool."""
    low, high, harmless = rival_boxes(low, high, rival)
    asked = (~harmless).nonzero()[:, 0]
    harmless[asked] = ranges.silent(low[asked], high[asked], limit)
    return harmless
