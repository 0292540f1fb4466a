"""MixTrain's interval attack: bounds of a region say where to go, gradients finish (Wang et al. 2018, 1811.02625)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from swiftsure.attacks._gradient import (
    GradientReport,
    GradientTally,
    assert_inside,
    attacking,
    check_count,
    checked_inputs,
    looked_at,
)
from swiftsure.attacks._pgd import PATH, check_options, climb
from swiftsure.attacks._restarts import Found, worst_of
from swiftsure.attacks.objectives import Judge, Objective, check_exit, cross_entropy, misclassified
from swiftsure.ball import Ball
from swiftsure.bounds import Graph, Region, linear_map, memory, trace
from swiftsure.errors import InputError, UnsupportedError

# The region that is looked at has a radius of eps / 30 at first and eps / 2 at most, and triples in between.
_FIRST, _LARGEST, _GROWTH = 1 / 30, 1 / 2, 3


def interval_attack(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    objective: Objective = cross_entropy,
    judge: Judge = misclassified,
    steps: int = 40,
    step_size: float | None = None,
    restarts: int = 50,
    moves: int = 3,
    refine: bool = False,
    exit: int = -1,
    generator: torch.Generator | None = None,
    report: GradientReport | None = None,
) -> Tensor:
    """A gradient attack, then moves that follow symbolic bounds out of where gradients got stuck, then one more.

    A move looks at a region around the present point and lets it grow until the bounds no longer prove the label
    there. The wrong class with the worst bound has a linear function of the image above it (`bounds.linear_map`);
    the point that this function is largest at, over the whole ball around x, is the next: for L-inf the corner that
    the coefficients' signs name. Hidden units are bounded by intervals, unless `refine` asks for the paper's bounds.
    Each restart makes `moves` moves between two gradient attacks; the point of largest objective on the way is
    kept. A broken sample takes no further part.

    Args:
        net: an architecture with the operations of docs/operations.md; returns logits, or a tuple, one per exit.
        x: images, (B, C, H, W), in the ball's pixel range.
        y: labels, (B,), integers.
        ball: the threat model.
        objective: what the gradient attacks ascend, (tuple of logits, y) -> (B,).
        judge: what counts as broken, (tuple of logits, y) -> (B,) bool.
        steps: of each of the two gradient attacks.
        step_size: as of `pgd`; None: eps / 30 for "inf", as in the paper's runs at 0.3, else as `pgd`.
        restarts: how many runs at most; the first starts at x, the others at random points of the ball.
        moves: how many times bounds are asked in each run.
        refine: whether hidden units are bounded by the symbolic relaxation too, as in the paper, and not by intervals
            alone: tighter, but every unit takes a row of its own (docs/evaluation.md has what that finds and costs).
        exit: which exit's logits are bounded, counted from 0; -1 is the last.
        generator: makes the starts reproducible; None draws from torch's global one.
        report: counts zero and non-finite gradients, if given.

    Returns:
        Adversarial images, shaped like x, inside the ball and the pixel range, outside any autograd graph.

    Raises:
        InputError: as `pgd`; an exit that the network does not have.
        UnsupportedError: a network with an operation that bounds have no rule for.
    """
    check_options(steps, step_size, restarts)
    check_count("moves", moves, 0)
    x, y = checked_inputs(net, x, y, ball)
    if ball.radius == 0 or len(x) == 0:
        return x.clone()
    if step_size is None:
        step_size = ball.radius * (1 / 30 if ball.norm == "inf" else PATH[ball.norm] / max(steps, 1))
    tally = None if report is None else GradientTally(report)
    try:
        graph = trace(net, x)
    except InputError as error:
        raise UnsupportedError(str(error)) from None
    check_exit(exit, len(graph.outputs))
    if graph.nodes[graph.outputs[exit]].shape[0] < 2:
        # No wrong class to go to.
        moves = 0

    def run(number: int, x: Tensor, y: Tensor) -> Found:
        found = Found(x.clone(), x.new_full((len(x),), -math.inf), torch.zeros_like(y, dtype=torch.bool))
        left = torch.arange(len(x), device=x.device)

        def keep(x_adv: Tensor, loss: Tensor, broken: Tensor) -> tuple[Tensor, Tensor]:
            """Keep what is better than before; x_adv and indices of the samples that still stand."""
            better = broken | (loss > found.loss[left])
            found.x_adv[left[better]], found.loss[left[better]] = x_adv[better], loss[better]
            found.broken[left] = broken
            return x_adv[~broken], left[~broken]

        def look(x_adv: Tensor) -> tuple[Tensor, Tensor]:
            logits, loss, _ = looked_at(net, x_adv, y[left], objective, gradient=False)
            return keep(x_adv, loss.to(x.dtype), judge(logits, y[left]))

        start = ball.sample(x, generator) if number > 0 else x.clone()
        now, left = keep(*climb(net, x, y, start, ball, objective, judge, steps, step_size, tally))
        for _ in range(moves):
            if len(left):
                slope = worst_slope(graph, now, y[left], ball, exit, refine)
                now, left = look(ball.maximiser(x[left], slope))
        if len(left) and moves:
            keep(*climb(net, x[left], y[left], now, ball, objective, judge, steps, step_size, tally))
        return found

    with attacking(net):
        worst = worst_of(x, y, restarts, run)
    if tally is not None:
        tally.close()
    return assert_inside(worst, x, ball)


@torch.no_grad()
def worst_slope(
    graph: Graph, point: Tensor, y: Tensor, ball: Ball, exit: int = -1, refine: bool = False
) -> Tensor:
    """How the most threatening wrong class grows with the image, around each point: like point.

    Threatening is the class whose logit's upper bound exceeds the true one's by most, in the smallest region where
    any does; where none does up to the largest region, the class that comes nearest in that one.

    Args:
        graph: the traced network.
        point: images, (B, C, H, W).
        y: labels, (B,).
        ball: whose radius and norm set the regions' size.
        exit: which exit's logits.
        refine: as of `linear_map`.
    """
    slope = torch.zeros_like(point)
    left = torch.arange(len(point), device=point.device)
    most = max(1, memory.samples_at_once(sum(torch.Size(node.shape).numel() for node in graph.nodes), point))
    share = _FIRST
    while len(left):
        region = ball.with_eps(share * ball.radius)
        standing = []
        for part in left.split(most):
            found = linear_map(
                graph, Region(point[part], region), _margins(graph, y[part], point), exit, refine=refine
            )
            lower, worst = found.lower.min(1)
            slope[part] = -found.coefficients[torch.arange(len(part), device=part.device), worst]
            standing.append(part[lower > 0])
        left = torch.cat(standing)
        if share == _LARGEST:
            break
        share = min(share * _GROWTH, _LARGEST)
    return torch.nan_to_num(slope)


def _margins(graph: Graph, y: Tensor, like: Tensor) -> Tensor:
    """Rows z_y - z_j for all wrong classes j: (B, classes - 1, classes)."""
    classes = graph.nodes[graph.outputs[-1]].shape[0]
    others = torch.arange(classes - 1, device=y.device).expand(len(y), -1)
    identity = torch.eye(classes, dtype=like.dtype, device=y.device)
    return identity[y][:, None] - identity[others + (others >= y[:, None])]
