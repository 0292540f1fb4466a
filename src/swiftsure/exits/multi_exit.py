"""A network with K >= 1 exits, and the adaptive pass in which each input leaves at the first exit that is sure."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from swiftsure.data.checks import check_batch
from swiftsure.errors import InputError
from swiftsure.exits.counting import Count, as_state, count_exits, cumulative
from swiftsure.exits.policies import Policy
from swiftsure.modes import evaluating

_CLOSED = Policy("entropy", ())
"""The policy of one exit: there is nothing to decide."""


@dataclass(frozen=True, eq=False)
class Answer:
    """What the deployed network says of B images; all tensors lie on their device.

    Attributes:
        label: (B,) int64, the class.
        exit: (B,) int64, the exit that gave it, from 0.
        macs: (B,) int64, multiply-adds: the trunk up to that exit, and every head that was asked.
        logits: (B, classes) of that exit.
    """

    label: Tensor
    exit: Tensor
    macs: Tensor
    logits: Tensor


class MultiExit(nn.Module):
    """Stages of one trunk, each with a head; ``net(x)`` runs all of them, ``net.adaptive(x)`` as few as it needs.

    Args:
        stages: K modules. Each takes what the one before it returned, the first the images; it returns a tensor, or a
            tuple of tensors of which its head reads the first. The batch is the first axis of every tensor.
        heads: K modules, tensor -> logits (B, classes).
        policy: when to leave; None until thresholds are known.
        copies: which heads get a copy of what they read, because they or a later stage change it in place; None: none.

    Raises:
        InputError: no stage, another number of heads, or a policy of another number of exits.

    Example:
        >>> net = MultiExit([nn.Flatten(), nn.Linear(4, 8)], [nn.Linear(4, 3), nn.Linear(8, 3)])
        >>> early, late = net(x)
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        heads: Sequence[nn.Module],
        policy: Policy | None = None,
        copies: Sequence[bool] | None = None,
    ) -> None:
        super().__init__()
        if not stages or len(stages) != len(heads):
            raise InputError(f"{len(stages)} stages and {len(heads)} heads; allowed: one head for each stage")
        self.stages, self.heads = nn.ModuleList(stages), nn.ModuleList(heads)
        self.copies = tuple(copies) if copies is not None else (False,) * len(heads)
        if len(self.copies) != len(heads):
            raise InputError(f"{len(self.copies)} copies for {len(heads)} heads; allowed: one for each head")
        self._macs: dict[tuple[tuple[int, ...], int], list[int]] = {}
        self._policy: Policy | None = None
        self.policy = policy

    @property
    def exits(self) -> int:
        """K, the last one included."""
        return len(self.heads)

    @property
    def policy(self) -> Policy | None:
        """When inputs leave; None where no thresholds were set."""
        return self._policy

    @policy.setter
    def policy(self, policy: Policy | None) -> None:
        if policy is not None:
            _require_policy(policy, self.exits)
        self._policy = policy

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Images (B, C, H, W) to the logits (B, classes) of every exit: a tuple of K, or the tensor where K is 1."""
        state: tuple[Tensor, ...] = (x,)
        logits = []
        for stage, head, copied in zip(self.stages, self.heads, self.copies, strict=True):
            state = as_state(stage(*state))
            logits.append(head(state[0].clone() if copied else state[0]))
        return logits[0] if len(logits) == 1 else tuple(logits)

    def adaptive(self, x: Tensor, policy: Policy | None = None) -> Answer:
        """Label, exit and cost of each image, in evaluation mode; later stages see only those that are still inside.

        Args:
            x: images (B, C, H, W) in [0, 1], on the network's device.
            policy: when to leave; None: ``net.policy``.

        Raises:
            InputError: images that do not fit, no policy for several exits, or one of another number of exits.
        """
        policy = policy if policy is not None else self.policy
        if policy is None:
            if self.exits > 1:
                raise InputError(
                    f"the network has {self.exits} exits and no thresholds; set net.policy, pass policy=, or use "
                    "swiftsure.exits.calibrate (`swiftsure calibrate RUN`)"
                )
            policy = _CLOSED
        _require_policy(policy, self.exits)
        config = getattr(self, "config", None)
        config = config if isinstance(config, dict) else {}
        check_batch(x, shape=config.get("input_shape"))
        trains, numbers, weights = _state_of(self)
        if weights is not None and (weights.device, weights.dtype) != (x.device, x.dtype):
            raise InputError(
                f"images are {x.dtype} on {x.device}, the network is {weights.dtype} on {weights.device}; "
                "they must be alike"
            )
        # To set the mode of hundreds of modules takes longer than to see that it is set.
        with torch.no_grad(), evaluating(self) if trains else nullcontext():
            if len(x) == 0:
                return _nobody(x, config.get("classes", 0))
            return self._leave(x, policy, self._known_macs(tuple(x.shape[1:]), numbers))

    def _leave(self, x: Tensor, policy: Policy, macs: list[int]) -> Answer:
        """Run the stages, the later ones for those who stay; `macs` is what leaving at each exit costs."""
        state: tuple[Tensor, ...] = (x,)
        inside: Tensor | None = None  # which images the state is of; None: all
        gone: list[tuple[Tensor, Tensor, int]] = []
        for number, (stage, head, copied) in enumerate(
            zip(self.stages, self.heads, self.copies, strict=True)
        ):
            state = as_state(stage(*state))
            z = head(state[0].clone() if copied else state[0])
            if number == self.exits - 1:
                break
            if len(z) == 1:
                if policy.fires_alone(number, z):
                    break
                continue
            leaves = policy.fires(number, z)
            count = int(leaves.sum())
            if count == len(leaves):
                break
            if count:
                leave, stay = leaves.nonzero()[:, 0], (~leaves).nonzero()[:, 0]
                gone.append((leave if inside is None else inside[leave], z[leave], number))
                inside = stay if inside is None else inside[stay]
                state = tuple(part.index_select(0, stay) for part in state)
        exit = torch.full((len(x),), number, device=x.device)
        if inside is None:
            return Answer(z.argmax(1), exit, torch.full((len(x),), macs[number], device=x.device), z)
        given = z.new_empty(len(x), z.shape[1])
        given[inside] = z
        for place, logits, at in gone:
            given[place] = logits
            exit[place] = at
        return Answer(given.argmax(1), exit, torch.tensor(macs, device=x.device)[exit], given)

    def macs(self, input_shape: Sequence[int]) -> list[int]:
        """What an image (C, H, W) costs that leaves at each exit: K multiply-adds, counted once and kept."""
        return list(self._known_macs(tuple(input_shape), _state_of(self)[1]))

    def _known_macs(self, input_shape: tuple[int, ...], numbers: int) -> list[int]:
        # The number of parameters is part of the key, for networks that are pruned when they are known already.
        key = input_shape, numbers
        if key not in self._macs:
            self._macs[key] = cumulative(self.counts(input_shape))
        return self._macs[key]

    def counts(self, input_shape: Sequence[int]) -> list[tuple[Count, Count]]:
        """Multiply-adds of each stage and of its head, for one image (C, H, W)."""
        like = next(iter(self.parameters()), torch.empty(0))
        image = torch.zeros(1, *input_shape, device=like.device, dtype=like.dtype)
        with evaluating(self):
            return count_exits(self.stages, self.heads, image)


def _require_policy(policy: Any, exits: int) -> None:
    """Refuse what is no policy for so many exits.

    Raises:
        InputError: as said.
    """
    if not isinstance(policy, Policy):
        raise InputError(f"policy is {policy!r}; allowed: a Policy such as Policy('entropy', [0.1])")
    policy.require(exits)


def one_exit(net: nn.Module) -> MultiExit:
    """A plain network as a MultiExit with one exit, number 0; nothing is copied.

    Raises:
        InputError: when it is run, if the network returns anything but logits.
    """
    whole = MultiExit([_Whole(net)], [nn.Identity()])
    whole.config = getattr(net, "config", None)  # type: ignore[assignment]
    return whole


def give_adaptive(net: nn.Module) -> nn.Module:
    """Give a plain network what a `MultiExit` has: ``policy``, which is None, and ``adaptive(x)``."""
    if not isinstance(net, MultiExit):
        net.policy = None  # type: ignore[assignment]
        # A partial, unlike a bound method, can be copied and stored along with the network.
        net.adaptive = partial(MultiExit.adaptive, one_exit(net))  # type: ignore[assignment]
    return net


class _Whole(nn.Module):
    """A network of one output as a stage."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Its logits."""
        logits: Any = self.net(x)
        if not isinstance(logits, Tensor):
            raise InputError(
                f"the network returns a {type(logits).__name__}; allowed: logits (batch, classes)"
            )
        return logits


def _state_of(net: nn.Module) -> tuple[bool, int, Tensor | None]:
    """Whether any module is in training mode, how many numbers the parameters hold, and one; in microseconds."""
    trains, numbers, one = False, 0, None
    left: list[nn.Module | None] = [net]
    while left:
        module = left.pop()
        if module is None:
            continue
        trains = trains or module.training
        if module._parameters:
            for parameter in module._parameters.values():
                if parameter is not None:
                    numbers += parameter.numel()
                    one = parameter
        if module._modules:
            left.extend(module._modules.values())
    return trains, numbers, one


def _nobody(x: Tensor, classes: int) -> Answer:
    none = torch.zeros(0, dtype=torch.int64, device=x.device)
    return Answer(none, none.clone(), none.clone(), x.new_zeros(0, classes))
