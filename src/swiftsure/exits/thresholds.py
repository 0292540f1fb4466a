"""Thresholds from a validation split: equal shares (RDI-Nets' rule), or the best accuracy within a budget of cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from swiftsure.data import ImageSet, check_batch
from swiftsure.data.checks import check_labels
from swiftsure.errors import InputError
from swiftsure.exits.multi_exit import MultiExit
from swiftsure.exits.policies import Policy, known_rule
from swiftsure.modes import evaluating

_SHARES = sorted({step / 64 for step in range(65)} | {1 / 256, 1 / 128, 127 / 128, 255 / 256})
"""Quantiles of an exit's scores that a search tries as its threshold, finer where nobody or nearly all leave."""
_ROUNDS = 10


def calibrate(
    net: MultiExit,
    images: ImageSet | tuple[Tensor, Tensor],
    *,
    rule: str = "entropy",
    macs: float | None = None,
    attacked: Sequence[Sequence[Tensor]] = (),
    batch: int = 500,
) -> Policy:
    """Fit thresholds on held-out images; the network is not changed: ``net.policy = calibrate(net, val)``.

    Args:
        net: whose exits; it runs in evaluation mode.
        images: a validation split, never the test set: an ImageSet or (x, y).
        rule: "entropy" (RDI-Nets) or "confidence".
        macs: the mean multiply-adds an image may cost, for the most accurate policy within them; None: so that
            equally many images leave at each exit.
        attacked: as of `within_macs`; needs macs.
        batch: images at a time.

    Raises:
        InputError: an unknown rule, too few images, logits that are not finite, or a budget below the first exit.
    """
    known_rule(rule)
    if not isinstance(net, MultiExit):
        raise InputError(f"thresholds are for a MultiExit; this is a {type(net).__name__} of one exit")
    if not isinstance(images, ImageSet):
        if not isinstance(images, tuple | list) or len(images) != 2:
            raise InputError(f"images are a {type(images).__name__}; allowed: an ImageSet, or tensors (x, y)")
        images = ImageSet.from_tensors(*images)
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise InputError(f"batch is {batch!r}; allowed: an integer >= 1")
    logits = all_logits(net, images, batch)
    check_labels(images.labels, len(images), logits[-1].shape[1])
    if macs is None:
        if attacked:
            raise InputError("attacked images fit thresholds within a budget; give macs as well")
        return equal_share(logits, rule)
    return within_macs(logits, images.labels, net.macs(images.shape), macs, rule, attacked)


def all_logits(net: nn.Module, images: ImageSet, batch: int = 500) -> list[Tensor]:
    """The logits of every exit for all images, on the CPU: K of (n, classes). The network runs in evaluation mode."""
    device = next(iter(net.parameters()), torch.empty(0)).device
    parts = []
    with torch.no_grad(), evaluating(net):
        for start in range(0, len(images), batch):
            x, _ = images.batch(slice(start, start + batch), device)
            check_batch(x)
            logits = net(x)
            parts.append([z.cpu() for z in ((logits,) if isinstance(logits, Tensor) else logits)])
    return [torch.cat(exit) for exit in zip(*parts, strict=True)]


def equal_share(logits: Sequence[Tensor], rule: str = "entropy") -> Policy:
    """Thresholds by which equally many samples leave at each exit (RDI-Nets: of N samples N / K at each).

    Args and errors as in `in_shares`.
    """
    return in_shares(logits, [1.0] * len(logits), rule)


def in_shares(logits: Sequence[Tensor], shares: Sequence[float], rule: str = "entropy") -> Policy:
    """Thresholds by which samples leave at the exits in given proportions.

    A threshold lies half-way between the last score that leaves and the next one, so that neither hangs on rounding;
    samples of one score leave together.

    Args:
        logits: of each of K exits, (N, classes), on held-out samples.
        shares: K numbers >= 0, not all 0; only their proportions count.
        rule: a name of `RULES`.

    Raises:
        InputError: an unknown rule, shares that do not fit, fewer samples than exits, or logits that are not finite.
    """
    scores = _scores(logits, rule)
    exits, samples = len(logits), len(logits[0])
    known = all(isinstance(share, int | float) and 0 <= share < math.inf for share in shares)
    if len(shares) != exits or not known or not 0 < sum(shares) < math.inf:
        raise InputError(f"shares are {list(shares)}; allowed: {exits} numbers >= 0, not all 0")
    inside = torch.arange(samples)
    chosen = []
    for number, score in enumerate(scores):
        leaving = len(inside) - round(sum(shares[number + 1 :]) * samples / sum(shares))
        ordered = score[inside].sort().values
        threshold = _behind(ordered, leaving)
        chosen.append(threshold)
        inside = inside[score[inside] >= threshold]
    return _policy(rule, chosen)


