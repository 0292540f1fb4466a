"""What an attack ascends, and what counts as broken: small functions of the logits of all exits.

An `Objective` takes the tuple of logits (one (B, classes) tensor per exit; a tuple of one for a network with
a single exit) and the labels (B,), and returns the loss (B,) to ascend. A `Judge` takes the same and returns
(B,) bool: whether each sample counts as broken. Those below read the last exit ("main" in RDI-Nets); `single`,
`average`, `weighted` and `random_mix` turn them to others. A `TargetedObjective` takes the class aimed at as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from swiftsure.errors import InputError

Logits = tuple[Tensor, ...]
Objective = Callable[[Logits, Tensor], Tensor]
TargetedObjective = Callable[[Logits, Tensor, Tensor], Tensor]
Judge = Callable[[Logits, Tensor], Tensor]


def as_exits(output: Tensor | Logits) -> Logits:
    """What a network returned, as a tuple with one (B, classes) tensor per exit."""
    return (output,) if isinstance(output, Tensor) else tuple(output)


def check_exit(exit: int, exits: int) -> None:
    """Refuse what is no number of an exit, counted from 0 or, below 0, from the last.

    Raises:
        InputError: as said.
    """
    if isinstance(exit, bool) or not isinstance(exit, int) or not -exits <= exit < exits:
        raise InputError(f"exit is {exit!r}; allowed: 0 to {exits - 1}, or -1 for the last")


def cross_entropy(logits: Logits, y: Tensor) -> Tensor:
    """Cross-entropy of the last exit: (B,), nats."""
    return F.cross_entropy(logits[-1], y, reduction="none")


def margin(logits: Logits, y: Tensor) -> Tensor:
    """The largest wrong logit less the true one, of the last exit: (B,); positive where misclassified.

    The loss of Carlini and Wagner (2017), untargeted. Unlike cross-entropy it cannot saturate, and unlike the
    DLR loss it is defined for two classes.
    """
    z = logits[-1]
    wrong = z.scatter(1, y[:, None], -torch.inf).amax(1)
    return wrong - z.gather(1, y[:, None]).squeeze(1)


def dlr(logits: Logits, y: Tensor) -> Tensor:
    """The margin over the distance from the first to the third largest logit (Croce and Hein 2020): (B,).

    Neither a factor on the logits nor a constant added to them changes it. With two classes there is no third
    logit, and it is the plain margin; apgd's steps do not depend on the scale of a loss.
    """
    z = logits[-1]
    if z.shape[1] < 3:
        return margin(logits, y)
    top = z.topk(3, dim=1).values
    return margin(logits, y) / _spread(top[:, 0] - top[:, 2], top)


def targeted_margin(logits: Logits, y: Tensor, target: Tensor) -> Tensor:
    """The target's logit less the true one, of the last exit: (B,)."""
    pair = logits[-1].gather(1, torch.stack([target, y], 1))
    return pair[:, 0] - pair[:, 1]


def targeted_dlr(logits: Logits, y: Tensor, target: Tensor) -> Tensor:
    """The targeted margin over z_1 - (z_3 + z_4) / 2 of the sorted logits (Croce and Hein 2020): (B,).

    With fewer than four classes it is the plain targeted margin.
    """
    z = logits[-1]
    if z.shape[1] < 4:
        return targeted_margin(logits, y, target)
    top = z.topk(4, dim=1).values
    return targeted_margin(logits, y, target) / _spread(top[:, 0] - (top[:, 2] + top[:, 3]) / 2, top)


def _spread(gap: Tensor, top: Tensor) -> Tensor:
    """A distance of logits, kept off 0 where all of them tie."""
    return torch.maximum(gap, 1e-6 * top.detach().abs().amax(1) + 1e-30)


def misclassified(logits: Logits, y: Tensor) -> Tensor:
    """Whether the last exit answers anything but y: (B,) bool. An answer with a NaN is no answer."""
    z = logits[-1]
    return (z.argmax(1) != y) | z.isnan().any(1)


def never(logits: Logits, y: Tensor) -> Tensor:
    """Nothing counts as broken: (B,) bool. The objective of every sample is ascended to the end."""
    return torch.zeros(len(y), dtype=torch.bool, device=y.device)


def single(exit: int, of: Callable[..., Tensor] = cross_entropy) -> Callable[..., Tensor]:
    """An objective or a judge applied to one exit alone, counted from 0: RDI-Nets' single attack.

    `single(0)` ascends the cross-entropy of the first exit; `single(0, misclassified)` judges by it;
    `single(-1)` is RDI-Nets' main attack.

    Raises:
        InputError: when called on logits of too few exits.
    """

    def at_one_exit(logits: Logits, *labels: Tensor) -> Tensor:
        check_exit(exit, len(logits))
        return of((logits[exit],), *labels)

    return at_one_exit


def average(of: Callable[..., Tensor] = cross_entropy) -> Callable[..., Tensor]:
    """The mean of an objective over all exits: RDI-Nets' average attack."""

    def over_exits(logits: Logits, *labels: Tensor) -> Tensor:
        return torch.stack([of((z,), *labels) for z in logits]).mean(0)

    return over_exits


def weighted(weights: Sequence[float], of: Callable[..., Tensor] = cross_entropy) -> Callable[..., Tensor]:
    """The sum of an objective over all exits, each times its weight.

    Raises:
        InputError: when called on logits of another number of exits.
    """

    def over_exits(logits: Logits, *labels: Tensor) -> Tensor:
        if len(weights) != len(logits):
            raise InputError(
                f"{len(weights)} weights of exits for {len(logits)} exits; allowed: one for each exit"
            )
        parts = [weight * of((z,), *labels) for weight, z in zip(weights, logits, strict=True)]
        return torch.stack(parts).sum(0)

    return over_exits


def random_mix(
    exits: int, generator: torch.Generator | None = None, of: Callable[..., Tensor] = cross_entropy
) -> Callable[..., Tensor]:
    """`weighted` with weights drawn once, uniformly among those that are >= 0 and add up to 1.

    Raises:
        InputError: fewer than one exit.
    """
    if exits < 1:
        raise InputError(f"exits is {exits}; allowed: an integer >= 1")
    device = generator.device if generator else None
    # Normalised exponentials are uniform on the simplex.
    drawn = torch.empty(exits, device=device).exponential_(generator=generator)
    return weighted((drawn / drawn.sum()).tolist(), of)
