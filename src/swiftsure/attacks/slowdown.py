"""Objectives that keep an input from leaving early: the goal is cost, not a wrong answer.

They read all exits but the last, take labels like any objective and ignore them, and go with the judge `never`, or
with `delayed` where samples that cannot be slowed down further may rest. How much an attack achieved is told by the
multiply-adds that it forces, not by these losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from swiftsure.attacks.objectives import Judge, Logits, Objective
from swiftsure.errors import InputError


def deepsloth(logits: Logits, y: Tensor) -> Tensor:
    """Minus the sum over side exits of CE(uniform, softmax): (B,), nats (Hong et al. 2021, DeepSloth).

    Its gradient never vanishes, however sure an exit is; but it goes on flattening exits that are silent already.
    A network without side exits has nothing to slow down: 0 everywhere.
    """
    parts = [F.log_softmax(z, dim=1).mean(1) for z in logits[:-1]]
    return torch.stack(parts).sum(0) if parts else logits[-1].new_zeros(len(y))


def above_thresholds(thresholds: Sequence[float], slack: float = 0.05) -> Objective:
    """Push each side exit's entropy just above its own threshold, and no further.

    The sum over side exits of min(ln H_i - ln T_i, slack): an exit that is silent by more than the slack asks for
    nothing, so the ball is spent on the others. Logarithms, because the entropy of an exit that is very sure, and
    with it the entropy's gradient, underflows; their ratio does not.

    Args:
        thresholds: T_i of each exit but the last, nats; exit i fires where H_i < T_i. One of 0 never fires.
        slack: how far above a threshold is far enough, as a logarithm: 0.05 is 5%.

    Raises:
        InputError: a threshold that is negative or not finite, or a slack that is not positive; when called on
            logits of another number of side exits.
    """
    _check(thresholds)
    if not slack > 0:
        raise InputError(f"slack is {slack}; allowed: a number > 0")

    def loss(logits: Logits, y: Tensor) -> Tensor:
        total = logits[-1].new_zeros(len(y))
        for z, threshold in zip(_side_exits(logits, thresholds), thresholds, strict=True):
            if threshold > 0:
                goal = math.log(threshold) + slack
                total = total + (log_entropy(z) - goal).clamp_max(0)
        return total

    return loss


def delayed(thresholds: Sequence[float]) -> Judge:
    """The judge of a slowdown: (B,) bool, whether every side exit is silent, H_i >= T_i.

    Args and errors as of `above_thresholds`.
    """
    _check(thresholds)

    def silent(logits: Logits, y: Tensor) -> Tensor:
        all_silent = torch.ones(len(y), dtype=torch.bool, device=y.device)
        for z, threshold in zip(_side_exits(logits, thresholds), thresholds, strict=True):
            p = F.log_softmax(z.double(), dim=1)
            all_silent &= -(p.exp() * p).sum(1) >= threshold
        return all_silent

    return silent


def log_entropy(z: Tensor) -> Tensor:
    """The logarithm of the softmax entropy of logits (B, classes): (B,).

    Exact where the entropy itself is below the least float: with a the log-odds of all other classes against the
    largest, H = p_top softplus(a) + sum over the others of p_j (-ln p_j), and each term's logarithm is in range.
    """
    top = z.detach().argmax(1, keepdim=True)
    log_p = F.log_softmax(z, dim=1)
    rest = z.scatter(1, top, -torch.inf).logsumexp(1)
    odds = rest - z.gather(1, top).squeeze(1)
    # ln softplus(a) is a - e^a / 2 + ... for small e^a; the other branch is kept finite where it is not taken.
    usual = F.softplus(odds.clamp_min(-15)).log()
    own = log_p.gather(1, top).squeeze(1) + torch.where(odds < -15, odds, usual)
    others = log_p + (-log_p).clamp_min(1e-30).log()
    return torch.cat([others.scatter(1, top, -torch.inf), own[:, None]], 1).logsumexp(1)


def _check(thresholds: Sequence[float]) -> None:
    for threshold in thresholds:
        if not 0 <= threshold < float("inf"):
            raise InputError(f"a threshold is {threshold}; allowed: a finite entropy >= 0, in nats")


def _side_exits(logits: Logits, thresholds: Sequence[float]) -> Logits:
    if len(logits) - 1 != len(thresholds):
        raise InputError(
            f"{len(thresholds)} thresholds for {len(logits) - 1} side exits; allowed: one for each but the last exit"
        )
    return logits[:-1]
