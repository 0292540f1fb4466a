"""How low and how high softmax entropy, or the largest probability, can go while logits stay in a box.

An early exit fires where the entropy of its softmax is below a threshold (or its largest probability above one); so
what a bound of logits says about an exit is what it says about these. Boxes may be of logits, or of differences to one
class (whose own entry is then exactly 0): softmax does not see a shift, so every valid box counts, and the best of
several may be kept. Entropies are in nats. All is computed in float64; results carry gradients to the box, except
where the text says otherwise. A box that holds nothing (lower > upper) or a NaN gives NaN, which proves nothing.

Let p = softmax(z), L = ln sum exp z, m = sum p z, so that H = L - m and dH/dz_j = -p_j (z_j - m). Proofs are in
docs/certified-exits.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from swiftsure.errors import InputError

NODES = 1024
"""Parts that a box may be cut into before the search ends with what is proven so far. A dozen is usual."""
AT_ONCE = 2**15
"""Boxes times classes that are searched side by side."""
SLACK = 1e-12
"""Rounding in float64 of an entropy and of its bounds, generously."""
FAR = -1e6
"""A logit so far below another weighs nothing: e^FAR is 0."""


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the softmax, in nats: (..., classes) to (...), float64."""
    log_p = logits.double().log_softmax(-1)
    # A probability that vanishes adds nothing, even where its logarithm is infinite.
    return -(log_p.exp() * log_p.clamp_min(-1e300)).sum(-1)


def highest_entropy(lower: Tensor, upper: Tensor) -> Tensor:
    """The largest entropy over each box, exactly but for rounding, which errs high.

    At a maximum every z_j is as near to m as its interval lets it, since H rises towards m in each coordinate: z_j =
    clip(t, l_j, u_j) with t = m. So t solves F(t) = 0, F(t) = sum over l_k > t of e^{l_k} (l_k - t) minus sum over
    u_k < t of e^{u_k} (t - u_k), which is piecewise linear and never rises: its root is read off between two ends. A t
    that is off by d costs H at most d * sum_j p_j |z_j - m| <= d * (ln K + 1). With ends taken relative to the largest
    lower one, F falls at least as fast as t rises up to there, so that d <= |F(t)|: that is added.

    Args:
        lower, upper: (..., classes) ends of the box; some may be infinite, but not all lower ones.

    Returns:
        (...) in nats, float64, with gradients.
    """
    low, high = _box(lower, upper)
    top = low.detach().amax(-1, keepdim=True)
    a, b = (low - top).clamp_min(FAR), (high - top).clamp_min(FAR)
    with torch.no_grad():
        t = _root(a, b.clamp_max(0))
        above, below = (a - t).clamp_min(0) * a.exp(), (t - b).clamp_min(0) * b.clamp_max(0).exp()
        off = (above.sum(-1) - below.sum(-1)).abs() + 1e-15 * low.shape[-1]
    inside = torch.minimum(torch.maximum(t, a), b)
    most = math.log(low.shape[-1])
    return _checked((entropy(inside) + off * (most + 1) + SLACK).clamp_max(most + SLACK), low, high)


def _root(a: Tensor, b: Tensor) -> Tensor:
    """The t <= 0 where sum over a_k > t of e^{a_k} (a_k - t) equals sum over b_k < t of e^{b_k} (t - b_k): (..., 1).

    Ends are at most 0, and the largest a is 0. Below each end, one more a or one less b takes part; each part is
    S (c - t), with S the sum of the weights of those that do and c their mean.
    """
    ends, order = torch.cat([a, b], -1).sort(-1, descending=True)
    weight = torch.cat([a.exp(), -b.exp()], -1).gather(-1, order)
    falls = _running(weight, b.exp().sum(-1, keepdim=True))
    start = _running(weight * ends, (b * b.exp()).sum(-1, keepdim=True))
    # How many ends lie above the root.
    piece = (start[..., :-1] < falls[..., :-1] * ends).sum(-1, keepdim=True)
    t = start.gather(-1, piece) / falls.gather(-1, piece).clamp_min(1e-300)
    limits = torch.cat([torch.zeros_like(t), ends, torch.full_like(t, FAR)], -1)
    return torch.minimum(torch.maximum(t, limits.gather(-1, piece + 1)), limits.gather(-1, piece))


def _running(steps: Tensor, start: Tensor) -> Tensor:
    """start, start + the first step, and so on: (..., steps + 1)."""
    return torch.cat([start, start + steps.cumsum(-1)], -1)


