"""How accuracy, cost and the use of exits change with the thresholds: sweep.json of a run, drawn by its page.

The attacked images are made once, and know no thresholds: PGD on the loss of each exit and on the average over exits,
so that whatever the thresholds, the exit by which a sample leaves was attacked. A sample counts as right at a point of
the curve where it is right on all these images. An attack that knows the thresholds may break more: the suites of
`swiftsure attack` judge by those that are deployed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import swiftsure.files as files
from swiftsure.certificates import certifying
from swiftsure.exits import MultiExit, Policy, all_logits, exit_macs, in_shares
from swiftsure.models.storage import WEIGHTS
from swiftsure.run import SWEEP as NAME
from swiftsure.run_exits import attacked_logits
from swiftsure.subject import Subject

ATTACKED = 500
"""Samples that are attacked, the first ones: K + 1 attacks on each."""
RATIOS = tuple(2.0**power for power in (-5, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 5))
"""Of the shares of samples at one exit and at the one before it; 1 is RDI-Nets' equal share."""


def sweep(subject: Subject) -> dict[str, Any]:
    """The curve of a network, and what its deployed thresholds do; a network of one exit is a single point.

    Args:
        subject: what is measured.

    Returns:
        Plain values for `sweep.json`: n, attacked_n, ball, attacks, weights_sha256, rule, deployed, points. A point has
        thresholds, macs and accuracy on the n clean images, attacked_macs (a mean over all attacks) and
        attacked_accuracy (their union) on attacked_n; the deployed one has "exits" as well, the shares for "clean" and
        for each attack.
    """
    net, shape = subject.net, subject.images.shape
    policy = net.policy if isinstance(net, MultiExit) else None
    rule = policy.rule if policy is not None else "entropy"
    with certifying(net):
        clean = all_logits(net, subject.images)
        attacked = attacked_logits(
            net, subject.images.select(slice(0, ATTACKED)), subject.ball, subject.recipe.seed
        )
        policies = [Policy(rule, ())]
        if len(clean) > 1:
            policies = policies_of(all_logits(net, subject.held_out), rule)
    y, costs = subject.images.labels.cpu(), exit_macs(net, shape)
    points = [point(policy, clean, attacked, y, costs) for policy in policies]
    deployed = policy or policies[0]
    return {
        "n": subject.n,
        "attacked_n": min(subject.n, ATTACKED),
        "ball": subject.ball.as_dict(),
        "attacks": list(attacked),
        "weights_sha256": files.sha256(subject.folder / WEIGHTS),
        "rule": rule,
        "deployed": {
            **point(deployed, clean, attacked, y, costs),
            "exits": {
                name: shares(deployed, logits) for name, logits in {"clean": clean, **attacked}.items()
            },
        },
        "points": points,
    }


def policies_of(logits: Sequence[Tensor], rule: str = "entropy") -> list[Policy]:
    """From all samples at the first exit to all at the last: shares whose ratio from exit to exit is constant.

    The family is that of MSDNet's budgeted batches (Huang et al. 2018); RDI-Nets' equal shares belong to it.

    Args:
        logits: of each of K exits, (N, classes), on held-out samples.
        rule: a name of `swiftsure.exits.RULES`.
    """
    exits = len(logits)
    proportions = [[float(exit == 0) for exit in range(exits)]]
    proportions += [[ratio**exit for exit in range(exits)] for ratio in RATIOS]
    proportions += [[float(exit == exits - 1) for exit in range(exits)]]
    return [in_shares(logits, one, rule) for one in proportions]


def point(
    policy: Policy,
    clean: Sequence[Tensor],
    attacked: Mapping[str, Sequence[Tensor]],
    y: Tensor,
    costs: Sequence[float],
) -> dict[str, Any]:
    """Cost and accuracy under one policy, on clean images and on attacked images of the first m of them.

    Args:
        policy: for K exits.
        clean: K logits, (n, classes).
        attacked: by attack, K logits, (m, classes).
        y: labels (n,).
        costs: multiply-adds of each exit, K.
    """
    price = torch.tensor(costs, dtype=torch.float64)
    broken = torch.stack([policy.misclassified(logits, y[: len(logits[0])]) for logits in attacked.values()])
    spent = torch.cat([price[policy.exit_of(logits)] for logits in attacked.values()])
    return {
        "thresholds": list(policy.thresholds),
        "macs": price[policy.exit_of(clean)].mean().item(),
        "accuracy": 1 - policy.misclassified(clean, y).double().mean().item(),
        "attacked_macs": spent.mean().item(),
        "attacked_accuracy": 1 - broken.any(0).double().mean().item(),
    }


def shares(policy: Policy, logits: Sequence[Tensor]) -> list[float]:
    """The share of samples that leaves at each exit, given K logits (N, classes)."""
    exit = policy.exit_of(logits)
    return (exit.bincount(minlength=len(logits)).double() / len(exit)).tolist()


def write(folder: Path, found: Mapping[str, Any]) -> None:
    """Write sweep.json, atomically.

    Raises:
        InputError: the folder cannot be written.
    """
    files.write_json(folder / NAME, found)
