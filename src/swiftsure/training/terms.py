"""The terms of the loss: clean, attacked, proven. Each is a mean over samples, summed over exits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftsure.attacks.objectives import as_exits
from swiftsure.ball import Ball
from swiftsure.bounds import TECHNIQUES, Region, class_count, difference_bounds, technique, trace
from swiftsure.bounds.graph import Graph
from swiftsure.data import check_batch
from swiftsure.errors import InputError
from swiftsure.recipe import Loss
from swiftsure.training.leaving import Leaving, leaving_loss
from swiftsure.training.statistics import BatchStatistics

AttackOnBatch = Callable[[nn.Module, Tensor, Tensor, Ball], Tensor]


def classification_loss(
    logits: Tensor | tuple[Tensor, ...], y: Tensor, weights: Sequence[float] | None = None
) -> Tensor:
    """Cross-entropy of logits (batch, classes), or the sum of it over a tuple of exits: a scalar.

    Args:
        weights: of the exits; None: 1 for each.
    """
    return _summed([F.cross_entropy(z, y) for z in as_exits(logits)], weights)


def _summed(parts: Sequence[Tensor], weights: Sequence[float] | None) -> Tensor:
    """One scalar for each exit, weighed and added."""
    if weights is not None:
        parts = [weight * part for weight, part in zip(weights, parts, strict=True)]
    return torch.stack(list(parts)).sum()


def worst_case_loss(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    method: str,
    leaving: Leaving | None = None,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """Cross-entropy of the worst case over the ball: of minus the lower bounds of the margins, summed over exits.

    It bounds the cross-entropy at every point of the ball from above (Wong and Kolter 2018, theorem 2).

    Args:
        net: the network, read in evaluation semantics.
        x: images (batch, channels, height, width); y: labels (batch,).
        ball: the threat model.
        method: a bound technique, or "best" for the tighter of interval and symbolic at each margin.
        leaving: thresholds of side exits, for the term by which they learn to leave or stay provably; None: without.
        weights: of the exits; None: 1 for each.
    """
    graph = trace(net, x)
    bound = best if method == "best" else technique(method)
    found = difference_bounds(bound, graph, Region(x, ball), y, upper=leaving is not None)
    total = _summed([F.cross_entropy(-low, y) for low, _ in found], weights)
    return total if leaving is None else total + leaving.weight * leaving_loss(found, y, leaving)


def best(
    graph: Graph, region: Region, spec: Tensor | None = None, *, upper: bool = True
) -> list[tuple[Tensor, Tensor]]:
    """The tighter of interval and symbolic, element by element (both are sound, so their intersection is)."""
    found = [TECHNIQUES[name](graph, region, spec, upper=upper) for name in ("interval", "symbolic")]
    return [
        (torch.maximum(a_low, b_low), torch.minimum(a_up, b_up))
        for (a_low, a_up), (b_low, b_up) in zip(*found, strict=True)
    ]


def draw(batch: int, k: int | None, generator: torch.Generator | None) -> Tensor | slice:
    """k different places of a batch, drawn uniformly; all of them where k is None or not less than the batch."""
    if k is None or k >= batch:
        return slice(None)
    return torch.randperm(batch, generator=generator)[:k]


def three_term_loss(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    loss: Loss,
    weight: float,
    *,
    attack: AttackOnBatch | None = None,
    leaving: Leaving | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """clean * CE(x) + attacked * CE(x_adv) + weight * CE(worst case of k samples): the loss of one batch, a scalar.

    With an interval share, that part of the weight goes to the worst case of all samples by intervals. Terms of weight
    0 are not computed. A ball of radius 0 leaves the clean term alone, with the weight of all three.

    Batch norm takes the clean batch's statistics for the attack and the bound. Where there is a proven term the
    attacked images pass with these too: both terms are then of one network. Without one they pass with their own: a
    deep network hardly learns where it is normalised by what it does not move.

    Args:
        net: in training mode; returns logits or a tuple of them.
        x: images (batch, channels, height, width) in [0, 1]; y: labels (batch,).
        ball: the threat model of this step.
        loss: the weights of the terms.
        weight: of the proven term, from a mixing controller.
        attack: makes x_adv from (net, x, y, ball).
        leaving: as of `worst_case_loss`.
        generator: source of the k samples.
    """
    bounded = weight if loss.proven else 0.0
    attacked = loss.attacked
    clean = max(0.0, 1.0 - attacked - bounded) if loss.clean is None else loss.clean
    if ball.radius == 0:
        # At radius 0 all three terms are the same number; only the clean one need be computed.
        clean, attacked, bounded = clean + attacked + bounded, 0.0, 0.0
    statistics = BatchStatistics(net)
    parts = []
    # The clean pass also sets the batch statistics, so the others need it even at weight 0 where there is batch norm.
    if clean > 0 or statistics.needed:
        with statistics.recorded():
            logits = net(x)
        if clean > 0:
            parts.append(clean * classification_loss(logits, y, loss.weights))
    if attacked > 0 or bounded > 0:
        with statistics.frozen():
            if attacked > 0:
                assert attack is not None
                x_adv = attack(net, x, y, ball)
                if loss.proven:
                    parts.append(attacked * classification_loss(net(x_adv), y, loss.weights))
            if bounded > 0 and loss.interval_share < 1:
                chosen = draw(len(x), loss.k, generator)
                tight = worst_case_loss(net, x[chosen], y[chosen], ball, loss.bound, leaving, loss.weights)
                parts.append(bounded * (1 - loss.interval_share) * tight)
            if bounded > 0 and loss.interval_share > 0:
                cheap = worst_case_loss(net, x, y, ball, "interval", leaving, loss.weights)
                parts.append(bounded * loss.interval_share * cheap)
        if attacked > 0 and not loss.proven:
            parts.append(attacked * classification_loss(net(x_adv), y, loss.weights))
    total = torch.stack(parts).sum()
    if loss.l1 > 0:
        total = total + loss.l1 * sum(p.abs().sum() for p in net.parameters() if p.dim() > 1)
    return total


def mixtrain_loss(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    k: int | None = 1,
    weight: float = 1.0,
    method: str = "symbolic",
    generator: torch.Generator | None = None,
) -> Tensor:
    """MixTrain's loss for a training loop of your own: CE(x) + weight * CE(worst case of k samples of the batch).

    (Wang et al. 2018, arXiv 1811.02625: stochastic robust approximation; `weight` is what dynamic mixed training
    moves from epoch to epoch.)

    Args:
        net: any network `swiftsure.bounds` can trace, in the mode you train it in.
        x: images (batch, channels, height, width) in [0, 1].
        y: labels (batch,), integers.
        ball: the threat model of this step; let its radius grow over the first epochs.
        k: samples that are bounded, drawn anew without replacement; None for all.
        weight: of the proven term, >= 0.
        method: "symbolic" (the paper's), "interval" or "best".
        generator: source of the draw, on the CPU; None for torch's own.

    Returns:
        A scalar to call ``backward()`` on.

    Raises:
        InputError: bad images, labels, k or weight, or an operation without a bound rule.

    Example:
        >>> loss = mixtrain_loss(net, x, y, Ball(0.1), k=1, weight=0.5)
        >>> loss.backward()
    """
    if k is not None and not isinstance(k, int):
        raise InputError(f"k is {k!r}; allowed: an integer >= 1, or None for all samples")
    check_batch(x)
    check_batch(x, y, class_count(trace(net, x)))
    y = y.long()
    if not weight >= 0 or weight == float("inf"):
        raise InputError(f"weight is {weight}; allowed: a finite number >= 0")
    return three_term_loss(net, x, y, ball, _mixtrain(k, method), weight, generator=generator)


def _mixtrain(k: int | None, method: str) -> Loss:
    if method != "best":
        technique(method)
    return Loss(clean=1.0, k=k, bound=method)  # type: ignore[arg-type]
