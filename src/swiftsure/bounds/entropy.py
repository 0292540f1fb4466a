"""How low and how high softmax entropy, or the largest probability, can go while logits stay in a box.

An early exit fires where the entropy of its softmax is below a threshold (or its largest probability above one); so
what a bound of logits says about an exit is what it says about these. Boxes may be of logits, or of differences to one
class (whose own entry is then exactly 0): softmax does not see a shift, so every valid box counts, and the best of
several may be kept. Entropies are in nats. All is computed in float64; results carry gradients to the box.

Let p = softmax(z), L = ln sum exp z, m = sum p z, so that H = L - m and dH/dz_j = -p_j (z_j - m).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from swiftsure.errors import InputError

ENUMERATED = 12
"""Up to so many classes all vertices of a box are tried; beyond, they are searched by branch and bound."""
BISECTIONS = 100
NODES = 512
"""Boxes a sample may be cut into before the search ends with what is proven so far."""


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the softmax, in nats: (..., classes) to (...)."""
    log_p = logits.log_softmax(-1)
    # A probability that vanishes adds nothing, even where its logarithm is infinite.
    return -(log_p.exp() * log_p.clamp_min(-1e300)).sum(-1)


def highest_entropy(lower: Tensor, upper: Tensor) -> Tensor:
    """The largest entropy over each box, exactly but for rounding, which errs high.

    At a maximum every z_j is as near to m as its interval lets it, since H rises towards m in each coordinate: z_j =
    clip(t, l_j, u_j) with t = m. So t solves sum_j e^{z_j} (z_j - t) = 0; entries at t drop out, and what is left,
    sum over l_k > t of e^{l_k} (l_k - t) minus sum over u_k < t of e^{u_k} (t - u_k), never rises with t. Its root lies
    between the least upper end and the largest lower end, or is any common point of all intervals. It is bisected; a t
    that is off by d costs H at most d * sum_j p_j |z_j - m| <= d * (ln K + 1), which is added.

    Args:
        lower, upper: (..., classes) ends of the box, lower <= upper; infinite ends are allowed.

    Returns:
        (...) in nats, float64, with gradients; NaN where an end is NaN.
    """
    low, high = _box(lower, upper)
    with torch.no_grad():
        top = low.amax(-1, keepdim=True)
        bottom = high.amin(-1, keepdim=True)
        # Where all intervals meet, any common point makes all logits equal.
        left, right = torch.minimum(bottom, top), torch.maximum(bottom, top).minimum(top)
        right = torch.maximum(left, right)
        width = right - left
        for _ in range(BISECTIONS):
            t = (left + right) / 2
            above = (low - t).clamp_min(0) * (low - top).exp()
            # Below t <= top the exponent is negative; elsewhere the factor is 0.
            below = (t - high).clamp_min(0) * (high - top).clamp_max(0).exp()
            positive = (above - below).nan_to_num(0.0).sum(-1, keepdim=True) > 0
            left, right = torch.where(positive, t, left), torch.where(positive, right, t)
        t = (left + right) / 2
        slack = (right - left + 1e-15 * (t.abs() + width)) * (math.log(low.shape[-1]) + 1) + 1e-12
    inside = torch.minimum(torch.maximum(t.expand_as(low), low), high)
    return (entropy(inside) + slack[..., 0]).clamp_max(math.log(low.shape[-1]) + 1e-12)


def lowest_entropy_bound(lower: Tensor, upper: Tensor) -> Tensor:
    """A lower bound of the entropy over each box, by convex means: O(classes) for each step of a search.

    For any number L let S = sum_j psi(L - z_j), psi(w) = w e^{-w}. With d = ln sum exp z - L, S = e^d (H - d), so
    H = d + S e^{-d}; over d this is least at d = ln S, and so H >= 1 + ln S wherever S > 0. As psi rises to w = 1 and
    falls after, its least value over an interval lies at an end: H_min >= 1 + ln sum_j min(psi(L - l_j), psi(L - u_j))
    for every L for which the sum is positive. The search over L need not be exact to be sound.

    Also, no probability exceeds P = max_j e^{u_j} / (e^{u_j} + sum_{k != j} e^{l_k}); the least entropy of any
    distribution with that property has floor(1/P) entries P and one for the rest, because entropy is concave. The
    larger of the two bounds is returned, and never less than 0.

    Args and result as of `highest_entropy`.
    """
    low, high = _box(lower, upper)
    cut, _ = _cut(low, high)
    peak = _highest_probability(low, high)
    with torch.no_grad():
        count = (1 / peak + 1e-9).floor()
    rest = (1 - count * peak).clamp_min(0)
    spread = -count * torch.special.xlogy(peak, peak) - torch.special.xlogy(rest, rest)
    # Rounding of either formula.
    best = (torch.fmax(cut, spread) - 1e-12).clamp_min(0)
    return best.where((low <= high).all(-1), torch.nan)