def lowest_entropy_bound(lower: Tensor, upper: Tensor) -> Tensor:
    """A lower bound of the entropy over each box, by convex means, in O(classes log classes).

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
    return _bound(low, high)[0]


def _bound(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`lowest_entropy_bound`, (...); and what a search goes on with: L, (..., 1), and turns, (..., classes)."""
    # Ends relative to the largest, which softmax does not see. Where that is infinite, all is NaN, and so 0.
    top = high.detach().amax(-1, keepdim=True)
    a, b = (low - top).clamp_min(FAR), (high - top).clamp_min(FAR)
    with torch.no_grad():
        turn = _turn(a, b)
        level = _level(a, b, turn)
    total = torch.minimum((level - a) * a.exp(), (level - b) * b.exp()).sum(-1)
    cut = (1 + torch.where(total > 0, total, 1.0).log() - level[..., 0]).where(total > 0, -torch.inf)
    peak = _highest_probability(low, high)
    with torch.no_grad():
        count = (1 / peak).floor()
    # The logarithm of a rest of 0 has no gradient; nor does one that is so small.
    rest = (1 - count * peak).clamp_min(1e-30)
    spread = -count * torch.special.xlogy(peak, peak) - torch.special.xlogy(rest, rest)
    best = (torch.fmax(cut, spread) - SLACK).clamp_min(0)
    best = best.where(~high.isposinf().any(-1), 0.0)
    return _checked(best, low, high), level, turn


def _level(a: Tensor, b: Tensor, turn: Tensor) -> Tensor:
    """The L at which 1 + ln sum_j min(psi(L - a_j), psi(L - b_j)) is largest, ends being at most 0: (..., 1).

    e^L psi(L - z) = (L - z) e^z is linear in L. So the sum is e^{-L} T(L) with T concave and piecewise linear, bent at
    the turns, and 1 + ln T - L is concave where T > 0: best where T' = T, or at a bend where T' falls below T. That is
    at most 1, where every (L - a) e^a >= e^a.
    """
    turns, order = turn.sort(-1)
    at_low, at_high = a.exp(), b.exp()
    slope = _running((at_low - at_high).gather(-1, order), at_high.sum(-1, keepdim=True))
    moment = _running((a * at_low - b * at_high).gather(-1, order), (b * at_high).sum(-1, keepdim=True))
    # T = slope L - moment. How many turns lie below the best L.
    piece = (slope[..., :-1] * (1 - turns) + moment[..., :-1] > 0).sum(-1, keepdim=True)
    level = 1 + moment.gather(-1, piece) / slope.gather(-1, piece).clamp_min(1e-300)
    least = torch.cat([torch.full_like(level, FAR), turns], -1).gather(-1, piece)
    return torch.maximum(level, least).clamp_max(1)


def _turn(low: Tensor, high: Tensor) -> Tensor:
    """The L at which psi(L - l) = psi(L - u): u + w / (e^w - 1), w = u - l."""
    width = (high - low).clamp(1e-12, 700)
    return high + width / torch.expm1(width)


def lowest_entropy(lower: Tensor, upper: Tensor, threshold: float | Tensor | None = None) -> Tensor:
    """The least entropy over each box: exact up to rounding, or a lower bound that settles ``threshold``.

    In each coordinate alone H rises and then falls, because z_j - m = (1 - p_j) (z_j - mean of the others' z), and that
    mean does not depend on z_j. So it is least at an end, and over the box at a vertex. Vertices are searched by branch
    and bound: a box is halved at the coordinate whose two ends psi tells apart least, and left alone once
    `lowest_entropy_bound` lifts it above the best vertex found or above the threshold. If `NODES` boxes do not settle
    it, the least bound of those that are open is returned, which is sound.

    Args:
        lower, upper: (..., classes) ends of the box.
        threshold: (...) or a number; where given, only whether the minimum reaches it has to be right.

    Returns:
        (...) in nats, float64, without gradients (use `lowest_entropy_bound` to train).
    """
    with torch.no_grad():
        low, high = _box(lower, upper)
        if threshold is None:
            return _lowest_entropy(low, high, None)
        limit = torch.as_tensor(threshold, dtype=low.dtype, device=low.device).expand(low.shape[:-1])
        # Most boxes that reach below a threshold do so where one class is at its upper end and all others are low.
        open_ = ~((_one_up(low, high) < limit) & (low <= high).all(-1))
        if open_.all():
            return _lowest_entropy(low, high, limit)
        found = torch.zeros_like(low[..., 0])
        return found.masked_scatter(open_, _lowest_entropy(low[open_], high[open_], limit[open_]))


def _one_up(low: Tensor, high: Tensor) -> Tensor:
    """The entropy of a vertex of each box: at its upper end the class that can be likeliest, all others low."""
    top = high.amax(-1, keepdim=True)
    at_low = (low - top).exp()
    others = (at_low.sum(-1, keepdim=True) - at_low).clamp_min(1e-300)
    chosen = ((high - top).exp() / others).argmax(-1, keepdim=True)
    return entropy(low.scatter(-1, chosen, high.gather(-1, chosen)))


