"""The fast gradient method: one gradient, one move to the edge of the ball (Goodfellow et al. 2015)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from swiftsure.attacks._gradient import (
    GradientReport,
    GradientTally,
    assert_inside,
    attacking,
    checked_inputs,
    input_gradient,
)
from swiftsure.attacks.objectives import Objective, cross_entropy
from swiftsure.ball import Ball


def fgsm(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    objective: Objective = cross_entropy,
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
        report: counts zero and non-finite gradients, if given.

    Returns:
        Adversarial images, shaped like x, outside any autograd graph.

    Raises:
        InputError: images or labels that do not fit each other, the network or the ball's pixel range.
    """
    x, y = checked_inputs(net, x, y, ball)
    if ball.radius == 0 or len(x) == 0:
        return x.clone()
    with attacking(net):
        grad = input_gradient(net, x, y, objective)
    if report is not None:
        tally = GradientTally(report)
        tally.add(grad)
        tally.close()
    return assert_inside(ball.maximiser(x, torch.nan_to_num(grad, nan=0.0)), x, ball)
