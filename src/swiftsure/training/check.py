"""The three figures of an epoch on the validation split, and which epoch they make the one to keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swiftsure.attacks import pgd
from swiftsure.ball import Ball
from swiftsure.bounds import margins
from swiftsure.data import ImageSet
from swiftsure.modes import evaluating
from swiftsure.recipe import Loss, Schedule


@dataclass(frozen=True)
class Figures:
    """Shares in [0, 1]; None where it was not measured."""

    clean: float
    attacked: float | None
    verified: float | None


def correct(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Whether the last exit's label is y: (batch,) bool."""
    logits = net(x)
    return (logits if isinstance(logits, Tensor) else logits[-1]).argmax(1) == y


def check(
    net: nn.Module, images: ImageSet, ball: Ball, loss: Loss, schedule: Schedule, device: torch.device
) -> Figures:
    """Clean accuracy of all images; attacked and verified accuracy of the first ones, cheapest evidence first.

    A sample that is wrong, or that the attack breaks, costs no bound; with check_method auto, one that intervals prove
    costs no symbolic one.
    """
    with evaluating(net), torch.no_grad():
        batches = torch.arange(len(images)).split(500)
        right = torch.cat([correct(net, *images.batch(part, device)) for part in batches])
        count = min(schedule.check_images, len(images))
        survives = right[:count].clone()
        generator = torch.Generator(device).manual_seed(0)
        if loss.proven or loss.attacked > 0:
            for part in survives.nonzero()[:, 0].split(250):
                x, y = images.batch(part, device)
                x_adv = pgd(net, x, y, ball, steps=schedule.check_steps, generator=generator)
                survives[part] = correct(net, x_adv, y)
        verified = None
        if loss.proven:
            proven = _proven(net, images, ball, survives, schedule.check_method, device)
            verified = proven.float().mean().item()
        attacked = survives.float().mean().item() if loss.proven or loss.attacked > 0 else None
        return Figures(right.float().mean().item(), attacked, verified)


def _proven(
    net: nn.Module, images: ImageSet, ball: Ball, candidates: Tensor, method: str, device: torch.device
) -> Tensor:
    """Which of the candidates every exit is proven right on: (count,) bool."""
    proven = torch.zeros_like(candidates)
    for name in ("interval", "symbolic") if method == "auto" else (method,):
        for part in (candidates & ~proven).nonzero()[:, 0].split(250 if name == "interval" else 25):
            x, y = images.batch(part, device)
            lower = margins(net, x, y, ball, name)
            exits = (lower,) if isinstance(lower, Tensor) else lower
            wrong = torch.ones_like(exits[0], dtype=torch.bool).scatter(1, y[:, None], False)
            proven[part] = torch.stack([((low > 0) | ~wrong).all(1) for low in exits]).all(0)
    return proven


def chosen_epoch(records: list[dict[str, Any]], loss: Loss, schedule: Schedule) -> int:
    """Which epoch (index into records) to keep: the best figure at the full radius, above the floor if any is.

    Args:
        records: the log so far, not empty.
        loss: says which figure `auto` means.
        schedule: choose and clean_floor.
    """
    name = schedule.choose
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
