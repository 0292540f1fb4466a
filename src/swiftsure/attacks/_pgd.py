"""Projected gradient ascent (Madry et al. 2018) in L-inf, L2 and L1 balls."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from swiftsure.attacks._gradient import (
    Gradient,
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
from swiftsure.attacks.objectives import Judge, Objective, cross_entropy, misclassified, never
from swiftsure.ball import Ball, steepest_l1
from swiftsure.errors import InputError

# A step rule takes (iterate, gradient, share of the steps done, in [0, 1)) and returns the next iterate.
StepRule = Callable[[Tensor, Tensor, float], Tensor]

# The length of the whole path over eps. L-inf: the ball is 2 across. L2: on the sphere the angle to the goal
# shrinks by exp(-path / eps), so 2.5 leaves 1.3% of a linear objective on the table and 5 leaves 0.01%.
# L1: 10 was measured to be stronger than 5 and 2.5 on MNIST.
PATH = {"inf": 2.5, "2": 5.0, "1": 10.0}


def pgd(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    objective: Objective = cross_entropy,
    judge: Judge = misclassified,
    steps: int = 40,
    step_size: float | None = None,
    restarts: int = 1,
    random_start: bool = True,
    generator: torch.Generator | None = None,
    report: GradientReport | None = None,
    gradient: Gradient = input_gradient,
) -> Tensor:
    """Ascend an objective from a random point of the ball, several times; keep the worst image per sample.

    A sample drops out of the batch at the first point that the judge counts as broken; the others end each run with
    its last iterate, of which the one of largest objective is kept. With the judge `never` all run to the end. The
    network runs in evaluation mode, and its modes, its parameters and their .grad are left as they were found; the
    caller may be inside torch.no_grad(). Where a gradient is NaN, that step moves nothing.

    Args:
        net: returns logits (B, classes), or a tuple of them, one per exit.
        x: images, (B, C, H, W), in the ball's pixel range.
        y: labels, (B,), integers.
        ball: the threat model.
        objective: what to ascend, (tuple of logits, y) -> (B,); default: cross-entropy of the last exit.
        judge: what counts as broken, (tuple of logits, y) -> (B,) bool.
        steps: gradient steps per restart; 0 returns the start.
        step_size: length of a step in the ball's norm, pixel units; for "1" the mean of steps that shrink
            to 0. None: 2.5 * eps / steps for "inf" (eps / 4 at 10 steps; enough to cross the ball
            whatever the start), 5 * eps / steps for "2", 10 * eps / steps for "1". The step of RDI-Nets on
            MNIST (eps 0.3, 40 steps) is 0.01.
        restarts: how many runs at most.
        random_start: True: every run starts at a random point of the ball. False: the first starts at x.
        generator: makes the starts reproducible; None draws from torch's global one.
        report: counts zero and non-finite gradients, if given.
        gradient: how gradients are taken, such as `Replayed`; with another than the usual one the judge is asked only
            between restarts.

    Returns:
        Adversarial images, shaped like x, inside the ball and the pixel range, outside any autograd graph.

    Raises:
        InputError: images or labels that do not fit each other, the network or the ball's pixel range; a
            number of steps or restarts or a step size that makes no sense.
    """
    check_options(steps, step_size, restarts)
    x, y = checked_inputs(net, x, y, ball)
    if ball.radius == 0 or len(x) == 0:
        return x.clone()
    if step_size is None:
        step_size = PATH[ball.norm] * ball.radius / max(steps, 1)
    tally = None if report is None else GradientTally(report)

    def run(number: int, x: Tensor, y: Tensor) -> Found:
        start = ball.sample(x, generator) if random_start or number > 0 else x.clone()
        if gradient is input_gradient and judge is not never:
            # The end of a single run is compared with nothing, so nobody need look at it.
            looks = steps + 1 if restarts > 1 else steps
            return climb(net, x, y, start, ball, objective, judge, steps, step_size, tally, looks)
        x_adv = ascend(net, x, y, start, ball, objective, steps, step_size, tally, gradient)
        if restarts == 1:
            # Nothing to compare it with.
            return Found(x_adv, x.new_zeros(len(x)), torch.zeros(len(x), dtype=torch.bool, device=x.device))
        logits, loss, _ = looked_at(net, x_adv, y, objective, gradient=False)
        return Found(x_adv, loss, judge(logits, y))

    with attacking(net):
        worst = run(0, x, y).x_adv if restarts == 1 else worst_of(x, y, restarts, run)
    if tally is not None:
        tally.close()
    return assert_inside(worst, x, ball)


def climb(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    start: Tensor,
    ball: Ball,
    objective: Objective,
    judge: Judge,
    steps: int,
    step_size: float,
    tally: GradientTally | None,
    looks: int | None = None,
) -> Found:
    """One run from a start in the ball, that samples leave at the first point that is broken.

    Of `looks` points the objective and the judge are asked; None: of all, the last one included.
    """
    found = Found(
        start.clone(),
        x.new_full((len(x),), -math.inf),
        torch.zeros(len(x), dtype=torch.bool, device=x.device),
    )
    rule, now, left = _RULES[ball.norm](ball, x, step_size), start, torch.arange(len(x), device=x.device)
    for step in range(steps + 1 if looks is None else looks):
        logits, loss, grad = looked_at(net, now, y, objective, gradient=step < steps)
        if tally is not None and step < steps:
            tally.add(grad)
        broken = judge(logits, y)
        if step == steps or bool(broken.any()):
            ends = broken if step < steps else torch.ones_like(broken)
            found.x_adv[left[ends]], found.loss[left[ends]] = now[ends], loss[ends].to(x.dtype)
            found.broken[left[ends]] = broken[ends]
            x, y, now, grad, left = (part[~ends] for part in (x, y, now, grad, left))
            if len(left) == 0:
                break
            rule = _RULES[ball.norm](ball, x, step_size)
        now = rule(now, grad, step / steps)
    found.x_adv[left] = now
    return found


def ascend(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    start: Tensor,
    ball: Ball,
    objective: Objective,
    steps: int,
    step_size: float,
    tally: GradientTally | None,
    gradient: Gradient = input_gradient,
) -> Tensor:
    """The last iterate of one run from a start in the ball, as `pgd` describes it; all arguments are in order."""
    rule, x_adv = _RULES[ball.norm](ball, x, step_size), start
    for step in range(steps):
        grad = gradient(net, x_adv, y, objective)
        if tally is not None:
            tally.add(grad)
        x_adv = rule(x_adv.detach(), grad, step / steps)
    return x_adv


def check_options(steps: int, step_size: float | None, restarts: int) -> None:
    """Refuse numbers that make no sense.

    Raises:
        InputError: as said.
    """
    check_count("steps", steps, 0)
    check_count("restarts", restarts, 1)
    if step_size is not None and not (math.isfinite(step_size) and step_size > 0):
        raise InputError(f"step_size is {step_size!r}; allowed: a finite number > 0 in pixel units, or None")


def _sign_ascent(ball: Ball, x: Tensor, step_size: float) -> StepRule:
    """L-inf: every pixel moves by step_size along the gradient's sign. The sign of NaN is 0 in torch."""
    lower, upper = ball.box(x)

    def rule(x_adv: Tensor, grad: Tensor, done: float) -> Tensor:
        return torch.add(x_adv, grad.sign(), alpha=step_size).clamp_(lower, upper)

    return rule


