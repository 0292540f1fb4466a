"""The exits of a run: heads attached before training, thresholds fitted after it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from swiftsure.ball import Ball
from swiftsure.certificates import certifying, within_certified_macs
from swiftsure.data import ImageSet
from swiftsure.errors import InputError
from swiftsure.exits import MultiExit, Policy, attach, calibrate
from swiftsure.recipe import Exits


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
    for name in ("macs", "certified_macs"):
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
        ball: the threat model, for a certified budget.

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
    # In the arithmetic that evaluation and certificates use.
    with certifying(net):
        return calibrate(net, images, rule=choice.policy, macs=choice.macs)
