"""FAB: the nearest point that changes the answer, by steps to the linearised boundary (Croce and Hein 2020)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from swiftsure.attacks._apgd import Aim, towards_each
from swiftsure.attacks._gradient import (
    GradientReport,
    GradientTally,
    check_count,
    looked_at,
)
from swiftsure.attacks._restarts import Found
from swiftsure.attacks.objectives import Judge, Objective, TargetedObjective, misclassified, targeted_margin
from swiftsure.ball import Ball

_BEYOND = 1.05
"""Steps go this much further than the linearised boundary."""
_BACK = 0.9
"""From a point that changes the answer, the search goes on at this share of the way to it."""
_PULL = 0.1
"""The largest weight of the step from the clean image, which pulls the search back towards it."""


def fab_targeted(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    objective: TargetedObjective = targeted_margin,
    judge: Judge = misclassified,
    targets: int = 9,
    exit: int = -1,
    steps: int = 100,
    restarts: int = 1,
    random_start: bool = False,
    generator: torch.Generator | None = None,
    report: GradientReport | None = None,
) -> Tensor:
    """Go to the boundary with one wrong class after another, the likeliest on the clean image first (fab-t).

    Other attacks climb as high as they can inside the ball; this one looks for the nearest point where the answer
    changes, wherever the ball ends (arXiv 1907.02044, algorithm 1, on margins of pairs of classes as in AutoAttack). It
    is at home in L2 and L1, where few of a ball's points are far from x.

    A sample drops out of the batch at the first broken point inside the ball. Of the others the nearest point beyond a
    boundary is projected onto the ball; where there was none, x itself stays.

    Args:
        net, x, y, ball, judge, targets, exit, generator, report: as for `apgd_targeted`.
        objective: (tuple of logits, y, target) -> (B,), 0 on the boundary and positive where the target wins.
        steps: steps to the boundary per run, of two passes and one gradient each.
        restarts: how many runs at most for each class; the first starts at x, further ones at random points half-way
            out.
        random_start: True: the first starts at random as well.

    Returns, raises: as `apgd_targeted`.
    """

    def run(aim: Aim, x: Tensor, pair: Tensor) -> Found:
        halfway = random_start or aim.round > 0
        start = x + (ball.sample(x, generator) - x) / 2 if halfway else x.clone()
        return _approach(net, x, pair, ball, start, aim.objective, aim.judge, steps, aim.tally)

    check_count("steps", steps, 1)
    return towards_each(net, x, y, ball, run, objective, judge, targets, exit, restarts, report)


def _approach(
    net: nn.Module,
    x: Tensor,
    pair: Tensor,
    ball: Ball,
    start: Tensor,
    objective: Objective,
    judge: Judge,
    steps: int,
    tally: GradientTally | None,
) -> Found:
    """One run from a start. The loss of what it found is minus its distance before the projection."""
    nearest = x.new_full((len(x),), math.inf)
    found = Found(x.clone(), -nearest, torch.zeros(len(x), dtype=torch.bool, device=x.device))
    left, now = torch.arange(len(x), device=x.device), start
    for done in range(steps + 1):
        logits, gap, _ = looked_at(net, now, pair, objective, gradient=False)
        broken = judge(logits, pair)
        beyond = broken | (gap > 0)
        if bool(beyond.any()):
            distance = ball.distance(now, x)
            closer = beyond & (distance < nearest)
            nearest = torch.where(closer, distance, nearest)
            hit = broken & ball.contains(now, x)
            found.x_adv[left[closer | hit]] = now[closer | hit]
            found.loss[left[closer]], found.broken[left[hit]] = -distance[closer], True
            back = 1 - (1 - _BACK) * beyond.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
            now = x + back * (now - x)
            x, pair, now, nearest, left = (part[~hit] for part in (x, pair, now, nearest, left))
        if done == steps or len(left) == 0:
            break
        # Where it went back, the slope there is wanted, not the one beyond the boundary.
        _, gap, grad = looked_at(net, now, pair, objective)
        if tally is not None:
            tally.add(grad)
        now = _step(x, now, gap, grad, ball)
    found.x_adv[left] = ball.project(found.x_adv[left], x)
    return found


def _step(x: Tensor, now: Tensor, gap: Tensor, grad: Tensor, ball: Ball) -> Tensor:
    """The next point: beyond the linearised boundary, mostly from where the search is, a little from x."""
    grad, gap = torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0), torch.nan_to_num(gap)
    # Gradients of any scale: what counts is the boundary, gap + <grad, . - now> = 0.
    peak = grad.flatten(1).abs().amax(1).clamp_min(1e-30)
    grad, gap = grad / peak.view(-1, *[1] * (x.dim() - 1)), gap / peak
    from_now = to_plane(now, grad, -gap, ball)
    from_x = to_plane(x, grad, -gap - (grad * (x - now)).flatten(1).sum(1), ball)
    near, far = (ball.distance(move, torch.zeros_like(move)) for move in (from_now, from_x))
    pull = (near / (near + far).clamp_min(1e-30)).clamp_max(_PULL).view(-1, *[1] * (x.dim() - 1))
    there = (1 - pull) * (now + _BEYOND * from_now) + pull * (x + _BEYOND * from_x)
    return there.clamp(ball.low, ball.high)


def to_plane(x: Tensor, slope: Tensor, missing: Tensor, ball: Ball) -> Tensor:
    """The shortest move, in the ball's norm and inside the pixel range, with <slope, move> = missing.

    Exact for every norm, whatever the ball's radius: "inf": all pixels by one length, "2": in proportion to their
    slopes, each until its range ends; "1": the steepest first. Where the range has not that much, all that it has.

    Args:
        x: images in the pixel range, (B, ...).
        slope: finite, shaped like x; its largest entry about 1.
        missing: (B,), of either sign.

    Returns:
        The move, shaped like x.
    """
    shape = (-1, *[1] * (x.dim() - 1))
    direction = slope * missing.sign().view(shape)
    room, steep = ball.room(x, direction).flatten(1), slope.flatten(1).abs()
    need = missing.abs()[:, None]
    if ball.norm == "1":
        order = steep.argsort(dim=1, descending=True)
        gains = (steep * room).gather(1, order)
        share = ((need - (gains.cumsum(1) - gains)) / gains.clamp_min(1e-30)).clamp(0, 1)
        move = torch.zeros_like(room).scatter_(1, order, share) * room
    else:
        # At length t a pixel moves by min(t * pace, room). Sorted by where they stop, the gain is linear in between.
        pace = torch.ones_like(steep) if ball.norm == "inf" else steep
        ends = torch.where(pace > 0, room / pace.clamp_min(1e-30), 1e30).clamp_max(1e30)
        order = ends.argsort(dim=1)
        stops, rates, full = (v.gather(1, order) for v in (ends, steep * pace, steep * room))
        stopped = full.cumsum(1) - full
        moving = rates.flip(1).cumsum(1).flip(1)
        place = (stopped + stops * moving < need).sum(1, keepdim=True)
        enough = place < ends.shape[1]
        place = place.clamp_max(ends.shape[1] - 1)
        length = (need - stopped.gather(1, place)) / moving.gather(1, place).clamp_min(1e-30)
        move = torch.minimum(torch.where(enough, length, 1e30) * pace, room)
    return move.view_as(x) * direction.sign()
