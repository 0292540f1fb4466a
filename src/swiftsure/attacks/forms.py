"""Suites for networks with several exits: RDI-Nets' attack forms (Hu et al. 2020), and attacks on what is deployed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from swiftsure.attacks._apgd import apgd, apgd_targeted
from swiftsure.attacks._exits import at_exit, max_average
from swiftsure.attacks._fab import fab_targeted
from swiftsure.attacks._fgsm import fgsm
from swiftsure.attacks._gradient import GradientReport
from swiftsure.attacks._pgd import pgd
from swiftsure.attacks._square import square
from swiftsure.attacks._suites import SUITES, Attack
from swiftsure.attacks._wrm import wrm
from swiftsure.attacks.gates import deployed, force_gates
from swiftsure.attacks.objectives import (
    Objective,
    average,
    cross_entropy,
    margin,
    never,
    random_mix,
    targeted_dlr,
    targeted_margin,
)
from swiftsure.ball import Ball
from swiftsure.errors import InputError
from swiftsure.exits.policies import Policy

SUITE_NAMES = (*SUITES, "rdi")
"""What an evaluation may ask for. rdi: fgsm, pgd and wrm in every form, with the paper's steps."""

_MIX_SEED = 0


def attacks_for(
    suite: str,
    exits: int,
    channels: int = 1,
    policy: Policy | None = None,
    sources: Mapping[str, nn.Module] | None = None,
) -> dict[str, Attack]:
    """The attacks of a suite on a network of K exits, by name.

    With several exits an attack on the last one says little of what leaves earlier. So "quick" has the average and the
    max-average form of PGD as well, "standard" and "full" all forms and an average by apgd. With a policy those three
    attack what is deployed too: the exit that answers, and, in "standard" and "full", each gate in turn; apgd-t,
    fab-t and square, which would read the last exit, then read the exit that answers, and so do the restarts of "full".

    Args:
        suite: one of `SUITE_NAMES`.
        exits: K.
        channels: of the images. "rdi" takes the paper's settings: of MNIST (40 steps of eps / 30) for one channel, of
            CIFAR-10 (20 steps of eps / 4) for more.
        policy: by which inputs leave; None where that is not known.
        sources: other networks for the same images, such as the static twin, by name: what `transferred` finds on
            them is tried on this one.

    Returns:
        Entries for `run_suite`. Forms are named <method>_<form>: main (the last exit), exit1 to exit<K - 1>, average,
        max_average, mix (a random mix of the exits' losses, drawn once), deployed (the exit that answers), gates; and
        transfer_<source>.

    Raises:
        InputError: unknown suite.
    """
    if suite not in SUITE_NAMES:
        raise InputError(f"suite is {suite!r}; allowed: {', '.join(SUITE_NAMES)}")
    attacks = _of_the_suite(suite, exits, channels)
    if policy is not None and exits > 1 and suite != "rdi":
        attacks = _as_deployed(attacks, policy, gates=suite != "quick")
        if suite == "full":
            attacks = _with_restarts_as_deployed(attacks, policy)
    return attacks | {
        f"transfer_{name}": partial(transferred, source=source) for name, source in (sources or {}).items()
    }


def transferred(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    source: nn.Module,
    steps: int = 100,
    generator: torch.Generator | None = None,
    **_: object,
) -> Tensor:
    """What APGD finds on another network: nothing is asked of this one, so nothing of it can mislead.

    The mean loss of the source's exits is ascended to the end: an image that only just fools the source fools few
    others.

    Args:
        net: takes no part.
        x, y, ball, steps, generator: as of `apgd`.
        source: another network for the same images and classes.

    Returns, raises: as `apgd`.
    """
    x = x.to(next((parameter.device for parameter in source.parameters()), x.device))
    found = apgd(
        source, x, y.to(x.device), ball, objective=average(), judge=never, steps=steps, generator=generator
    )
    return found.to(y.device)


def _of_the_suite(suite: str, exits: int, channels: int) -> dict[str, Attack]:
    """Without a policy."""
    if suite == "rdi":
        steps, share = (40, 1 / 30) if channels == 1 else (20, 1 / 4)
        paper = partial(_stepping, steps=steps, share=share)
        return {
            **_forms(f"pgd{steps}", partial(_to_the_end, paper), exits, every=True),
            **_forms("fgsm", _fgsm, exits),
            **_forms("wrm", partial(_to_the_end, wrm), exits),
        }
    attacks = dict(SUITES[suite])
    if exits > 1:
        # The suite has the last exit already.
        more = _forms("pgd40", partial(pgd, steps=40), exits, every=suite != "quick")
        attacks |= {name: attack for name, attack in more.items() if not name.endswith("_main")}
        if suite != "quick":
            attacks["apgd_average"] = partial(apgd, objective=average())
    return attacks


def _as_deployed(attacks: Mapping[str, Attack], policy: Policy, gates: bool) -> dict[str, Attack]:
    """With the exit that answers where there was the last one alone, and with gates."""
    if not gates:
        return {**attacks, "pgd40_deployed": partial(pgd, steps=40, objective=deployed(policy))}
    kept = {name: attack for name, attack in attacks.items() if name not in ("apgd_t", "fab_t", "square5000")}
    return {
        **kept,
        "apgd_deployed": partial(apgd, objective=deployed(policy)),
        "apgd_t_deployed": partial(apgd_targeted, objective=deployed(policy, targeted_dlr)),
        "fab_t_deployed": partial(fab_targeted, objective=deployed(policy, targeted_margin)),
        "apgd_gates": partial(force_gates, policy=policy),
        "square5000_deployed": partial(square, steps=5000, objective=deployed(policy, margin)),
    }


def _with_restarts_as_deployed(attacks: Mapping[str, Attack], policy: Policy) -> dict[str, Attack]:
    """What "full" adds to "standard": its restarts against the exit that answers, and against each gate."""
    found: dict[str, Attack] = {}
    for name, attack in attacks.items():
        if (
            name in SUITES["standard"]
            or not isinstance(SUITES["full"].get(name), partial)
            or "interval" in name
        ):
            found[name] = attack
            continue
        usual = targeted_margin if name.startswith("fab") else cross_entropy
        objective = getattr(attack, "keywords", {}).get("objective", usual)
        found[f"{name}_deployed"] = partial(attack, objective=deployed(policy, objective))
    found["apgd_gatesx5"] = partial(force_gates, policy=policy, attack=partial(apgd, restarts=5))
    # apgd sees nothing of a gate whose gradients lie.
    found["square5000_gates"] = partial(force_gates, policy=policy, attack=partial(square, steps=5000))
    return found


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


def _to_the_end(method: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
    """RDI-Nets' attacks know no judge: each ends with its last iterate, broken or not."""
    return method(*args, **{**options, "judge": never})


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
