"""Attack forms over exits that are no single objective: one exit without what lies behind it, and max-average."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from swiftsure.attacks._gradient import attacking, checked_inputs, looked_at
from swiftsure.attacks._own_exits import OwnExits, UpTo
from swiftsure.attacks._pgd import pgd
from swiftsure.attacks._restarts import Found, worst_of
from swiftsure.attacks.objectives import (
    Judge,
    Objective,
    as_exits,
    average,
    check_exit,
    cross_entropy,
    never,
    single,
)
from swiftsure.ball import Ball
from swiftsure.exits import MultiExit

_ROWS = {"cpu": 0, "cuda": 1024}
"""Up to how many rows the K copies of a batch are attacked as one, by device. Beyond, a GPU is busy anyway and memory
counts. A CPU takes half as long again for one large batch as for K that fit its caches (RDI-SmallCNN, 128 images)."""


def at_exit(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    exit: int,
    attack: Callable[..., Tensor] = pgd,
    objective: Objective = cross_entropy,
    judge: Judge = never,
    **options: Any,
) -> Tensor:
    """RDI-Nets' single attack: one exit alone, at the cost of the network up to there (where it is a `MultiExit`).

    Args:
        net: returns a tuple of logits, one per exit (or logits: then it has one).
        x: images, (B, C, H, W), in the ball's pixel range.
        y: labels, (B,), integers.
        ball: the threat model.
        exit: its number, from 0; -1 for the last.
        attack: the inner method.
        objective: of that exit.
        judge: what counts as broken, of that exit. By default nothing does: an image that only just fools this exit
            need not leave by it.
        options: of the inner attack, such as steps, restarts, generator and report.

    Returns:
        Adversarial images, as the inner attack.

    Raises:
        InputError: an exit that is not there, or as the inner attack.
    """
    if isinstance(net, MultiExit):
        check_exit(exit, net.exits)
        return attack(UpTo(net, exit), x, y, ball, objective=objective, judge=judge, **options)
    asked = never if judge is never else single(exit, judge)
    return attack(net, x, y, ball, objective=single(exit, objective), judge=asked, **options)


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

    Of a `MultiExit` each attack runs the stages up to its own exit only; on a GPU pgd attacks small batches at all
    exits at once. Neither changes the images but by rounding, given the same starts.

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
    at_once = None
    if isinstance(net, MultiExit):
        exits = net.exits
        alone = judge is never and attack is pgd and options.get("restarts", 1) == 1
        if alone and exits * len(x) <= _ROWS.get(x.device.type, 0):
            at_once = all_exits(net, x, y, ball, objective=objective, **options)
    else:
        with attacking(net), torch.no_grad():
            exits = len(as_exits(net(x[:1])))

    def run(number: int, x: Tensor, y: Tensor) -> Found:
        if at_once is not None:
            x_adv = at_once[number]
        elif judge is never:
            x_adv = at_exit(net, x, y, ball, exit=number, attack=attack, objective=objective, **options)
        else:
            x_adv = attack(net, x, y, ball, objective=single(number, objective), judge=judge, **options)
        with attacking(net):
            logits, loss, _ = looked_at(net, x_adv, y, over_all, gradient=False)
        return Found(x_adv, loss, judge(logits, y))

    return worst_of(x, y, exits, run)


def all_exits(
    net: MultiExit, x: Tensor, y: Tensor, ball: Ball, *, objective: Objective = cross_entropy, **options: Any
) -> Tensor:
    """`at_exit` by one run of pgd for every exit, in one batch of K copies: (K, B, C, H, W).

    Starts are drawn as if exit after exit was attacked. Arguments are those of `at_exit`.
    """
    shape = (net.exits, *[1] * (x.dim() - 1))
    copies = x.repeat(shape), y.repeat(net.exits)
    found = pgd(OwnExits(net, len(x)), *copies, ball, objective=objective, judge=never, **options)
    return found.view(net.exits, *x.shape)
