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
        open: (B, K) bool, the exits whose bounds, were they tighter, might yet prove the label.
        failing: (B, K) bool, the exits that may give another answer, as far as is known.
    """

    margin: Tensor
    required: Tensor
    max_exit: Tensor
    open: Tensor
    failing: Tensor


Question = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of boxes of differences, two of (n, classes), and thresholds (n,): (n,) bool."""


@dataclass(frozen=True)
class _Range:
    """What a rule does over boxes."""

    can: Question
    """Whether it may fire somewhere in the box; a threshold that closes an exit lets nothing leave."""
    certain: Question
    """Whether it fires everywhere in the box."""


_RANGES = {
    "entropy": _Range(
        can=lambda low, high, limit: (limit > 0) & ~(lowest_entropy(low, high, limit) >= limit),
        certain=lambda low, high, limit: highest_entropy(low, high) < limit,
    ),
    "confidence": _Range(
        can=lambda low, high, limit: (limit < 1) & ~(highest_probability(low, high) <= limit - ROUNDING),
        certain=lambda low, high, limit: lowest_probability(low, high) > limit + ROUNDING,
    ),
}


def walk(boxes: Sequence[Box], y: Tensor, policy: Policy, delta: float, logits: Sequence[Tensor]) -> Walk:
    """Visit the exits of each sample in order; see the head of this file.

    All exits are asked at once, which is quicker than one by one, and then read in order.

    Args:
        boxes: for each of K exits, bounds of z_j - z_y over the ball, as computed: each box is widened by ``delta``,
            so that it holds the differences that the deployed network computes. What is infinite or no number bounds
            nothing; nor does a box whose ends contradict each other by more than that.
        y: (B,) int64, the label that must hold.
        policy: the rule and its K - 1 thresholds.
        delta: the allowance for rounding, in units of logits.
        logits: of the images themselves, (B, classes) for each exit: an exit that fires there can fire, and one that
            does not cannot always fire, which saves the search.
    """
    own = torch.nn.functional.one_hot(y, boxes[0][0].shape[1]).bool()[:, None]
    lower, upper = (torch.stack(ends, 1).double() for ends in zip(*boxes, strict=True))
    lower = lower.where(lower.isfinite(), -torch.inf)
    upper = upper.where(upper.isfinite(), torch.inf)
    void = ~(lower - delta <= upper + delta).all(2, keepdim=True)
    low = (lower - delta).masked_fill(void, -torch.inf).masked_fill(own, 0.0)
    high = (upper + delta).masked_fill(void, torch.inf).masked_fill(own, 0.0)
    side = slice(0, len(boxes) - 1)
    ranges, limits = _RANGES[policy.rule], low.new_tensor(policy.thresholds).expand(len(y), -1)
    # The last exit always fires.
    can, always = (torch.ones_like(void[..., 0]) for _ in range(2))
    fires = torch.zeros_like(can[:, side])
    for number, z in enumerate(logits[side]):
        fires[:, number] = policy.fires(number, z)
    can[:, side] = _ask(ranges.can, low[:, side], high[:, side], limits, ~fires) | fires
    # What may overflow may be NaN, which never leaves.
    bounded = (low.isfinite() & high.isfinite()).all(2)[:, side]
    always[:, side] = _ask(ranges.certain, low[:, side], high[:, side], limits, fires & bounded)
    max_exit = always.to(torch.uint8).argmax(1)
    required = can & (torch.arange(len(boxes), device=y.device) <= max_exit[:, None])
    needed = (-upper).masked_fill(void, -torch.inf).masked_fill(own, torch.inf)
    # The second look: no point of the box at which the rival class is the largest lets the exit fire.
    sample, exit, rival = ((high >= 0) & ~own & required[..., None])[:, side].nonzero(as_tuple=True)
    narrow_low, narrow_high, empty = rival_boxes(low[sample, exit], high[sample, exit], rival)
    harmless = ~_ask(ranges.can, narrow_low, narrow_high, limits[sample, exit], ~empty)
    needed[sample[harmless], exit[harmless], rival[harmless]] = torch.inf
    margins = needed.amin(2).masked_fill(~required, torch.inf)
    failing = ~(margins > delta)
    # Where the image itself leaves, the walk might end before it comes to those that fail.
    before = failing.flip(1).cumsum(1).flip(1) > 0
    open_ = failing.clone()
    open_[:, side] |= (before & required)[:, side] & fires
    return Walk(margins.amin(1), required, max_exit, open_, failing)


def _ask(question: Question, low: Tensor, high: Tensor, limits: Tensor, asked: Tensor) -> Tensor:
    """The answers for those boxes that are asked about; False for the others."""
    return torch.zeros_like(asked).masked_scatter(asked, question(low[asked], high[asked], limits[asked]))


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
