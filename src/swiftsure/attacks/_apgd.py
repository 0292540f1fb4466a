"""Auto-PGD: gradient ascent that sets its own steps (Croce and Hein 2020; for L1, 2021)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

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
from swiftsure.attacks._restarts import Found, worst_of
from swiftsure.attacks._steps import RULES, Climb, Rule, kept
from swiftsure.attacks.objectives import (
    Judge,
    Objective,
    TargetedObjective,
    as_exits,
    check_exit,
    cross_entropy,
    misclassified,
    never,
    targeted_dlr,
)
from swiftsure.ball import Ball

# L1 climbs begin in larger balls, whose best points, projected, are better starts: (radius over eps, share of steps).
_WIDER = ((3.0, 0.3), (2.0, 0.3))


def apgd(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    objective: Objective = cross_entropy,
    judge: Judge = misclassified,
    steps: int = 100,
    restarts: int = 1,
    random_start: bool = True,
    generator: torch.Generator | None = None,
    report: GradientReport | None = None,
) -> Tensor:
    """Ascend an objective with steps that halve where they stop paying; keep the best point of all restarts.

    A sample drops out of the batch at the first point that the judge counts as broken. The others end with the
    point of largest objective. The step rules are described in `_steps.Momentum` (L-inf and L2) and
    `_steps.Sparse` (L1; there the first 60% of the steps are taken in balls of three and two times eps, from a sparse
    random point). The network
    is left as found, as by `pgd`. Where a gradient is NaN, that step moves nothing but by momentum.

    Args:
        net: returns logits (B, classes), or a tuple of them, one per exit.
        x: images, (B, C, H, W), in the ball's pixel range.
        y: labels, (B,), integers.
        ball: the threat model.
        objective: what to ascend, (tuple of logits, y) -> (B,). AutoAttack's are `cross_entropy` and `dlr`; for
            slowdown and the like, pass the judge `never` too.
        judge: what counts as broken, (tuple of logits, y) -> (B,) bool.
        steps: gradient steps per restart; 0 returns the start.
        restarts: how many runs at most.
        random_start: True: every run starts at a random point of the ball. False: the first starts at x.
        generator: makes the starts reproducible; None draws from torch's global one.
        report: counts zero and non-finite gradients, if given.

    Returns:
        Adversarial images, shaped like x, inside the ball and the pixel range, outside any autograd graph.

    Raises:
        InputError: images or labels that do not fit each other, the network or the ball's pixel range; a number of
            steps or restarts that makes no sense.
    """
    check_count("steps", steps, 0)
    check_count("restarts", restarts, 1)
    x, y = checked_inputs(net, x, y, ball)
    if ball.radius == 0 or len(x) == 0:
        return x.clone()
    tally = None if report is None else GradientTally(report)

    def run(number: int, x: Tensor, y: Tensor) -> Found:
        start = _start(x, ball, generator) if random_start or number > 0 else x.clone()
        return _ascend(net, x, y, ball, start, objective, judge, steps, tally)

    with attacking(net):
        worst = worst_of(x, y, restarts, run)
    if tally is not None:
        tally.close()
    return assert_inside(worst, x, ball)


def apgd_targeted(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    objective: TargetedObjective = targeted_dlr,
    judge: Judge = misclassified,
    targets: int = 9,
    exit: int = -1,
    steps: int = 100,
    restarts: int = 1,
    random_start: bool = True,
    generator: torch.Generator | None = None,
    report: GradientReport | None = None,
) -> Tensor:
    """`apgd` towards one wrong class after another, the likeliest on the clean image first (AutoAttack's apgd-t).

    Any wrong answer breaks a sample, not only the one aimed at; it then takes no part in later runs.

    Args:
        net, x, y, ball, judge, steps, random_start, generator, report: as for `apgd`.
        objective: what to ascend, (tuple of logits, y, target) -> (B,).
        targets: how many wrong classes to aim at; all of them where there are fewer.
        exit: whose clean logits rank the classes, counted from 0; -1 is the last.
        restarts: how many runs at most for each class.

    Returns, raises: as `apgd`.
    """

    def run(aim: Aim, x: Tensor, pair: Tensor) -> Found:
        start = _start(x, ball, generator) if random_start or aim.number > 0 else x.clone()
        return _ascend(net, x, pair, ball, start, aim.objective, aim.judge, steps, aim.tally)

    check_count("steps", steps, 0)
    return towards_each(net, x, y, ball, run, objective, judge, targets, exit, restarts, report)


class Aim(NamedTuple):
    """What one run towards one wrong class goes by."""

    number: int
    """Of the run, from 0."""
    round: int
    """How often every class was aimed at before."""
    objective: Objective
    """(tuple of logits, (label, target) pairs) -> (B,)."""
    judge: Judge
    """Of the same."""
    tally: GradientTally | None


# Takes images and (label, target) pairs, (B, 2).
TargetedRun = Callable[[Aim, Tensor, Tensor], Found]


def towards_each(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    run: TargetedRun,
    objective: TargetedObjective,
    judge: Judge,
    targets: int,
    exit: int,
    restarts: int,
    report: GradientReport | None,
) -> Tensor:
    """An attack towards one wrong class after another, as `apgd_targeted` describes it; all arguments are in order."""
    check_count("targets", targets, 1)
    check_count("restarts", restarts, 1)
    x, y = checked_inputs(net, x, y, ball)
    if ball.radius == 0 or len(x) == 0:
        return x.clone()
    tally = None if report is None else GradientTally(report)
    ranked = likeliest_wrong(net, x, y, exit, targets)
    aims = ranked.shape[1]

    def one(number: int, x: Tensor, labels: Tensor) -> Found:
        aim = Aim(
            number,
            number // aims,
            lambda logits, pair: objective(logits, pair[:, 0], pair[:, 1]),
            lambda logits, pair: judge(logits, pair[:, 0]),
            tally,
        )
        return run(aim, x, labels[:, [0, 1 + number % aims]])

    with attacking(net):
        worst = worst_of(x, torch.cat([y[:, None], ranked], 1), aims * restarts, one)
    if tally is not None:
        tally.close()
    return assert_inside(worst, x, ball)


def likeliest_wrong(net: nn.Module, x: Tensor, y: Tensor, exit: int, targets: int) -> Tensor:
    """The wrong classes of largest logits on the images themselves, the likeliest first: (B, up to `targets`).

    Args:
        exit: whose logits, counted from 0; -1 is the last.

    Raises:
        InputError: an exit that the network does not have.
    """
    with attacking(net), torch.no_grad():
        logits = as_exits(net(x))
    check_exit(exit, len(logits))
    clean = torch.nan_to_num(logits[exit])
    return clean.scatter(1, y[:, None], -math.inf).argsort(1, descending=True)[:, :-1][:, :targets]


def _start(x: Tensor, ball: Ball, generator: torch.Generator | None) -> Tensor:
    """A random point of the ball; in L1 of the widest ball, and sparse, as what climbs there ends in few pixels.

    AutoAttack's: the nearest point to an image of noise. A uniform point of the L1 ball moves each pixel by a hair; on
    networks trained for a proof climbs from there ended far lower.
    """
    if ball.norm != "1":
        return ball.sample(x, generator)
    device = generator.device if generator else x.device
    noise = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
    return ball.with_eps(_WIDER[0][0] * ball.radius).project(x + noise, x)


def _ascend(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    start: Tensor,
    objective: Objective,
    judge: Judge,
    steps: int,
    tally: GradientTally | None,
) -> Found:
    """One climb from a start; y is whatever objective and judge want to know of each sample, (B, ...)."""
    if ball.norm != "1":
        return _climb(net, x, y, ball, start, objective, judge, steps, tally)
    # Points of wider balls prove nothing, so nobody judges there: what is broken already is let go before.
    found = _climb(net, x, y, ball, ball.project(start, x), objective, judge, 0, None)
    left = (~found.broken).nonzero().squeeze(1)
    if len(left) == 0:
        return found
    x, y, start = x[left], y[left], start[left]
    for factor, share in _WIDER:
        wider, part = ball.with_eps(factor * ball.radius), int(share * steps)
        start = _climb(net, x, y, wider, wider.project(start, x), objective, never, part, tally).x_adv
    steps -= sum(int(share * steps) for _, share in _WIDER)
    ended = _climb(net, x, y, ball, ball.project(start, x), objective, judge, steps, tally)
    for whole, part_of_it in zip(found, ended, strict=True):
        whole[left] = part_of_it
    return found


def _climb(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    start: Tensor,
    objective: Objective,
    judge: Judge,
    steps: int,
    tally: GradientTally | None,
) -> Found:
    """A climb in one ball. Samples leave it as soon as they are broken."""
    found = Found(
        start.clone(),
        x.new_full((len(x),), -math.inf),
        torch.zeros(len(x), dtype=torch.bool, device=x.device),
    )
    left = torch.arange(len(x), device=x.device)
    climb = Climb(x, y, start, start, start.clone(), found.loss.clone(), torch.zeros_like(start))
    rule: Rule = RULES[ball.norm](ball, x, steps)
    latest = found.loss
    for done in range(steps + 1):
        logits, loss, climb.grad = looked_at(net, climb.now, climb.y, objective, gradient=done < steps)
        if tally is not None and done < steps:
            tally.add(climb.grad)
        # A NaN is the worst objective there is, so that no point is kept for it.
        loss = torch.nan_to_num(loss.to(x.dtype), nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        broken = judge(logits, climb.y)
        better = loss > climb.best_loss
        climb.best[better], climb.best_loss[better] = climb.now[better], loss[better]
        climb.best_grad[better] = climb.grad[better]
        if done > 0:
            rule.note(loss > latest)
        latest = loss
        if bool(broken.any()):
            found.x_adv[left[broken]] = climb.now[broken]
            found.loss[left[broken]], found.broken[left[broken]] = loss[broken], True
            left, latest = left[~broken], latest[~broken]
            kept(climb, ~broken)
            kept(rule, ~broken)
        if done == steps or len(left) == 0:
            break
        rule.check(done, climb)
        climb.now = rule.next(climb)
    found.x_adv[left], found.loss[left] = climb.best, climb.best_loss
    return found