def within_macs(
    logits: Sequence[Tensor],
    y: Tensor,
    macs: Sequence[float],
    budget: float,
    rule: str = "entropy",
    attacked: Sequence[Sequence[Tensor]] = (),
    slowed: Sequence[Sequence[Tensor]] = (),
) -> Policy:
    """The thresholds of the highest accuracy whose mean cost is within a budget, as far as a search finds them.

    The search starts from policies that let a constant share of the remaining samples leave at each exit, and from
    those that use one side exit alone; then it moves one threshold, or two at once, over quantiles, while that helps.
    Of equally accurate policies the strictest is kept, the one whose laxest threshold is least: the budget is there to
    be used, and a cheaper policy that loses none of these samples yet stands closer to losing others.

    Args:
        logits: of each of K exits, (N, classes), on held-out samples.
        y: their labels (N,).
        macs: what a sample costs that leaves at each exit, K numbers that do not fall.
        budget: mean cost allowed.
        rule: a name of `RULES`.
        attacked: for each of several attacks, K logits of the same samples under it. A sample then counts as right
            where it is right on its clean image and on every attacked one.
        slowed: for each of several attacks on the cost, K logits of the same samples under it. A sample then costs
            what the dearest of these and its clean image costs; none: what its clean image does.

    Raises:
        InputError: as `equal_share`; attacked logits of other samples or exits; or a budget that is no number or
            below the first exit's cost.
    """
    scores = _scores(logits, rule)
    if len(macs) != len(logits):
        raise InputError(f"{len(macs)} costs for {len(logits)} exits; allowed: one for each")
    if not all(before <= cost < math.inf for before, cost in zip([0, *macs], macs, strict=False)):
        raise InputError(
            f"costs are {list(macs)}; allowed: finite numbers >= 0 that do not fall from exit to exit"
        )
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not budget >= macs[0]:
        raise InputError(
            f"macs is {budget!r}; allowed: a number from {macs[0]:,} (all leave at the first exit) on"
        )
    for number, seen in enumerate([*attacked, *slowed]):
        if [z.shape for z in seen] != [z.shape for z in logits]:
            raise InputError(
                f"attack {number} has logits of shapes {[tuple(z.shape) for z in seen]}; "
                f"allowed: those of the clean images, {[tuple(z.shape) for z in logits]}"
            )
    check_labels(y, len(logits[0]), logits[0].shape[1])
    if len(logits) == 1:
        return Policy(rule, ())
    views = [
        _View(scores, _right(logits, y), costs=True),
        *(_View(_scores(seen, rule), _right(seen, y), costs=False) for seen in attacked),
        *(_View(_scores(seen, rule), None, costs=True) for seen in slowed),
    ]
    search = _Search(views, torch.tensor(macs, dtype=torch.float64), float(min(budget, macs[-1])))
    return _policy(rule, search.run().tolist())


@dataclass(frozen=True, eq=False)
class _View:
    """One image of each of N samples.

    Attributes:
        scores: of side exits, (K - 1, N), that leave when they are small.
        right: whether each exit's label is right, (K, N) bool; None where that does not count.
        costs: whether the sample costs what this image does, if none costs more.
    """

    scores: Tensor
    right: Tensor | None
    costs: bool


