"""The three figures of an epoch on the validation split, and which epoch they make the one to keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swiftsure.attacks import misclassified
from swiftsure.attacks.objectives import as_exits
from swiftsure.ball import Ball
from swiftsure.certificates import FLOOR, certify, within_certified_macs
from swiftsure.data import ImageSet
from swiftsure.exits import MultiExit, Policy, all_logits, equal_share, within_macs
from swiftsure.modes import evaluating
from swiftsure.recipe import Attack, Exits, Loss, Schedule
from swiftsure.training.adversary import adversary


@dataclass(frozen=True)
class Figures:
    """Shares in [0, 1]; None where it was not measured."""

    clean: float
    attacked: float | None
    verified: float | None


def check(
    net: nn.Module,
    images: ImageSet,
    ball: Ball,
    loss: Loss,
    schedule: Schedule,
    device: torch.device,
    choice: Exits | None = None,
) -> Figures:
    """Clean accuracy of all images; attacked and verified accuracy of the first ones, cheapest evidence first.

    With several exits clean and attacked are figures of the network as it would be deployed after this epoch: an image
    leaves by thresholds fitted, as the recipe says, on these same images; a forced budget as one of clean images.
    (Those that are deployed in the end come from the other half of the validation split. Two or six numbers fitted on
    thousands of images flatter little, and all epochs alike.) Robust is who withstands the average form over exits and
    the defence's own form. Verified is whose deployed answer is certified.

    A sample that is wrong, or that the attack breaks, costs no bound; with check_method auto, one that intervals prove
    costs no symbolic one.

    Args:
        net: in any mode, which is left as found.
        images: the checked half of the validation split.
        ball: the threat model.
        loss: says which figures there are, and the defence.
        schedule: check_images, check_steps and check_method.
        device: where the network is.
        choice: how inputs leave; None: by entropy, equally many at each exit.
    """
    with evaluating(net), torch.no_grad():
        logits = all_logits(net, images)
        exits = len(logits)
        judge, policy = misclassified, None
        if exits > 1:
            policy = _deployed(net, logits, images, choice or Exits(), ball)
            judge = policy.misclassified
        right = ~judge(tuple(logits), images.labels).to(device)
        count = min(schedule.check_images, len(images))
        survives = right[:count].clone()
        generator = torch.Generator(device).manual_seed(0)
        if loss.proven or loss.attacked > 0:
            forms = ["main"] if exits == 1 else ["average"]
            if exits > 1 and loss.attacked > 0 and loss.attack.form not in ("average", "mix"):
                forms.append(loss.attack.form)
            for form in forms:
                attack = adversary(Attack(form, schedule.check_steps), ball, exits, generator)
                for part in survives.nonzero()[:, 0].split(250):
                    x, y = images.batch(part, device)
                    survives[part] = ~judge(as_exits(net(attack(net, x, y, ball))), y)
        verified = None
        if loss.proven:
            proven = _proven(net, images, ball, survives, schedule.check_method, policy, device)
            verified = proven.float().mean().item()
        attacked = survives.float().mean().item() if loss.proven or loss.attacked > 0 else None
        return Figures(right.float().mean().item(), attacked, verified)


def _deployed(net: nn.Module, logits: list[Tensor], images: ImageSet, choice: Exits, ball: Ball) -> Policy:
    """The policy that a recipe asks for, fitted on images whose logits are known."""
    if choice.thresholds is not None:
        return Policy(choice.policy, choice.thresholds)
    if choice.certified_macs is not None and isinstance(net, MultiExit):
        return within_certified_macs(net, images, ball, choice.certified_macs, choice.policy).policy
    # A forced budget takes attacks on the cost: minutes, at the end alone. Clean images within it stand for that.
    budget = choice.macs if choice.macs is not None else choice.forced_macs
    if budget is not None and isinstance(net, MultiExit):
        return within_macs(logits, images.labels, net.macs(images.shape), budget, choice.policy)
    return equal_share(logits, choice.policy)


def _proven(
    net: nn.Module,
    images: ImageSet,
    ball: Ball,
    candidates: Tensor,
    method: str,
    policy: Policy | None,
    device: torch.device,
) -> Tensor:
    """Which of the candidates are proven right as they are deployed: (count,) bool."""
    proven = torch.zeros_like(candidates)
    for name in ("interval", "symbolic") if method == "auto" else (method,):
        for part in (candidates & ~proven).nonzero()[:, 0].split(500):
            x, y = images.batch(part, device)
            proven[part] = certify(net, x, y, ball, policy, name, delta=FLOOR).certified
    return proven


def chosen_epoch(records: list[dict[str, Any]], loss: Loss, schedule: Schedule) -> int:
    """Which epoch (index into records) to keep: the best figure at the full radius, above the floor if any is.

    Args:
        records: the log so far, not empty.
        loss: says which figure `auto` means.
        schedule: choose and clean_floor.
    """
    name = schedule.choose
    if name == "last":
        return len(records) - 1
    if name == "auto":
        name = "verified" if loss.proven else "attacked" if loss.attacked > 0 else "clean"
    key = {"clean": "clean_accuracy", "attacked": "robust_accuracy", "verified": "verified_accuracy"}[name]
    full = max(record["eps"] for record in records)

    def rank(index: int) -> tuple[bool, bool, float, float]:
        record = records[index]
        figure = record[key]
        return (
            record["eps"] == full,
            record["clean_accuracy"] >= schedule.clean_floor,
            -1.0 if figure is None else figure,
            record["clean_accuracy"],
        )

    return max(range(len(records)), key=rank)
