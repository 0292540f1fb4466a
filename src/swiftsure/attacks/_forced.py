"""Thresholds for the best accuracy within a budget of multiply-adds that attacks on the cost force."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from swiftsure.attacks.slowdown_suite import run_slowdown, slowdown_attacks
from swiftsure.ball import Ball
from swiftsure.data import ImageSet
from swiftsure.errors import InputError
from swiftsure.exits import MultiExit, Policy, all_logits, within_macs

ROUNDS = 8
"""Thresholds that are attacked at most."""
_STEP = 0.7
"""Power of budget / forced by which an aim moves; with 1 it swings."""
_CLOSE = 0.97
"""Share of the budget from which on it counts as used."""
_FIRST = 3
"""How many attacks of a suite, the quickest, try new thresholds before the others do."""


@dataclass(frozen=True)
class Forced:
    """What attacks forced on the samples that thresholds were fitted to.

    Attributes:
        policy: rule and thresholds.
        accuracy: the share of samples that is right on every image that was made of them, in [0, 1].
        macs: the mean over samples of what the dearest of these images costs.
    """

    policy: Policy
    accuracy: float
    macs: float


def within_forced_macs(
    net: MultiExit,
    images: ImageSet,
    ball: Ball,
    macs: float,
    *,
    rule: str = "entropy",
    attacked: list[list[Tensor]] | None = None,
    steps: int = 100,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Forced:
    """The most accurate thresholds with which no attack on the cost forces more than a budget, as far as they find.

    In rounds: fit thresholds to all images known so far, such that the dearest of each sample's fit an aim; attack the
    cost with these thresholds in mind; keep what that made. Attacks find dearer images than were known, so the aim
    falls below the budget, and rises again as more is known. Of the thresholds that stay within the budget on all
    images made in the end, the most accurate are taken.

    Args:
        net: K >= 2 exits.
        images: held out from training and from the choice of the epoch.
        ball: the threat model.
        macs: the budget: multiply-adds, the mean over samples of the dearest image found.
        rule: entropy or confidence.
        attacked: for each of several attacks, K logits of the same images under it, known from the beginning: accuracy
            counts them too.
        steps, seed: of `run_slowdown`.
        progress: called with 1 as each round begins.

    Raises:
        InputError: one exit, an unknown rule, or a budget below the first exit's cost.
    """
    if not isinstance(net, MultiExit) or net.exits < 2:
        raise InputError("the network has one exit; there are no thresholds to fit")
    x, y = images.batch(slice(None))
    clean, known = all_logits(net, images), list(attacked or [])
    costs = net.macs(images.shape)
    kept: list[Policy] = []
    aim = macs
    for _ in range(ROUNDS):
        if progress is not None:
            progress(1)
        policy = within_macs(clean, y, costs, aim, rule, known, forced=True)
        attacks = list(slowdown_attacks(policy, steps).items())
        for stage in (attacks[:_FIRST], attacks[_FIRST:]):
            found = run_slowdown(net, x, y, ball, policy, attacks=dict(stage), seed=seed)
            known.append(all_logits(net, ImageSet.from_tensors(found.images, y)))
            forced = _cost(policy, [clean, *known], costs)
            if forced > macs:
                break
        else:
            kept.append(policy)
            if aim == macs or forced >= _CLOSE * macs:
                break
        aim = min(max(aim * (macs / forced) ** _STEP, costs[0]), macs)
    # Nothing exceeds the budget where all leave at the first exit.
    kept.append(within_macs(clean, y, costs, costs[0], rule))
    views = [clean, *known]
    measured = [Forced(one, _right(one, views, y), _cost(one, views, costs)) for one in kept]
    return max((one for one in measured if one.macs <= macs), key=lambda one: (one.accuracy, one.macs))


def _right(policy: Policy, views: list[list[Tensor]], y: Tensor) -> float:
    """The share of samples that is right on all of their images."""
    wrong = torch.stack([policy.misclassified(z, y) for z in views]).any(0)
    return 1 - wrong.double().mean().item()


def _cost(policy: Policy, views: list[list[Tensor]], costs: list[int]) -> float:
    """The mean over samples of what the dearest of their images costs."""
    each = torch.tensor(costs, dtype=torch.float64)
    return torch.stack([each[policy.exit_of(z)] for z in views]).amax(0).mean().item()
