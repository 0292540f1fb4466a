"""The exits of a run: heads attached before training, thresholds fitted after it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from swiftsure.attacks import SLOWDOWNS, Forced, Objective, average, never, pgd, single, within_forced_macs
from swiftsure.attacks.forced import ROUNDS
from swiftsure.attacks.objectives import as_exits
from swiftsure.ball import Ball
from swiftsure.certificates import certifying, within_certified_macs
from swiftsure.data import ImageSet
from swiftsure.data.progress import progress
from swiftsure.errors import InputError
from swiftsure.exits import MultiExit, Policy, attach, calibrate
from swiftsure.modes import channels_last
from swiftsure.recipe import BUDGETS, Exits

STEPS = 40
FORCED = 300
"""How many images a forced budget is fitted to: each round attacks them with the whole slowdown suite."""


def with_exits(net: nn.Module, choice: Exits, input_shape: Sequence[int]) -> nn.Module:
    """The network with the side exits that a recipe asks for; the network itself where it asks for none.

    Args:
        net: with fresh weights.
        choice: `exits` of the recipe.
        input_shape: (C, H, W) of the images.

    Raises:
        InputError: exits that cannot be attached, or thresholds or a budget that can never fit the network: better
            said before training than after it.
    """
    if choice.at or choice.count is not None:
        weights = next(iter(net.parameters()), torch.empty(0))
        example = torch.zeros(1, *input_shape, dtype=weights.dtype, device=weights.device)
        try:
            net = attach(net, choice.at or choice.count or 1, example)
        except InputError as error:
            raise InputError(f"exits: {error}") from None
    exits = net.exits if isinstance(net, MultiExit) else 1
    if choice.thresholds is not None:
        try:
            Policy(choice.policy, choice.thresholds).require(exits)
        except InputError as error:
            raise InputError(f"exits: {error}") from None
    for name in BUDGETS:
        budget = getattr(choice, name)
        if budget is not None:
            if not isinstance(net, MultiExit) or exits == 1:
                raise InputError(
                    f"exits.{name} is a budget for several exits, and the network has one; allowed: null"
                )
            least = net.macs(input_shape)[0]
            if budget < least:
                raise InputError(f"exits.{name} is {budget:,.0f}; the first exit alone costs {least:,}")
    return net


def fit_policy(net: nn.Module, choice: Exits, images: ImageSet, ball: Ball) -> Policy | None:
    """The policy that a recipe asks for; None for one exit.

    Args:
        net: trained.
        choice: `exits` of the recipe.
        images: held out from training and from the choice of the epoch.
        ball: the threat model, for a certified or a forced budget, and for attacked images.

    Raises:
        InputError: thresholds of another number, or a budget below the first exit's cost.
    """
    if not isinstance(net, MultiExit) or net.exits == 1:
        return None
    if choice.certified_macs is not None:
        return within_certified_macs(net, images, ball, choice.certified_macs, choice.policy).policy
    if choice.thresholds is not None:
        policy = Policy(choice.policy, choice.thresholds)
        policy.require(net.exits)
        return policy
    if choice.forced_macs is not None:
        return fit_forced(net, choice, images, ball).policy
    # In the arithmetic that evaluation and certificates use.
    with certifying(net):
        attacked = list(attacked_logits(net, images, ball).values()) if choice.attacked else []
        return calibrate(net, images, rule=choice.policy, macs=choice.macs, attacked=attacked)


def fit_forced(net: MultiExit, choice: Exits, images: ImageSet, ball: Ball) -> Forced:
    """The thresholds within `choice.forced_macs`, fitted to `FORCED` of the images, evenly spread over them.

    Args and errors as of `fit_policy`; several exits.
    """
    assert choice.forced_macs is not None
    # Spread, because sets made of folders come class by class.
    images = images.select(torch.linspace(0, len(images) - 1, min(FORCED, len(images))).long())
    with certifying(net), channels_last(net, images.batch(slice(0, 2))[0]):
        attacked = list(attacked_logits(net, images, ball).values()) if choice.attacked else []
        with progress("attacking the cost", ROUNDS * len(SLOWDOWNS)) as step:
            return within_forced_macs(
                net, images, ball, choice.forced_macs, rule=choice.policy, attacked=attacked, progress=step
            )  # fmt: skip


def attacked_logits(net: nn.Module, images: ImageSet, ball: Ball, seed: int = 0) -> dict[str, list[Tensor]]:
    """The logits of all exits, K of (n, classes) on the CPU, on the images of each attack, by the attack's name.

    PGD on the loss of each exit and on the average over exits, made once for any thresholds: whatever they are, the
    exit by which a sample leaves was attacked. An attack that knows the thresholds may break more.

    Args:
        net: in evaluation mode.
        images: n of them.
        ball: the threat model.
        seed: of random starts.
    """
    exits = net.exits if isinstance(net, MultiExit) else 1
    objectives: dict[str, Objective] = {f"pgd{STEPS}": single(-1)}
    if exits > 1:
        sides = {f"pgd{STEPS}_exit{number + 1}": single(number) for number in range(exits - 1)}
        objectives = {**sides, f"pgd{STEPS}_main": single(-1), f"pgd{STEPS}_average": average()}
    device = next(iter(net.parameters()), torch.empty(0)).device
    found: dict[str, list[Tensor]] = {}
    with progress("attacking every exit", len(images) * len(objectives)) as advance:
        for number, (name, objective) in enumerate(objectives.items()):
            generator = torch.Generator().manual_seed(seed * 1_000 + number)
            parts = []
            for start in range(0, len(images), 250):
                x, y = images.batch(slice(start, start + 250), device)
                x_adv = pgd(
                    net, x, y, ball, objective=objective, judge=never, steps=STEPS, generator=generator
                )
                with torch.no_grad():
                    parts.append([z.cpu() for z in as_exits(net(x_adv))])
                advance(len(x))
            found[name] = [torch.cat(exit) for exit in zip(*parts, strict=True)]
    return found