def _lowest_entropy(low: Tensor, high: Tensor, limit: Tensor | None) -> Tensor:
    if not low.numel():
        return low[..., 0]
    bound, *guides = _bound(low, high)
    if limit is None:
        limit = torch.full_like(bound, torch.inf)
    open_ = (bound < limit) & ~high.isposinf().any(-1)
    if not open_.any():
        return bound
    boxes = [side[open_] for side in (low, high, limit, bound, *guides)]
    size = max(1, AT_ONCE // low.shape[-1])
    found = [_search(*part) for part in zip(*(side.split(size) for side in boxes), strict=True)]
    return bound.masked_scatter(open_, torch.fmax(bound[open_], torch.cat(found)))


def _search(
    lows: Tensor, highs: Tensor, limit: Tensor, bounds: Tensor, level: Tensor, turn: Tensor
) -> Tensor:
    """Branch and bound for boxes (n, classes): the least entropy of each, or a lower bound that settles its limit.

    Args:
        lows, highs: the boxes; limit: (n,); bounds, level, turn: what `_bound` says of the boxes.
    """
    n, classes = lows.shape
    owner = torch.arange(n, device=lows.device)
    best, settled = torch.full_like(bounds, torch.inf), torch.full_like(bounds, torch.inf)
    used = torch.zeros_like(owner)
    while True:
        best.scatter_reduce_(0, owner, _prefixes(lows, highs, turn), "amin")
        used += owner.bincount(minlength=n)
        # A point below the limit answers the question; else what is still open counts by its bound.
        over = ((best < limit) & limit.isfinite()) | (used > NODES)
        # At a vertex the bound is its entropy less the slack.
        done = over[owner] | ~(bounds < torch.minimum(best - 2 * SLACK, limit)[owner])
        vertex = ~done & ~(highs > lows).any(-1)
        bounds = torch.where(vertex, entropy(lows) - SLACK, bounds)
        done |= vertex
        settled.scatter_reduce_(0, owner[done], bounds[done], "amin")
        if done.all():
            return torch.minimum(settled, best - SLACK).clamp_min(0)
        lows, highs, owner, level, turn = (t[~done] for t in (lows, highs, owner, level, turn))
        distance = (turn - level).abs().masked_fill(~(highs > lows), torch.inf)
        chosen = torch.nn.functional.one_hot(distance.argmin(-1), classes).bool()
        lows, highs = (
            torch.cat([lows, torch.where(chosen, highs, lows)]),
            torch.cat([torch.where(chosen, lows, highs), highs]),
        )
        owner = owner.repeat(2)
        bounds, level, turn = _bound(lows, highs)


def _prefixes(low: Tensor, high: Tensor, turn: Tensor) -> Tensor:
    """The least entropy of vertices that take the upper end for the classes of highest turn: real points of the boxes.

    All classes + 1 of them for each box at once, by running sums of e^z and z e^z.

    Returns:
        (boxes,) the entropy of the best of them.
    """
    order = turn.argsort(-1, descending=True)
    top = high.amax(-1, keepdim=True)
    a, b = (low - top).clamp_min(FAR), (high - top).clamp_min(FAR)
    at_low, at_high = a.exp(), b.exp()
    total = _running((at_high - at_low).gather(-1, order), at_low.sum(-1, keepdim=True))
    moment = _running((b * at_high - a * at_low).gather(-1, order), (a * at_low).sum(-1, keepdim=True))
    found = total.log() - moment / total
    # Running sums cancel where all that is left is tiny; a vertex counts by its own entropy.
    prefix = found.nan_to_num(torch.inf, torch.inf, torch.inf).argmin(-1, keepdim=True)
    return entropy(torch.where(order.argsort(-1) < prefix, b, a))


def highest_probability(lower: Tensor, upper: Tensor) -> Tensor:
    """The largest that any class's probability can be over each box: that of u_j against the others' l_k.

    Args and result as of `highest_entropy`.
    """
    low, high = _box(lower, upper)
    return _checked(_highest_probability(low, high), low, high)


def _highest_probability(low: Tensor, high: Tensor) -> Tensor:
    # ln sum over k != j of e^{l_k}: the total less a share of at most a half, or for the largest the rest alone.
    largest = torch.nn.functional.one_hot(low.argmax(-1), low.shape[-1]).bool()
    total = low.logsumexp(-1, keepdim=True)
    share = (low - total).exp().masked_fill(largest, 0.0)
    rest = low.masked_fill(largest, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.sigmoid(high - torch.where(largest, rest, total + torch.log1p(-share))).amax(-1)


def lowest_probability(lower: Tensor, upper: Tensor) -> Tensor:
    """The least that the *largest* probability can be over each box, exactly.

    Given M = max z, it is least with every other logit as high as it may be, min(u_k, M); and e^M / sum_k e^{min(u_k,
    M)} never falls with M. So M is as low as it can be: the largest lower end.

    Args and result as of `highest_entropy`.
    """
    low, high = _box(lower, upper)
    top = low.amax(-1, keepdim=True)
    return _checked(1 / (high - top).clamp_max(0).exp().sum(-1), low, high)


def _box(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    if lower.shape != upper.shape or lower.dim() == 0 or lower.shape[-1] < 2:
        raise InputError(
            f"the ends of a box have shapes {tuple(lower.shape)} and {tuple(upper.shape)}; allowed: two of "
            "(..., classes) with at least 2 classes"
        )
    return lower.double(), upper.double()


def _checked(result: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The result, and NaN where the box holds nothing or has a NaN."""
    return result.where((low <= high).all(-1), torch.nan)