def _radial_ascent(ball: Ball, x: Tensor, step_size: float) -> StepRule:
    """L2: a step along the gradient, then the nearest point of the ball.

    step_size is the length of its movable part. The part that pushes against the end of the pixel range is
    kept, though it moves nothing: without it the projection would draw those pixels back.
    """
    per_image = (-1,) + (1,) * (x.dim() - 1)

    def rule(x_adv: Tensor, grad: Tensor, done: float) -> Tensor:
        grad = torch.nan_to_num(grad, nan=0.0)
        # Scaled by the largest entry first: squares of a saturated network's gradients underflow.
        grad = grad / grad.flatten(1).abs().amax(1).clamp_min(1e-38).view(per_image)
        movable = grad * (ball.room(x_adv, grad) * 1e6).clamp_max_(1)
        length = torch.linalg.vector_norm(movable.flatten(1), dim=1).clamp_min_(1e-6)
        return ball.project(torch.addcmul(x_adv, grad, (step_size / length).view(per_image)), x)

    return rule


def _sparse_ascent(ball: Ball, x: Tensor, step_size: float) -> StepRule:
    """L1: spend a step on the pixels of largest slope that still have room, then go to the nearest point.

    The steepest step moves as few pixels as it can; curved objectives want more. So no pixel takes more than
    its share, and the number of shares falls geometrically from 1/20 of the pixels to one over the first 60%
    of the steps (compare SLIDE, Tramer and Boneh 2019, fixed at 1%, and APGD for L1, Croce and Hein 2021). The
    steps shrink to 0, so that the exchange between full pixels and the projection dies out: on a linear
    objective the run ends at the optimum.
    """
    widest = max(1.0, math.prod(x.shape[1:]) / 20)

    def rule(x_adv: Tensor, grad: Tensor, done: float) -> Tensor:
        slope = torch.nan_to_num(grad, nan=0.0)
        length = 3 * step_size * (1 - done) ** 2
        share = length / widest ** max(0.0, 1 - done / 0.6)
        room = ball.room(x_adv, slope).clamp_max_(share)
        move = steepest_l1(slope.flatten(1), room.flatten(1), length)
        return ball.project(x_adv + move.view_as(x), x)

    return rule


_RULES: dict[str, Callable[[Ball, Tensor, float], StepRule]] = {
    "inf": _sign_ascent,
    "2": _radial_ascent,
    "1": _sparse_ascent,
}
