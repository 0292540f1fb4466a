"""Objectives of a network as it is deployed: its exits, and the policy that decides at which one an input leaves.

A policy is a gate: nothing of it is differentiable, and an attack that looks at logits alone may raise the loss of an
exit that never gets to speak. `deployed` follows the exit that answers; `gate_forcing` makes a chosen exit answer,
wrongly, by silencing all before it. Both go with the judge `policy.misclassified`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from swiftsure.attacks._apgd import apgd
from swiftsure.attacks._gradient import attacking, checked_inputs, looked_at
from swiftsure.attacks._restarts import Found, worst_of
from swiftsure.attacks.objectives import Judge, Logits, Objective, check_exit, cross_entropy, margin
from swiftsure.ball import Ball
from swiftsure.exits.policies import Policy

SLACK = 0.05
"""How far beyond a threshold is far enough, as a logarithm (5%) or in logits."""

_SURE = 1e-12
"""Probabilities are kept this far from 0 and 1 where they become log-odds."""


def deployed(policy: Policy, of: Callable[..., Tensor] = cross_entropy) -> Callable[..., Tensor]:
    """An objective of the exit by which each sample leaves: what the network says, as it is deployed.

    It jumps where a sample changes its exit, and its gradient knows only the exit taken now. So it is at home where
    gates play no part, and finds nothing behind a gate that hides a weak exit: `gate_forcing` does.

    Args:
        policy: when samples leave.
        of: of one exit, (tuple of logits, y, ...) -> (B,).

    Raises:
        InputError: when called on logits of another number of exits.
    """

    def at_its_exit(logits: Logits, *labels: Tensor) -> Tensor:
        exit = policy.exit_of([z.detach() for z in logits])
        taken = torch.stack(logits)[exit, torch.arange(len(exit), device=exit.device)]
        return of((taken,), *labels)

    return at_its_exit


def gate_forcing(policy: Policy, exit: int, slack: float = SLACK) -> Objective:
    """Make one exit fire for a wrong class, while all earlier ones stay silent.

    The sum of min(., slack) over the conditions of that: for each earlier exit how far its score is on the silent side
    of its threshold (`silence`); for the exit itself the log-odds of the likeliest wrong class against all others,
    less those at which it fires whatever the other classes get (at the last exit: its margin). A condition that
    holds by more than the slack asks for nothing, so the ball is spent on the others. All are logarithms of
    probabilities, so none underflows where an exit is very sure.

    Args:
        policy: when samples leave.
        exit: which one is to answer, from 0; -1 is the last.
        slack: how far each condition is pushed beyond what it needs.

    Raises:
        InputError: an exit that the policy does not have; when called, logits of another number of exits.
    """
    check_exit(exit, policy.exits)
    exit %= policy.exits

    def loss(logits: Logits, y: Tensor) -> Tensor:
        policy.require(len(logits))
        total = logits[-1].new_zeros(len(y))
        for number in range(exit):
            total = total + silence(policy, number, logits[number]).clamp_max(slack)
        z = logits[exit]
        if exit == policy.exits - 1:
            wrong = margin((z,), y)
        else:
            odds = log_odds(z).scatter(1, y[:, None], -math.inf).amax(1)
            wrong = odds - _firing_odds(policy, exit, z.shape[1])
        return total + wrong.clamp_max(slack)

    return loss


def force_gates(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    policy: Policy,
    attack: Callable[..., Tensor] = apgd,
    judge: Judge | None = None,
    **options: Any,
) -> Tensor:
    """`gate_forcing` at one exit after another; a sample that is broken takes no further part.

    Args:
        net: returns a tuple of logits, one per exit.
        x: images, (B, C, H, W), in the ball's pixel range.
        y: labels, (B,), integers.
        ball: the threat model.
        policy: of that number of exits.
        attack: the inner method, called once for each exit.
        judge: what counts as broken; None: a wrong answer of the policy.
        options: of the inner attack, such as steps, restarts, generator and report.

    Returns:
        Adversarial images, shaped like x, inside the ball and the pixel range, outside any autograd graph.

    Raises:
        InputError: as the inner attack; a policy of another number of exits.
    """
    x, y = checked_inputs(net, x, y, ball)
    asked = policy.misclassified if judge is None else judge

    def run(number: int, x: Tensor, y: Tensor) -> Found:
        objective = gate_forcing(policy, number)
        x_adv = attack(net, x, y, ball, objective=objective, judge=asked, **options)
        with attacking(net):
            # Unlike those of the gates, the losses of the answers can be compared from exit to exit.
            logits, loss, _ = looked_at(net, x_adv, y, deployed(policy, margin), gradient=False)
        return Found(x_adv, loss, asked(logits, y))

    return worst_of(x, y, policy.exits, run) if len(x) else x.clone()


def silence(policy: Policy, exit: int, z: Tensor) -> Tensor:
    """How far an exit is from firing: (B,), differentiable, positive where it is silent; infinite where it never fires.

    The entropy rule: ln H - ln T; the confidence rule: the threshold's log-odds less those of the largest probability.

    Args:
        policy: when samples leave.
        exit: which side exit, from 0.
        z: its logits, (B, classes).
    """
    threshold = policy.thresholds[exit]
    if policy.rule == "entropy":
        if threshold == 0:
            return z.new_full((len(z),), math.inf)
        return log_entropy(z) - math.log(threshold)
    if threshold == 1:
        return z.new_full((len(z),), math.inf)
    return _logit(threshold) - log_odds(z).amax(1)


def log_odds(z: Tensor) -> Tensor:
    """ln p_c / (1 - p_c) of each class, from logits (B, classes): the same shape.

    Exact however near p_c is to 0 or 1.
    """
    top = z.detach().argmax(1, keepdim=True)
    rest = z.scatter(1, top, -math.inf).logsumexp(1, keepdim=True)
    log_p = torch.log_softmax(z, dim=1)
    # All but the largest have p <= 1/2, where 1 - p loses nothing.
    odds = log_p - torch.log1p(-log_p.exp().clamp_max(0.5))
    return odds.scatter(1, top, z.gather(1, top) - rest)


def log_entropy(z: Tensor) -> Tensor:
    """The logarithm of the softmax entropy of logits (B, classes): (B,).

    Exact where the entropy itself is below the least float: with a the log-odds of all other classes against the
    largest, H = p_top softplus(a) + sum over the others of p_j (-ln p_j), and each term's logarithm is in range.
    """
    top = z.detach().argmax(1, keepdim=True)
    log_p = torch.log_softmax(z, dim=1)
    rest = z.scatter(1, top, -math.inf).logsumexp(1)
    odds = rest - z.gather(1, top).squeeze(1)
    # ln softplus(a) is a - e^a / 2 + ... for small e^a; the other branch is kept finite where it is not taken.
    usual = nn.functional.softplus(odds.clamp_min(-15)).log()
    own = log_p.gather(1, top).squeeze(1) + torch.where(odds < -15, odds, usual)
    others = log_p + (-log_p).clamp_min(1e-30).log()
    return torch.cat([others.scatter(1, top, -math.inf), own[:, None]], 1).logsumexp(1)


def _firing_odds(policy: Policy, exit: int, classes: int) -> float:
    """The log-odds of a class from which on a side exit fires for it, however the others share the rest.

    At least 0: only then is it the answer as well.
    """
    threshold = policy.thresholds[exit]
    if policy.rule == "confidence":
        return max(0.0, _logit(threshold))
    # The entropy is largest where the others share alike; it falls as the odds grow from 0 on.
    low, high = 0.0, 800.0
    if _largest_entropy(low, classes) < threshold:
        return low
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if _largest_entropy(middle, classes) < threshold else (middle, high)
    return high


def _largest_entropy(odds: float, classes: int) -> float:
    """Of all distributions with a class of these log-odds, >= 0."""
    rest = 1 / (1 + math.exp(min(odds, 700.0)))
    if rest <= 0:
        return 0.0
    return -math.log1p(-rest) * (1 - rest) - rest * math.log(rest / max(classes - 1, 1))


def _logit(p: float) -> float:
    p = min(max(p, _SURE), 1 - _SURE)
    return math.log(p) - math.log1p(-p)
