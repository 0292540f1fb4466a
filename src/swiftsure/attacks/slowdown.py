"""Objectives that keep an input from leaving early: the goal is cost, not a wrong answer.

They read all exits but the last, take labels like any objective and ignore them, and go with the judge `never`, or
with `delayed` where samples that cannot be slowed down further may rest. How much an attack achieved is told by the
multiply-adds that it forces (`run_slowdown`), not by these losses.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from swiftsure.attacks.gates import SLACK, silence
from swiftsure.attacks.objectives import Judge, Logits, Objective
from swiftsure.errors import InputError
from swiftsure.exits.policies import Policy


def deepsloth(logits: Logits, y: Tensor) -> Tensor:
    """Minus the sum over side exits of CE(uniform, softmax): (B,), nats (Hong et al. 2021, DeepSloth).

    Its gradient never vanishes, however sure an exit is; but it goes on flattening exits that are silent already.
    A network without side exits has nothing to slow down: 0 everywhere.
    """
    parts = [F.log_softmax(z, dim=1).mean(1) for z in logits[:-1]]
    return torch.stack(parts).sum(0) if parts else logits[-1].new_zeros(len(y))


def above_thresholds(policy: Policy, slack: float = SLACK) -> Objective:
    """Push each side exit's score just beyond its own threshold, and no further.

    The sum over side exits of min(silence, slack), for the entropy rule min(ln H_i - ln T_i, slack): an exit that is
    silent by more than the slack asks for nothing, so the ball is spent on the others. Logarithms, because the entropy
    of an exit that is very sure, and with it the entropy's gradient, underflows; their ratio does not.

    Args:
        policy: the rule and its thresholds.
        slack: how far beyond a threshold is far enough, as a logarithm: 0.05 is 5%.

    Raises:
        InputError: a slack that is not positive; when called on logits of another number of exits.
    """
    if not slack > 0:
        raise InputError(f"slack is {slack}; allowed: a number > 0")

    def loss(logits: Logits, y: Tensor) -> Tensor:
        policy.require(len(logits))
        total = logits[-1].new_zeros(len(y))
        for exit, z in enumerate(logits[:-1]):
            total = total + silence(policy, exit, z).clamp_max(slack)
        return total

    return loss


def one_by_one(policy: Policy, slack: float = SLACK) -> Objective:
    """Silence the first exit that fires, then the next: (B,), larger the later a sample leaves.

    The number of exits passed, plus a share of 1 that grows as the exit where the sample leaves nears its threshold.
    `above_thresholds` may trade an early exit for a late one, which forces nothing; this cannot. Exits passed by less
    than the slack keep a small part of the gradient, so that they stay silent. Ours.

    Args, errors: as `above_thresholds`.
    """
    if not slack > 0:
        raise InputError(f"slack is {slack}; allowed: a number > 0")

    def loss(logits: Logits, y: Tensor) -> Tensor:
        policy.require(len(logits))
        total, inside = logits[-1].new_zeros(len(y)), torch.ones_like(y, dtype=torch.bool)
        for exit, z in enumerate(logits[:-1]):
            far = silence(policy, exit, z)
            passed = inside & (far > 0)
            near = 1 / (1 - far.clamp_max(0))
            total = total + torch.where(inside & ~passed, near, 0.0)
            total = total + torch.where(passed, 1 + (far.clamp_max(slack) - slack), 0.0)
            inside = passed
        return total

    return loss


def delayed(policy: Policy) -> Judge:
    """The judge of a slowdown: (B,) bool, whether every side exit is silent.

    Raises:
        InputError: when called on logits of another number of exits.
    """

    def silent(logits: Logits, y: Tensor) -> Tensor:
        return policy.exit_of(logits) == policy.exits - 1

    return silent
