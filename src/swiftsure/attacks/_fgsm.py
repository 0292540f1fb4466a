"""The fast gradient method: one gradient, one move to the edge of the ball (Goodfellow et al. 2015)."""

from __future__ import annotations

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
from swiftsure.attacks.objectives import Judge, Objective, cross_entropy, never
from swiftsure.ball import Ball
from swiftsure.errors import InputError


def fgsm(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    objective: Objective = cross_entropy,
    judge: Judge = never,
    steps: int = 1,
    restarts: int = 1,
    generator: torch.Generator | None = None,
    report: GradientReport | None = None,
) -> Tensor:
    """The best point of the ball for the objective's linearisation at x.

    For "inf" that is x + eps * sign(gradient), clipped to the pixel range; "2" and "1" have their exact
    counterparts (`Ball.maximiser`). Entries of the gradient that are NaN count as zero.

    Args:
        net: the network; its modes, its parameters and their .grad stay as they are.
        x: images, (B, C, H, W), in the ball's pixel range.
        y: labels, (B,), integers.
        ball: the threat model.
        objective: what to ascend, by default the cross-entropy of the last exit.
        judge: what counts as broken; samples that are so at x stay at x. By default none.
        steps: 1, as of every attack; `pgd` takes more.
        restarts: nothing is drawn, so that further runs would find the same: the count is checked, no more.
        generator: takes no part, as nothing is drawn.
        report: counts zero and non-finite gradients, if given.

    Returns:
        Adversarial images, shaped like x, outside any autograd graph.

    Raises:
        InputError: images or labels that do not fit each other, the network or the ball's pixel range; steps that are
            not 1, or restarts below 1.
    """
    if steps != 1:
        raise InputError(f"steps is {steps!r}; fgsm takes 1, pgd any number")
    check_count("restarts", restarts, 1)
    x, y = checked_inputs(net, x, y, ball)
    if ball.radius == 0 or len(x) == 0:
        return x.clone()
    with attacking(net):
        logits, _, grad = looked_at(net, x, y, objective)
        broken = judge(logits, y)
    if report is not None:
        tally = GradientTally(report)
        tally.add(grad)
        tally.close()
    x_adv = ball.maximiser(x, torch.nan_to_num(grad, nan=0.0))
    return assert_inside(torch.where(broken[:, None, None, None], x, x_adv), x, ball)
