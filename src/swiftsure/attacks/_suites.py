"""The attacks of each suite on a network with one exit, by the names that results.json has for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from swiftsure.attacks._apgd import apgd, apgd_targeted
from swiftsure.attacks._fab import fab_targeted
from swiftsure.attacks._fgsm import fgsm
from swiftsure.attacks._interval import interval_attack
from swiftsure.attacks._pgd import pgd
from swiftsure.attacks._square import square
from swiftsure.attacks.objectives import dlr, margin
from swiftsure.ball import Ball

# An entry of a suite: (net, x, y, ball, *, judge, generator, report) -> adversarial images shaped like x.
Attack = Callable[..., Tensor]


def _apgd_ce(net: nn.Module, x: Tensor, y: Tensor, ball: Ball, **options: Any) -> Tensor:
    """In L1 with five restarts, as in AutoAttack: there much hangs on the start."""
    return apgd(net, x, y, ball, restarts=5 if ball.norm == "1" else 1, **options)


_QUICK: dict[str, Attack] = {"fgsm": fgsm, "pgd40": partial(pgd, steps=40)}
_STANDARD: dict[str, Attack] = {
    **_QUICK,
    "apgd_ce": _apgd_ce,
    "apgd_t": apgd_targeted,
    "fab_t": fab_targeted,
    "square5000": partial(square, steps=5000),
}
# Names are part of results.json and samples.csv: the method, its steps where they are not AutoAttack's, x<restarts>,
# and the objective where there is a choice.
SUITES: dict[str, dict[str, Attack]] = {
    "quick": _QUICK,
    "standard": _STANDARD,
    "full": {
        **_STANDARD,
        "pgd200x10": partial(pgd, steps=200, restarts=10),
        "pgd200x10_margin": partial(pgd, steps=200, restarts=10, objective=margin),
        "apgd_cex5": partial(apgd, restarts=5),
        "fab_tx3": partial(fab_targeted, restarts=3),
        "apgd_dlrx5": partial(apgd, restarts=5, objective=dlr),
        "apgd_marginx5": partial(apgd, restarts=5, objective=margin),
        "interval40x5": partial(interval_attack, steps=40, restarts=5),
    },
}
"""The attacks of each suite, all on all samples that are right without attack: the figure of each is its own.

standard: AutoAttack's four, apgd-ce (100 steps; in L1 five restarts), apgd-t and fab-t (100 steps towards each of nine
classes) and square (5,000 queries), and two plain gradient attacks. full: many restarts and other losses, and the
interval attack where bounds can read the network.
"""
