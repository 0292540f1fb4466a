"""Thresholds for the best accuracy within a budget of multiply-adds that attacks on the cost force."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swiftsure.attacks._suites import Attack
from swiftsure.attacks.slowdown_suite import run_slowdown, slowdown_attacks
from swiftsure.ball import Ball
from swiftsure.data import ImageSet
from swiftsure.errors import InputError
from swiftsure.exits import MultiExit, Policy, all_logits, in_shares, within_macs

ROUNDS = 10
"""Thresholds that are attacked at most."""
_FIRST = 3
"""How many attacks of a suite, the quickest, try new thresholds before the others do."""
_NEAR, _CLOSE = 0.9, 0.97
"""Shares of the budget from which on the others are worth their time, and it counts as used."""
_DOWN = 0.7
"""Power of budget / forced by which an aim falls: what attacks find beyond the known shrinks as more is known."""


@dataclass(frozen=True)
class Forced:
    """What attacks forced on the samples that thresholds were fitted to.

    Attributes:
        policy: rule and thresholds.
        n: how many samples.
        accuracy: the share of them that is right on the clean image and on every attacked one that was given, in
            [0, 1].
        macs: the mean over samples of what the dearest image costs: the clean one, one that was given, or the dearest
            that either half of the slowdown suite found in any round.
    """

    policy: Policy
    n: int
    accuracy: float
    macs: float


def within_forced_macs(
    net: MultiExit,
    images: ImageSet | tuple[Tensor, Tensor],
    ball: Ball,
    macs: float,
    *,
    rule: str = "entropy",
    attacked: Sequence[Sequence[Tensor]] = (),
    steps: int = 100,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Forced:
    """The most accurate thresholds with which attacks on the cost force no more than a budget, as far as they find.

    In rounds: fit thresholds within an aim to all images known so far, where each sample costs what its dearest does;
    attack the cost with these thresholds in mind; keep what that made. Attacks find dearer images than were known, so
    the aim falls below the budget, and rises again as more is known. Of the thresholds that stay within the budget on
    all that is known in the end, the most accurate are taken; with all images leaving at the first exit nothing can be
    forced, so there always are some.

    Args:
        net: K >= 2 exits.
        images: held out from training and from the choice of the epoch: an ImageSet or (x, y).
        ball: the threat model.
        macs: the budget: multiply-adds, the mean over samples.
        rule: entropy or confidence.
        attacked: for each of several attacks on the answer, K logits of the same images under it, on the CPU. A sample
            counts as right where it is right on all of them as well, and may cost what the dearest costs.
        steps, seed: of `run_slowdown`.
        progress: called with how many attacks were just done or left out; in all at most those of `ROUNDS` suites.

    Raises:
        InputError: one exit, an unknown rule, a budget below the first exit's cost, fewer samples than exits, logits
            that are not finite or of other samples, or a ball or images that do not fit.
    """
    if not isinstance(net, MultiExit) or net.exits < 2:
        raise InputError("the network has one exit; there are no thresholds to fit")
    images = images if isinstance(images, ImageSet) else ImageSet.from_tensors(*images)
    x, y = images.batch(slice(None))
    costs = net.macs(images.shape)
    if isinstance(macs, bool) or not isinstance(macs, int | float) or not macs >= costs[0]:
        raise InputError(
            f"forced_macs is {macs!r}; allowed: a number from {costs[0]:,} (all leave at the first exit) on"
        )
    clean = all_logits(net, images)
    known = list(attacked)
    # Nothing exceeds the budget where all leave at the first exit.
    floor = in_shares(clean, [1.0] + [0.0] * (net.exits - 1), rule)
    kept, aim = [floor], macs

    def slow_down(policy: Policy, attacks: list[tuple[str, Attack]]) -> float:
        """The mean cost once these attacks are known too."""

        def step(name: str, done: int, n: int) -> None:
            if progress is not None and done == n:
                progress(1)

        found = run_slowdown(net, x, y, ball, policy, attacks=dict(attacks), seed=seed, progress=step)
        known.append(all_logits(net, ImageSet.from_tensors(found.images, y)))
        return _cost(policy, [clean, *known], costs)

    for number in range(ROUNDS):
        policy = within_macs(clean, y, costs, aim, rule, attacked, known)
        if policy.thresholds[0] == floor.thresholds[0]:
            # All leave at once, which need not be attacked. The aim is too low, unless nothing else is within it.
            if aim == macs:
                break
            aim = (aim + macs) / 2
            continue
        suite = list(slowdown_attacks(policy, steps).items())
        forced = slow_down(policy, suite[:_FIRST])
        highest = aim == macs or number == ROUNDS - 1
        if forced <= macs and (highest or forced >= _NEAR * macs):
            forced = slow_down(policy, suite[_FIRST:])
            if forced <= macs:
                kept.append(policy)
                if highest or forced >= _CLOSE * macs:
                    break
        elif progress is not None:
            progress(len(suite) - _FIRST)
        # Measured from the first exit's cost, below which no thresholds lead.
        ratio = (macs - costs[0]) / max(forced - costs[0], 1.0)
        aim = min(costs[0] + (aim - costs[0]) * ratio ** (_DOWN if ratio < 1 else 1), macs)
    views = [clean, *known]
    measured = [
        Forced(one, len(images), _right(one, [clean, *attacked], y), _cost(one, views, costs)) for one in kept
    ]
    return max((one for one in measured if one.macs <= macs), key=lambda one: (one.accuracy, one.macs))


def _right(policy: Policy, views: Sequence[Sequence[Tensor]], y: Tensor) -> float:
    """The share of samples that is right on all of their images."""
    wrong = torch.stack([policy.misclassified(z, y) for z in views]).any(0)
    return 1 - wrong.double().mean().item()


def _cost(policy: Policy, views: Sequence[Sequence[Tensor]], costs: list[int]) -> float:
    """The mean over samples of what the dearest of their images costs."""
    each = torch.tensor(costs, dtype=torch.float64)
    return torch.stack([each[policy.exit_of(z)] for z in views]).amax(0).mean().item()
