"""Thresholds for the best verified accuracy within a budget of proven worst-case multiply-adds.

What the walk asks of a side exit depends on its threshold T through three numbers of each sample alone: the lowest and
the highest score of its box (it cannot fire if the first is at least T, it always fires if the second is below T) and
the lowest score of any wrong answer (its label holds if that is at least T). With these at hand any thresholds can be
tried on thousands of samples at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from swiftsure.ball import Ball
from swiftsure.bounds import Region, difference_bounds, technique, trace
from swiftsure.bounds.entropy import (
    highest_entropy,
    highest_probability,
    lowest_entropy,
    lowest_probability,
)
from swiftsure.certificates._precision import certifying, place
from swiftsure.certificates._rounding import FLOOR
from swiftsure.certificates._walk import Box, rival_boxes
from swiftsure.data import ImageSet
from swiftsure.errors import InputError
from swiftsure.exits import MultiExit, Policy

TRIED = 4096
"""Combinations of thresholds that are tried."""
CHUNK = 250
CHEAP = ("interval", "crown-ibp")
"""Techniques that take thousands of images in seconds."""


@dataclass(frozen=True, eq=False)
class _Scores:
    """Of n samples at one side exit, (n,) each, in the direction in which low scores leave."""

    lowest: Tensor
    highest: Tensor
    lowest_wrong: Tensor


@dataclass(frozen=True)
class Promise:
    """What thresholds prove of the samples that they were fitted to.

    Attributes:
        policy: rule and thresholds.
        verified: the share of samples whose label is proven, in [0, 1].
        macs: the mean of the proven worst-case multiply-adds.
    """

    policy: Policy
    verified: float
    macs: float


def within_certified_macs(
    net: MultiExit,
    images: ImageSet,
    ball: Ball,
    macs: float,
    rule: str = "entropy",
    methods: Sequence[str] = CHEAP,
) -> Promise:
    """The thresholds of the best verified accuracy among those whose proven mean cost is within a budget.

    Candidates are quantiles of the samples' own lowest and highest scores, and a threshold that closes the exit; some
    four thousand combinations are tried. Equal accuracy: the cheaper ones.

    Args:
        net: K >= 2 exits.
        images: held out from training; their true labels are what must hold.
        ball: the threat model.
        macs: the budget: multiply-adds, the mean over images of the most that an image of the ball can cost.
        rule: entropy or confidence.
        methods: techniques of `bounds`, whose bounds are intersected.

    Raises:
        InputError: one exit, an unknown rule or technique, or a budget below what can be proven.
    """
    if net.exits < 2:
        raise InputError("the network has one exit; there are no thresholds to fit")
    Policy(rule, [0.0] * (net.exits - 1))
    scores, last = _scores(net, images, ball, rule, methods)
    costs = torch.tensor(net.macs(images.shape), dtype=torch.float64)
    each = max(2, int(TRIED ** (1 / len(scores)) + 1e-9))
    best: tuple[float, float, tuple[float, ...]] | None = None
    least = torch.inf
    closed = 0.0 if rule == "entropy" else -1.0
    for thresholds in itertools.product(*(_candidates(score, each, closed) for score in scores)):
        verified, cost = _tried(thresholds, scores, last, costs)
        least = min(least, cost)
        if cost <= macs and (best is None or (verified, -cost) > (best[0], -best[1])):
            best = verified, cost, thresholds
    if best is None:
        raise InputError(
            f"a certified budget of {macs:,.0f} multiply-adds is below the {least:,.0f} that can be proven here"
        )
    sign = 1.0 if rule == "entropy" else -1.0
    return Promise(Policy(rule, [max(0.0, sign * value) for value in best[2]]), best[0], best[1])


def _tried(
    thresholds: Sequence[float], scores: Sequence[_Scores], last: Tensor, costs: Tensor
) -> tuple[float, float]:
    """Verified accuracy and mean proven cost with these thresholds: the walk, for all samples at once."""
    inside, holds = torch.ones_like(last), torch.ones_like(last)
    cost = costs[-1].expand(len(last)).clone()
    for exit, (score, threshold) in enumerate(zip(scores, thresholds, strict=True)):
        holds &= ~(inside & (score.lowest < threshold)) | (score.lowest_wrong >= threshold)
        leaves = inside & (score.highest < threshold)
        cost[leaves] = costs[exit]
        inside &= ~leaves
    holds &= ~inside | last
    return holds.double().mean().item(), cost.mean().item()


def _candidates(score: _Scores, count: int, closed: float) -> list[float]:
    """Thresholds worth trying: one that closes the exit, and quantiles up to one that lets all leave."""
    values = torch.cat([score.lowest, score.highest])
    values = values[values.isfinite() & (values > closed)]
    if not len(values):
        return [closed]
    shares = torch.linspace(0, 1, count - 1, dtype=torch.float64)
    return sorted({closed, *values.quantile(shares).tolist()})


def _scores(
    net: nn.Module, images: ImageSet, ball: Ball, rule: str, methods: Sequence[str]
) -> tuple[list[_Scores], Tensor]:
    """The three numbers of each sample at each side exit, and whether the last exit is proven right: (n,) bool."""
    device, dtype = place(net)
    parts: list[list[_Scores]] = []
    last = []
    with certifying(net):
        for index in torch.arange(len(images)).split(CHUNK):
            x, y = images.batch(index, device)
            x = x.to(dtype)
            graph, region = trace(net, x), Region(x, ball)
            found = [difference_bounds(technique(name), graph, region, y) for name in methods]
            own = torch.nn.functional.one_hot(y, found[0][0][0].shape[1]).bool()
            boxes = []
            for ends in zip(*found, strict=True):
                lower = torch.stack([low for low, _ in ends]).amax(0).double()
                upper = torch.stack([up for _, up in ends]).amin(0).double()
                boxes.append(((-upper - FLOOR).masked_fill(own, 0.0), (-lower + FLOOR).masked_fill(own, 0.0)))
            parts.append([_of_exit(box, own, rule) for box in boxes[:-1]])
            last.append((boxes[-1][1] < 0).masked_fill(own, True).all(1).cpu())
    fields = ("lowest", "highest", "lowest_wrong")
    joined = [
        _Scores(*(torch.cat([getattr(score, name) for score in exit]) for name in fields))
        for exit in zip(*parts, strict=True)
    ]
    return joined, torch.cat(last)


def _of_exit(box: Box, own: Tensor, rule: str) -> _Scores:
    low, high = box
    sample, rival = ((high >= 0) & ~own).nonzero(as_tuple=True)
    narrow_low, narrow_high, empty = rival_boxes(low[sample], high[sample], rival)
    wrong = low.new_full((len(sample),), torch.inf)
    kept = ~empty
    if rule == "entropy":
        lowest, highest = lowest_entropy(low, high), highest_entropy(low, high)
        wrong[kept] = lowest_entropy(narrow_low[kept], narrow_high[kept])
    else:
        lowest, highest = -highest_probability(low, high), -lowest_probability(low, high)
        wrong[kept] = -highest_probability(narrow_low[kept], narrow_high[kept])
    lowest_wrong = low.new_full((len(low),), torch.inf).scatter_reduce(0, sample, wrong, "amin")
    # What is no number promises nothing.
    return _Scores(
        lowest.where(~lowest.isnan(), -torch.inf).cpu(),
        highest.where(~highest.isnan(), torch.inf).cpu(),
        lowest_wrong.where(~lowest_wrong.isnan(), -torch.inf).cpu(),
    )