def _cut(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The best of 1 + ln sum_j min(psi(L - l_j), psi(L - u_j)) over L, -inf where no L gives one; and that L.

    e^L psi(L - z) = (L - z) e^z is linear in L. So the sum is e^{-L} T(L) with T concave and rising, and 1 + ln T - L
    is concave where T > 0: best where T' = T. That lies between the least u, where T < 0, and 1 above the largest,
    where every (L - l) e^l >= e^l; it is bisected.
    """
    top = high.amax(-1, keepdim=True)
    a, b = low - top, high - top
    with torch.no_grad():
        turn = _turn(a, b)
        left, right = b.amin(-1, keepdim=True).clamp_min(-1e6), torch.ones_like(top)
        for _ in range(60):
            level = (left + right) / 2
            slope = torch.where(level < turn, b, a).exp().sum(-1, keepdim=True)
            rising = slope > _sum_psi(a, b, level)
            left, right = torch.where(rising, level, left), torch.where(rising, right, level)
        level = (left + right) / 2
    total = _sum_psi(a, b, level)
    bound = 1 + torch.where(total > 0, total, 1.0).log() - level
    return bound.where(total > 0, -torch.inf)[..., 0], (level + top)[..., 0]


def _sum_psi(low: Tensor, high: Tensor, level: Tensor) -> Tensor:
    """sum_j min((L - l_j) e^{l_j}, (L - u_j) e^{u_j}), ends at most 0: (..., 1)."""
    far = low < -700
    at_low = torch.where(far, 0.0, (level - low.masked_fill(far, 0.0)) * low.exp())
    return torch.minimum(at_low, (level - high) * high.exp()).sum(-1, keepdim=True)


def lowest_entropy(lower: Tensor, upper: Tensor, threshold: float | Tensor | None = None) -> Tensor:
    """The least entropy over each box: exact up to rounding, or a lower bound that settles ``threshold``.

    In each coordinate alone H rises up to m and falls after it (dH/dz_j = -p_j (z_j - m), and m itself moves slower
    than z_j), so that it is least at an end: the minimum lies at a vertex. Up to `ENUMERATED` classes all vertices are
    tried. Beyond, boxes are halved at the coordinate whose two ends psi tells apart least, and left alone once
    `lowest_entropy_bound` lifts them above the best vertex found or above the threshold; if `NODES` boxes do not
    settle it, the least bound of those that are open is returned, which is sound.

    Args:
        lower, upper: (..., classes) ends of the box.
        threshold: (...) or a number; where given, only whether the minimum lies above it has to be right.

    Returns:
        (...) in nats, float64, without gradients (use `lowest_entropy_bound` to train).
    """
    with torch.no_grad():
        low, high = _box(lower, upper)
        bound = lowest_entropy_bound(low, high)
        limit = (
            torch.full_like(bound, torch.inf) if threshold is None else torch.as_tensor(threshold).to(bound)
        )
        limit = limit.expand_as(bound)
        open_ = bound < limit
        if low.shape[-1] <= ENUMERATED:
            return bound.masked_scatter(open_, _least_vertex(low[open_], high[open_]))
        found = [
            _search(a, b, float(t)) for a, b, t in zip(low[open_], high[open_], limit[open_], strict=True)
        ]
        return torch.fmax(bound, bound.masked_scatter(open_, bound.new_tensor(found)))


def _least_vertex(low: Tensor, high: Tensor) -> Tensor:
    """The least entropy over all vertices of boxes (boxes, classes): (boxes,)."""
    classes = low.shape[-1]
    at_top = (
        torch.arange(1 << classes, device=low.device)[:, None] >> torch.arange(classes, device=low.device)
    ) & 1
    parts = [
        entropy(torch.where(at_top.bool(), b[:, None], a[:, None])).amin(-1)
        for a, b in zip(low.split(64), high.split(64), strict=True)
    ]
    return (torch.cat(parts) - 1e-12).clamp_min(0) if parts else low.new_empty(0)


def _search(low: Tensor, high: Tensor, threshold: float) -> float:
    """Branch and bound for one box (classes,): the least entropy, or a lower bound of it that settles the threshold."""
    lows, highs = low[None], high[None]
    best, settled, used = math.inf, math.inf, 0
    while len(lows):
        bounds = lowest_entropy_bound(lows, highs)
        level = _cut(lows, highs)[1]
        turn = _turn(lows, highs)
        best = min(best, _prefixes(lows, highs, turn))
        if best < threshold < math.inf or used > NODES:
            return min(settled, best, float(bounds.min()))
        target = min(best, threshold)
        open_ = bounds < target - 1e-12
        settled = min([settled, *bounds[~open_].tolist()])
        lows, highs, level, turn = lows[open_], highs[open_], level[open_], turn[open_]
        free = highs > lows
        decided = ~free.any(-1)
        if decided.any():
            settled = min(settled, float(entropy(lows[decided]).min()) - 1e-12)
            lows, highs, level, turn, free = (t[~decided] for t in (lows, highs, level, turn, free))
        distance = (turn - level[:, None]).abs().masked_fill(~free, torch.inf)
        chosen = torch.nn.functional.one_hot(distance.argmin(-1), low.shape[-1]).bool()
        lows, highs = (
            torch.cat([lows, torch.where(chosen, highs, lows)]),
            torch.cat([torch.where(chosen, lows, highs), highs]),
        )
        used += len(lows)
    return max(0.0, min(settled, best - 1e-12))


def _turn(low: Tensor, high: Tensor) -> Tensor:
    """The L at which psi(L - l) = psi(L - u): u + w / (e^w - 1), w = u - l."""
    width = high - low
    return high + torch.where(width > 1e-12, width / torch.expm1(width.clamp(1e-12, 700)), 1.0)


def _prefixes(low: Tensor, high: Tensor, turn: Tensor) -> float:
    """The least entropy of vertices that take the upper end for the classes of highest turn: real points of the boxes.

    All classes + 1 of them for each box at once, by running sums of e^z and z e^z.
    """
    order = turn.argsort(-1, descending=True)
    top = high.amax(-1, keepdim=True)
    a, b = (low - top).gather(-1, order), (high - top).gather(-1, order)
    weights = b.exp() - a.exp()
    moments = b * b.exp() - torch.special.xlogy(a.exp(), a.exp())
    total = torch.cat([weights.new_zeros(len(low), 1), weights.cumsum(-1)], -1) + a.exp().sum(
        -1, keepdim=True
    )
    moment = torch.special.xlogy(a.exp(), a.exp()).sum(-1, keepdim=True)
    moment = torch.cat([moments.new_zeros(len(low), 1), moments.cumsum(-1)], -1) + moment
    found = total.log() - moment / total
    # Running sums cancel where all that is left is tiny; a vertex counts by its own entropy.
    row, prefix = divmod(int(found.nan_to_num(torch.inf, torch.inf, torch.inf).argmin()), found.shape[-1])
    vertex = torch.where(order[row].argsort() < prefix, high[row], low[row])
    return float(entropy(vertex))


def highest_probability(lower: Tensor, upper: Tensor) -> Tensor:
    """The largest that any class's probability can be over each box: that of u_j against the others' l_k.

    Args and result as of `highest_entropy`.
    """
    return _highest_probability(*_box(lower, upper))


def _highest_probability(low: Tensor, high: Tensor) -> Tensor:
    # ln sum over k != j of e^{l_k}: the total without the class itself.
    others = torch.stack([_without(low, j) for j in range(low.shape[-1])], -1)
    return torch.sigmoid(high - others).amax(-1)


def _without(low: Tensor, j: int) -> Tensor:
    return torch.cat([low[..., :j], low[..., j + 1 :]], -1).logsumexp(-1)


def lowest_probability(lower: Tensor, upper: Tensor) -> Tensor:
    """The least that the *largest* probability can be over each box, exactly.

    Given M = max z, it is least with every other logit as high as it may be, min(u_k, M); and e^M / sum_k e^{min(u_k,
    M)} never falls with M. So M is as low as it can be: the largest lower end.

    Args and result as of `highest_entropy`.
    """
    low, high = _box(lower, upper)
    top = low.amax(-1, keepdim=True)
    return 1 / (high - top).clamp_max(0).exp().sum(-1)


def _box(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    if lower.shape != upper.shape or lower.dim() == 0 or lower.shape[-1] < 2:
        raise InputError(
            f"the ends of a box have shapes {tuple(lower.shape)} and {tuple(upper.shape)}; allowed: two of "
            "(..., classes) with at least 2 classes"
        )
    return lower.double(), upper.double()
