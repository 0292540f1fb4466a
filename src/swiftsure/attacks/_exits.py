"""An attack form over exits that is no single objective: RDI-Nets' max-average."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from swiftsure.attacks._gradient import attacking, checked_inputs, looked_at
from swiftsure.attacks._pgd import pgd
from swiftsure.attacks._restarts import Found, worst_of
from swiftsure.attacks.objectives import (
    Judge,
    Objective,
    as_exits,
    average,
    cross_entropy,
    misclassified,
    never,
    single,
)
from swiftsure.ball import Ball


def max_average(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    attack: Callable[..., Tensor] = pgd,
    objective: Objective = cross_entropy,
    judge: Judge = never,
    **options: Any,
) -> Tensor:
    """Attack each exit alone; keep, per sample, the image with the largest sum of the objective over all exits.

    Args:
        net: returns a tuple of logits, one per exit (or logits: then it has one).
        x: images, (B, C, H, W), in the ball's pixel range.
        y: labels, (B,), integers.
        ball: the threat model.
        attack: the inner method, called once for each exit.
        objective: of one exit; the inner attack ascends `single(i, objective)`.
        judge: what counts as broken, (tuple of logits, y) -> (B,) bool. Such an image beats any other, and is not
            attacked at further exits. By default nothing does, which is RDI-Nets' form.
        options: of the inner attack, such as steps, restarts, generator and report.

    Returns:
        Adversarial images, shaped like x, inside the ball and the pixel range, outside any autograd graph.

    Raises:
        InputError: as the inner attack.
    """
    x, y = checked_inputs(net, x, y, ball)
    if len(x) == 0:
        return x.clone()
    over_all = average(objective)
    with attacking(net), torch.no_grad():
        exits = len(as_exits(net(x[:1])))

    def run(number: int, x: Tensor, y: Tensor) -> Found:
        # Between its own restarts the inner attack goes by the exit that it attacks.
        asked = single(number, misclassified) if judge is never else judge
        x_adv = attack(net, x, y, ball, objective=single(number, objective), judge=asked, **options)
        with attacking(net):
            logits, loss, _ = looked_at(net, x_adv, y, over_all, gradient=False)
        return Found(x_adv, loss, judge(logits, y))

    return worst_of(x, y, exits, run)