class _Search:
    """Over thresholds.

    Args:
        views: clean images first.
        macs: (K,), not falling.
        budget: mean cost allowed.
    """

    def __init__(self, views: Sequence[_View], macs: Tensor, budget: float) -> None:
        self.views, self.macs, self.budget = views, macs, budget
        self.sides, self.samples = views[0].scores.shape
        # Thresholds are sought among the scores of all images that cost: (K - 1, images).
        self.scores = torch.cat([view.scores for view in views if view.costs], 1)
        ordered = self.scores.sort(1).values
        places = [round(share * ordered.shape[1]) for share in _SHARES]
        # (K - 1, grid): from "nobody leaves" to "all do".
        self.grid = torch.tensor([[_behind(row, place) for place in places] for row in ordered])
        # Sums of thresholds are compared; what stands below every score does as well as minus infinity.
        self.floor = float(self.scores.min()) - 1.0

    def run(self) -> Tensor:
        """The best thresholds found: (K - 1,)."""
        best, rank = self._best(torch.cat([*self._starts()]))
        for _ in range(_ROUNDS):
            found, found_rank = self._best(torch.cat([best[None], *self._moves(best)]))
            if found_rank <= rank:
                break
            best, rank = found, found_rank
        return best

    def _starts(self) -> Iterator[Tensor]:
        """Policies (P, K - 1) to begin with; the first lets all leave at once, which any budget allows."""
        yield self.grid[:, -1][None]
        never = self.grid[:, 0]
        for side in range(self.sides):
            alone = never.repeat(len(_SHARES), 1)
            alone[:, side] = self.grid[side]
            yield alone
        for share in _SHARES[1:-1]:
            inside, thresholds = torch.arange(self.scores.shape[1]), []
            for side in range(self.sides):
                ordered = self.scores[side, inside].sort().values
                threshold = _behind(ordered, round(share * len(inside)))
                thresholds.append(threshold)
                inside = inside[self.scores[side, inside] >= threshold]
            yield torch.tensor([thresholds], dtype=torch.float64)

    def _moves(self, best: Tensor) -> Iterator[Tensor]:
        """One threshold moved over the whole grid, or two over every other point of it."""
        for side in range(self.sides):
            moved = best.repeat(len(_SHARES), 1)
            moved[:, side] = self.grid[side]
            yield moved
        coarse = self.grid[:, ::2]
        for first in range(self.sides):
            for second in range(first + 1, self.sides):
                pairs = torch.cartesian_prod(coarse[first], coarse[second])
                moved = best.repeat(len(pairs), 1)
                moved[:, first], moved[:, second] = pairs[:, 0], pairs[:, 1]
                yield moved

    def _best(self, thresholds: Tensor) -> tuple[Tensor, tuple[float, ...]]:
        """The best of some policies (P, K - 1), and its (accuracy, minus laxest threshold, minus the sum of all).

        Outside the budget none counts. An exit that nobody may leave by has a threshold of minus infinity.
        """
        found: tuple[Tensor, tuple[float, ...]] | None = None
        for part in thresholds.split(max(1, 4_000_000 // (self.samples * (self.sides + 1)))):
            accuracy, cost = self._measured(part)
            accuracy = accuracy.masked_fill(cost > self.budget * (1 + 1e-12), -1.0)
            strict = part.clamp_min(self.floor)
            ranks = zip(accuracy.tolist(), (-strict.amax(1)).tolist(), (-strict.sum(1)).tolist(), strict=True)
            rank, index = max((rank, index) for index, rank in enumerate(ranks))
            if found is None or rank > found[1]:
                found = part[index], rank
        assert found is not None
        return found

    def _measured(self, thresholds: Tensor) -> tuple[Tensor, Tensor]:
        """Accuracy and mean cost of policies (P, K - 1): (P,) each."""
        accurate = torch.ones(len(thresholds), self.samples, dtype=torch.bool)
        # Costs do not fall from exit to exit: a sample costs what the image does that gets furthest.
        reached = [torch.zeros_like(accurate)] * (self.sides + 1)
        for view in self.views:
            inside = torch.ones_like(accurate)
            for exit in range(self.sides + 1):
                if view.costs:
                    reached[exit] = reached[exit] | inside
                leaves = inside
                if exit < self.sides:
                    leaves = inside & (view.scores[exit] < thresholds[:, exit, None])
                if view.right is not None:
                    accurate &= ~leaves | view.right[exit]
                inside = inside & ~leaves
        counts = torch.stack([which.sum(1) for which in reached], 1)
        counts[:, :-1] -= counts[:, 1:].clone()
        return accurate.double().mean(1), counts.double() @ self.macs / self.samples


def _right(logits: Sequence[Tensor], y: Tensor) -> Tensor:
    """Whether each exit's label is right: (K, N) bool."""
    return torch.stack([z.argmax(1) == y.cpu() for z in logits])


def _scores(logits: Sequence[Tensor], rule: str) -> Tensor:
    """Scores of the side exits that leave when they are small: (K - 1, N) float64, on the CPU."""
    known = known_rule(rule)
    samples = len(logits[0]) if logits else 0
    if samples < max(1, len(logits)):
        raise InputError(f"{samples} samples for {len(logits)} exits; allowed: at least one for each exit")
    for number, z in enumerate(logits):
        if len(z) != samples:
            raise InputError(
                f"exit {number} has logits of {len(z)} samples, exit 0 of {samples}; allowed: alike"
            )
        if not bool(z.isfinite().all()):
            raise InputError(f"logits of exit {number} are not finite; no threshold can be fitted to them")
    scores = [known.sign * known.score(z.detach()).cpu() for z in logits[:-1]]
    return torch.stack(scores) if scores else torch.zeros(0, samples, dtype=torch.float64)


def _behind(ordered: Tensor, count: int) -> float:
    """A threshold that at least so many of these ascending scores are below, and no more than need be."""
    if count <= 0:
        # Below the smallest: -inf is "nobody", and becomes a threshold that closes the exit.
        return -math.inf
    last = ordered[count - 1]
    larger = ordered[ordered > last]
    if len(larger) == 0:
        return math.inf
    middle = (last + larger[0]) / 2
    return float(middle if middle > last else larger[0])


def _policy(rule: str, thresholds: Sequence[float]) -> Policy:
    """Thresholds on scores that leave when small, as the rule has them, within what a threshold may be."""
    known = known_rule(rule)
    # An entropy is at most ln(classes); no finite class count needs more than this.
    top = 1.0 if known.highest == 1.0 else 100.0
    values = [known.sign * value for value in thresholds]
    return Policy(rule, [min(max(value, 0.0), top) for value in values])
