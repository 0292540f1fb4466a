"""Suites for networks with several exits: RDI-Nets' attack forms (Hu et al. 2020)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from swiftsure.attacks._apgd import apgd
from swiftsure.attacks._exits import at_exit, max_average
from swiftsure.attacks._fgsm import fgsm
from swiftsure.attacks._gradient import GradientReport
from swiftsure.attacks._pgd import pgd
from swiftsure.attacks._wrm import wrm
from swiftsure.attacks.objectives import Objective, average, random_mix
from swiftsure.attacks.suite import SUITES, Attack
from swiftsure.ball import Ball

SUITE_NAMES = (*SUITES, "rdi")
"""What an evaluation may ask for. rdi: fgsm, pgd and wrm in every form, with the paper's steps."""

_MIX_SEED = 0


def attacks_for(suite: str, exits: int, channels: int = 1) -> dict[str, Attack]:
    """The attacks of a suite on a network of K exits, by name.

    With several exits an attack on the last one says little of what leaves earlier. So "quick" has the average and the
    max-average form of PGD as well, "standard" and "full" all forms and an average by apgd.

    Args:
        suite: one of `SUITE_NAMES`.
        exits: K.
        channels: of the images. "rdi" takes the paper's settings: of MNIST (40 steps of eps / 30) for one channel, of
            CIFAR-10 (20 steps of eps / 4) for more.

    Returns:
        Entries for `run_suite`. Forms are named <method>_<form>: main (the last exit), exit1 to exit<K - 1>, average,
        max_average, and mix (a random mix of the exits' losses, drawn once).
    """
    if suite == "rdi":
        steps, share = (40, 1 / 30) if channels == 1 else (20, 1 / 4)
        paper = partial(_stepping, steps=steps, share=share)
        return {
            **_forms(f"pgd{steps}", paper, exits, every=True),
            **_forms("fgsm", _fgsm, exits),
            **_forms("wrm", wrm, exits),
        }
    attacks = dict(SUITES[suite])
    if exits > 1:
        # The suite has the last exit already.
        more = _forms("pgd40", partial(pgd, steps=40), exits, every=suite != "quick")
        attacks |= {name: attack for name, attack in more.items() if not name.endswith("_main")}
        if suite != "quick":
            attacks["apgd_average"] = partial(apgd, objective=average())
    return attacks


def _forms(name: str, method: Callable[..., Tensor], exits: int, every: bool = False) -> dict[str, Attack]:
    """main, average and max-average of an inner method; with `every` the other single exits and the mix too."""
    forms: dict[str, Attack] = {f"{name}_main": partial(_one_exit, method, -1)}
    if exits > 1 and every:
        forms |= {
            f"{name}_exit{number + 1}": partial(_one_exit, method, number) for number in range(exits - 1)
        }
        mix = random_mix(exits, torch.Generator().manual_seed(_MIX_SEED))
        forms[f"{name}_mix"] = partial(method, objective=mix)
    if exits > 1:
        forms[f"{name}_average"] = partial(method, objective=average())
        forms[f"{name}_max_average"] = partial(_as_in_the_paper, method)
    return forms


def _one_exit(
    method: Callable[..., Tensor],
    exit: int,
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    **options: object,
) -> Tensor:
    """An attack on one exit that knows of no other: nothing behind it runs."""
    options.pop("judge", None)
    return at_exit(net, x, y, ball, exit=exit, attack=method, **options)  # type: ignore[arg-type]


def _as_in_the_paper(
    method: Callable[..., Tensor], net: nn.Module, x: Tensor, y: Tensor, ball: Ball, **options: object
) -> Tensor:
    """max-average by the losses alone: no image is kept because it breaks the network."""
    options.pop("judge", None)
    return max_average(net, x, y, ball, attack=method, **options)  # type: ignore[arg-type]


def _stepping(
    net: nn.Module, x: Tensor, y: Tensor, ball: Ball, *, steps: int, share: float, **options: object
) -> Tensor:
    """PGD whose steps are a share of eps."""
    size = ball.radius * share or None
    return pgd(net, x, y, ball, steps=steps, step_size=size, **options)  # type: ignore[arg-type]


def _fgsm(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    objective: Objective,
    report: GradientReport | None = None,
    **_: object,
) -> Tensor:
    """One step knows neither restarts nor chance."""
    return fgsm(net, x, y, ball, objective=objective, report=report)
