"""WRM: ascent of a loss less a transport cost (Sinha et al. 2018), in the form that RDI-Nets was evaluated with."""

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
    input_gradient,
    looked_at,
)
from swiftsure.attacks._restarts import Found, worst_of
from swiftsure.attacks.objectives import Judge, Objective, cross_entropy, misclassified
from swiftsure.ball import Ball


def wrm(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    objective: Objective = cross_entropy,
    judge: Judge = misclassified,
    steps: int = 15,
    restarts: int = 1,
    random_start: bool = False,
    generator: torch.Generator | None = None,
    report: GradientReport | None = None,
) -> Tensor:
    """Ascend eps * objective - ||d||_2^2 / 2 by steps of 1 / sqrt(t + 2), each followed by a projection onto the ball.

    d is the move away from x. The penalty, not the ball, is what mostly holds d back, so this is a weak attack; it is
    here because RDI-Nets reports it (there unprojected: `wrm_unprojected`).

    Args:
        net: returns logits (B, classes), or a tuple of them, one per exit; left as found.
        x: images, (B, C, H, W), in the ball's pixel range.
        y: labels, (B,), integers.
        ball: the threat model.
        objective: what to ascend, (tuple of logits, y) -> (B,).
        judge: what counts as broken, (tuple of logits, y) -> (B,) bool; such a sample drops out of the batch.
        steps: gradient steps per restart; 0 returns the start.
        restarts: how many runs at most.
        random_start: True: every run starts at a random point of the ball. False: the first starts at x.
        generator: makes the starts reproducible; None draws from torch's global one.
        report: counts zero and non-finite gradients, if given.

    Returns:
        Adversarial images, shaped like x, inside the ball and the pixel range, outside any autograd graph.

    Raises:
        InputError: as `apgd`.
    """
    check_count("steps", steps, 0)
    check_count("restarts", restarts, 1)
    x, y = checked_inputs(net, x, y, ball)
    if ball.radius == 0 or len(x) == 0:
        return x.clone()
    tally = None if report is None else GradientTally(report)

    def run(number: int, x: Tensor, y: Tensor) -> Found:
        now = ball.sample(x, generator) if random_start or number > 0 else x.clone()
        found = Found(now.clone(), x.new_zeros(len(x)), torch.zeros_like(y, dtype=torch.bool))
        left = torch.arange(len(x), device=x.device)
        for step in range(steps + 1):
            logits, loss, grad = looked_at(net, now, y[left], objective, gradient=step < steps)
            if tally is not None and step < steps:
                tally.add(grad)
            broken = judge(logits, y[left])
            ends = broken if step < steps else torch.ones_like(broken)
            found.x_adv[left[ends]], found.loss[left[ends]] = now[ends], loss[ends].to(x.dtype)
            found.broken[left[ends]] = broken[ends]
            now, grad, left = now[~ends], grad[~ends], left[~ends]
            if len(left) == 0:
                break
            now = ball.project(_stepped(x[left], now, ball, grad, step), x[left])
        return found

    with attacking(net):
        worst = worst_of(x, y, restarts, run)
    if tally is not None:
        tally.close()
    return assert_inside(worst, x, ball)


def wrm_unprojected(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    objective: Objective = cross_entropy,
    steps: int = 15,
    report: GradientReport | None = None,
) -> Tensor:
    """`wrm` from x, as released: the ball gives eps, the weight of the loss, and the pixel range, but no limit.

    What it returns may lie outside the ball; it says nothing about robustness within it, and no suite contains it.

    Args:
        net, x, y, ball, objective, steps, report: as for `wrm`.

    Returns:
        Images, shaped like x, inside the pixel range, outside any autograd graph.

    Raises:
        InputError: as `wrm`.
    """
    check_count("steps", steps, 0)
    x, y = checked_inputs(net, x, y, ball)
    tally = None if report is None else GradientTally(report)
    now = x.clone()
    with attacking(net):
        for step in range(steps if len(x) else 0):
            grad = input_gradient(net, now, y, objective)
            if tally is not None:
                tally.add(grad)
            now = _stepped(x, now, ball, grad, step).clamp(ball.low, ball.high)
    if tally is not None:
        tally.close()
    return now


def _stepped(x: Tensor, now: Tensor, ball: Ball, grad: Tensor, step: int) -> Tensor:
    """The next iterate, before any projection."""
    # A gradient that is no number moves nothing; the penalty still draws back.
    ascent = ball.radius * torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0) - (now - x)
    return now + ascent / math.sqrt(step + 2)
