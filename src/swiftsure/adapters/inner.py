"""Attacks of other libraries as inner methods: called like ours, checked like ours. No library is needed until then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from swiftsure.attacks._gradient import assert_inside, attacking, checked_inputs
from swiftsure.attacks._suites import Attack
from swiftsure.attacks.objectives import Logits, as_exits
from swiftsure.ball import Ball

# From the logits of all exits to those that the foreign attack is to see.
Read = Callable[[Logits], Tensor]


def last_exit(logits: Logits) -> Tensor:
    """The logits (B, classes) of the last exit; of one exit, its own."""
    return logits[-1]


def from_torchattacks(build: Callable[[nn.Module, Ball], Any], read: Read = last_exit) -> Attack:
    """An attack of torchattacks (Kim 2020), for `run_suite` and wherever an inner method goes.

    Its loss is its own: it takes no objective. What it returns is brought back into the ball, which costs nothing but a
    rounding error where it was built for the same one.

    Args:
        build: makes the attack of a module that returns logits (B, classes), for a ball.
        read: which logits it is to see of a network with several exits, such as ``net.policy.logits_of``.

    Returns:
        attack(net, x, y, ball, *, generator=None, ...) -> x_adv, as `pgd`; other options are ignored. The generator
        seeds torch's global one while the attack runs.

    Example:
        >>> import torchattacks
        >>> vmi = from_torchattacks(lambda model, ball: torchattacks.VMIFGSM(model, eps=ball.radius))
        >>> run_suite(net, x, y, ball, attacks={**SUITES["standard"], "vmi": vmi})
    """
    return _inner(lambda model, x, y, ball: build(model, ball)(x, y), read)


def from_foolbox(build: Callable[[Ball], Any], read: Read = last_exit) -> Attack:
    """An attack of foolbox (Rauber et al. 2020), as `from_torchattacks`.

    Args:
        build: makes the attack for a ball; it is run with the ball's radius as epsilon, on foolbox's own view of the
            network with the ball's pixel range as bounds.
        read: as for `from_torchattacks`.

    Example:
        >>> import foolbox
        >>> newton = from_foolbox(lambda ball: foolbox.attacks.NewtonFoolAttack())
    """

    def call(model: nn.Module, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
        from foolbox import PyTorchModel

        view = PyTorchModel(model, bounds=(ball.low, ball.high), device=x.device)
        _, clipped, _ = build(ball)(view, x, y, epsilons=ball.radius)
        found: Tensor = clipped
        return found

    return _inner(call, read)


def _inner(call: Callable[[nn.Module, Tensor, Tensor, Ball], Tensor], read: Read) -> Attack:
    def attack(
        net: nn.Module,
        x: Tensor,
        y: Tensor,
        ball: Ball,
        *,
        generator: torch.Generator | None = None,
        **_: object,
    ) -> Tensor:
        x, y = checked_inputs(net, x, y, ball)
        if len(x) == 0:
            return x.clone()
        devices = [x.device.index or 0] if x.device.type == "cuda" else []
        # Foreign attacks switch modes and draw from the global generator: both are put back.
        with attacking(net), torch.random.fork_rng(devices):
            if generator is not None:
                torch.manual_seed(int(torch.randint(2**31, (), generator=generator, device=generator.device)))
            found = call(_Seen(net, read).eval(), x, y, ball).detach().to(x)
        return assert_inside(ball.project(torch.where(found.isfinite(), found, x), x), x, ball)

    return attack


class _Seen(nn.Module):
    """A network as foreign attacks see it: one tensor of logits."""

    def __init__(self, net: nn.Module, read: Read) -> None:
        super().__init__()
        self.net = net
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(as_exits(self.net(x)))
