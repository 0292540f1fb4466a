"""The images of the attacked term: RDI-Nets' forms of an attack over exits as defences (Hu et al. 2020)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from swiftsure.attacks import (
    Gradient,
    at_exit,
    average,
    cross_entropy,
    input_gradient,
    max_average,
    never,
    pgd,
    random_mix,
)
from swiftsure.attacks.objectives import Logits
from swiftsure.ball import Ball
from swiftsure.errors import InputError
from swiftsure.recipe import FORMS, Attack
from swiftsure.training.terms import AttackOnBatch


def adversary(
    attack: Attack,
    ball: Ball,
    exits: int,
    draws: torch.Generator | None = None,
    gradient: Gradient = input_gradient,
) -> AttackOnBatch:
    """The attack that a recipe names, on the batches of a network of K exits: (net, x, y, ball) -> x_adv.

    The ball of a call may be smaller than the full one, as while the radius grows; a stated step shrinks with it.

    Args:
        attack: form, steps and the rest.
        ball: the full threat model, to which a stated step size belongs.
        exits: K.
        draws: makes starts and mixes reproducible.
        gradient: how gradients are taken. A mix is another objective for each batch, which is not worth a record.

    Raises:
        InputError: the form names an exit that the network has not.
    """
    check_form(attack, exits)
    half = attack.precision == "bfloat16"
    loss = _of_float32 if half else cross_entropy
    over_all = average(loss)

    def run(net: nn.Module, x: Tensor, y: Tensor, here: Ball) -> Tensor:
        wider = here.with_eps(here.radius * attack.eps_factor)
        options: dict[str, Any] = {
            "steps": attack.steps,
            "step_size": None,
            "random_start": attack.random_start,
            "generator": draws,
            # Images that only just fool the network teach it little, and no step waits for a number.
            "judge": never,
            "gradient": gradient if attack.form != "mix" or exits == 1 else input_gradient,
        }
        if attack.step_size is not None and ball.radius > 0:
            options["step_size"] = float(attack.step_size) * min(1.0, here.radius / ball.radius)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            if exits == 1 or attack.form == "main":
                return at_exit(net, x, y, wider, exit=-1, objective=loss, **options)
            if attack.side_exit is not None:
                return at_exit(net, x, y, wider, exit=attack.side_exit, objective=loss, **options)
            if attack.form == "max_average":
                return max_average(net, x, y, wider, objective=loss, **options)
            over_exits = over_all if attack.form == "average" else random_mix(exits, draws, loss)
            return pgd(net, x, y, wider, objective=over_exits, **options)

    return run


def check_form(attack: Attack, exits: int) -> None:
    """Refuse a form that names an exit which a network of K exits has not.

    Raises:
        InputError: as said.
    """
    side = attack.side_exit
    if side is not None and side >= exits - 1:
        sides = [f"exit{number}" for number in range(1, exits)]
        raise InputError(
            f"attack.form is {attack.form!r}, and the network has {exits} "
            f"{'exit' if exits == 1 else 'exits'}; allowed: {', '.join([*FORMS, *sides])} (main is the last)"
        )


def _of_float32(logits: Logits, y: Tensor) -> Tensor:
    """Cross-entropy in float32 of logits that may have 8 bits: the share of a sure class must not round to 1."""
    return cross_entropy((logits[-1].float(),), y)
