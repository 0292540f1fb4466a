"""The walk over exits and the range of a score over a box, written again for one sample: numpy, and nothing shared.

What must hold at which exit is what `_walk` says; the proofs of the ranges stand in `bounds.entropy`. This file may be
slow, and is meant to be read beside them.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from swiftsure.certificates._plain_bounds import Box
from swiftsure.certificates._plain_network import Array
from swiftsure.exits import Policy

ENUMERATED = 12
"""Up to so many classes all vertices of a box are tried; beyond, they are searched."""
BOXES = 20_000
"""Boxes that a search may look at before it gives up."""
ROUNDING = 1e-12
"""Of an entropy or a probability in float64."""


@dataclass(frozen=True)
class Walked:
    """What the walk finds of one sample: see `_walk.Walk`."""

    margin: float
    required: list[int]
    max_exit: int
    open: list[int]
    failing: list[int]


def walk_plainly(
    boxes: Sequence[Box], y: int, policy: Policy | None, slack: float, logits: Sequence[Array]
) -> Walked:
    """Visit the exits in order, until one surely fires.

    Args:
        boxes: for each exit, ends of z_j - z_y over the ball, (classes,) each.
        y: the label that must hold.
        policy: None for one exit.
        slack: how far rounding may carry a difference out of its box.
        logits: of every exit at the image itself.
    """
    margin, required, failing = math.inf, [], []
    for exit, box in enumerate(boxes):
        low, high = (
            np.where(np.isfinite(end), end, side) for end, side in zip(box, (-np.inf, np.inf), strict=True)
        )
        if (low - slack > high + slack).any():
            # Ends that contradict each other prove nothing.
            low, high = np.full_like(low, -np.inf), np.full_like(high, np.inf)
        rivals = [j for j in range(len(low)) if j != y]
        wide_low, wide_high = low - slack, high + slack
        wide_low[y] = wide_high[y] = 0.0
        last = exit == len(boxes) - 1
        if last or not _silent(policy, exit, wide_low, wide_high):
            required.append(exit)
            own = math.inf
            for j in rivals:
                if last or not _harmless(policy, exit, wide_low, wide_high, j):
                    own = min(own, -float(high[j]))
            margin = min(margin, own)
            if not own > slack:
                failing.append(exit)
            if last or _always(policy, exit, wide_low, wide_high):
                # Where the image itself leaves before some that fail, the walk might end there yet.
                ends = [i for i in required if i < max(failing, default=0) and _fires(policy, i, logits[i])]
                return Walked(margin, required, exit, sorted({*failing, *ends}), failing)
    raise AssertionError("the last exit always fires")


def _harmless(policy: Policy | None, exit: int, low: Array, high: Array, rival: int) -> bool:
    """Whether an exit fires nowhere in a box where a wrong class is the largest."""
    if high[rival] < 0:
        # Its margin is counted all the same: it is positive.
        return False
    low, high = low.copy(), np.minimum(high, high[rival])
    low[rival] = max(low[rival], 0.0)
    return bool((low > high).any()) or _silent(policy, exit, low, high)


def exit_plainly(logits: Sequence[Array], policy: Policy | None) -> int:
    """By which exit the deployed network answers, given the logits (classes,) of all of them."""
    firing = (exit for exit, z in enumerate(logits[:-1]) if _fires(policy, exit, z))
    return next(firing, len(logits) - 1)


def answer_plainly(logits: Sequence[Array], policy: Policy | None) -> int:
    """What the deployed network says."""
    return int(logits[exit_plainly(logits, policy)].argmax())


def _fires(policy: Policy | None, exit: int, z: Array) -> bool:
    """Whether an exit that is not the last fires, given its logits (classes,)."""
    assert policy is not None
    threshold = policy.thresholds[exit]
    if policy.rule == "entropy":
        return float(_entropy(z)) < threshold
    return bool(1 / np.exp(z - z.max()).sum() > threshold)


def _silent(policy: Policy | None, exit: int, low: Array, high: Array) -> bool:
    """Whether an exit fires nowhere in a box."""
    assert policy is not None
    threshold = policy.thresholds[exit]
    if policy.rule == "entropy":
        return _entropy_at_least(low, high, threshold)
    if threshold >= 1:
        return True
    return max(_probability(high[j], np.delete(low, j)) for j in range(len(low))) <= threshold - ROUNDING


def _always(policy: Policy | None, exit: int, low: Array, high: Array) -> bool:
    """Whether an exit fires everywhere in a box."""
    assert policy is not None
    threshold = policy.thresholds[exit]
    # What may overflow may be NaN, which never leaves.
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        return False
    if policy.rule == "entropy":
        return _highest_entropy(low, high) < threshold
    # The largest logit is at least the largest lower end; the others do best just below it.
    top = low.max()
    return 1 / np.exp(np.minimum(high - top, 0.0)).sum() > threshold + ROUNDING


def _probability(logit: float, others: Array) -> float:
    """Softmax of one logit against others."""
    if logit == -np.inf:
        return 0.0
    with np.errstate(over="ignore"):
        return float(1 / (1 + np.exp(others - logit).sum())) if np.isfinite(logit) else 1.0


def _entropy(z: Array) -> Array:
    """Of the softmax, in nats: (..., classes) to (...)."""
    shifted = z - z.max(axis=-1, keepdims=True)
    weights = np.exp(shifted)
    total = weights.sum(axis=-1)
    # A logit of -inf adds nothing.
    return np.log(total) - (weights * np.maximum(shifted, -1e300)).sum(axis=-1) / total


def _highest_entropy(low: Array, high: Array) -> float:
    """At the maximum every logit is as near to one number t, their mean under softmax, as its interval lets it."""
    most = math.log(len(low))
    if low.max() <= high.min():
        return most
    left, right = high.min(), low.max()
    for _ in range(200):
        t = (left + right) / 2
        z = np.clip(t, low, high)
        weights = np.exp(z - z.max())
        left, right = (t, right) if weights @ (z - t) > 0 else (left, t)
    # A t that is off by d costs at most d (ln K + 1).
    return min(most, float(_entropy(np.clip(left, low, high))) + (right - left) * (most + 1)) + ROUNDING


def _entropy_at_least(low: Array, high: Array, threshold: float) -> bool:
    """Whether the entropy is at least a threshold all over a box. Its minimum lies at a vertex."""
    if threshold <= 0:
        return True
    if not np.isfinite(high).all():
        return False
    if len(low) <= ENUMERATED:
        corners = np.array(list(itertools.product((False, True), repeat=len(low))))
        return float(_entropy(np.where(corners, high, low)).min()) - ROUNDING >= threshold
    return _search(low, high, threshold)


def _search(low: Array, high: Array, threshold: float) -> bool:
    """Branch and bound: halve the box of least bound, until a vertex lies below the threshold or no box does."""
    order = itertools.count()
    bound, level = _lower_bound(low, high)
    open_ = [(bound, next(order), level, low, high)]
    for _ in range(BOXES):
        if not open_ or open_[0][0] - ROUNDING >= threshold:
            return True
        _, _, level, low, high = heapq.heappop(open_)
        turn = _turn(low, high)
        if float(_entropy(np.where(turn > level, high, low))) - ROUNDING < threshold:
            return False
        free = high > low
        if not free.any():
            return False
        chosen = int(np.where(free, abs(turn - level), np.inf).argmin())
        for end in (low, high):
            lower, upper = low.copy(), high.copy()
            lower[chosen] = upper[chosen] = end[chosen]
            bound, best = _lower_bound(lower, upper)
            heapq.heappush(open_, (bound, next(order), best, lower, upper))
    return False


def _lower_bound(low: Array, high: Array) -> tuple[float, float]:
    """For any number L, H >= 1 + ln sum_j min(psi(L - l_j), psi(L - u_j)), psi(w) = w e^-w. The best L of some; it."""
    top = high.max()
    levels = np.linspace(high.min() - 1, top + 1.5, 65)
    for _ in range(4):
        at_low, at_high = (
            (levels[:, None] - z) * np.exp(z - levels[:, None]) for z in (np.maximum(low, -1e6), high)
        )
        total = np.minimum(at_low, at_high).sum(axis=1)
        bounds = np.where(total > 0, 1 + np.log(np.where(total > 0, total, 1.0)), -np.inf)
        best = int(bounds.argmax()) if np.isfinite(bounds).any() else len(levels) - 1
        found = float(bounds[best]), float(levels[best])
        step = levels[1] - levels[0]
        levels = np.linspace(levels[best] - step, levels[best] + step, 65)
    return max(found[0], 0.0), found[1]


def _turn(low: Array, high: Array) -> Array:
    """The L at which psi(L - l) = psi(L - u): above it the lower end counts, below it the upper."""
    width = high - low
    safe = np.clip(width, 1e-12, 700)
    return high + np.where(width > 1e-12, safe / np.expm1(safe), 1.0)
