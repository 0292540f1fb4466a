"""What an attack ascends, and what counts as broken: small functions of the logits of all exits.

An `Objective` takes the tuple of logits (one (B, classes) tensor per exit; a tuple of one for a network with
a single exit) and the labels (B,), and returns the loss (B,) to ascend. A `Judge` takes the same and returns
(B,) bool: whether each sample counts as broken. Those below read the last exit ("main" in RDI-Nets); `single`
and `average` turn them to others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Logits = tuple[Tensor, ...]
Objective = Callable[[Logits, Tensor], Tensor]
Judge = Callable[[Logits, Tensor], Tensor]


def as_exits(output: Tensor | Logits) -> Logits:
    """What a network returned, as a tuple with one (B, classes) tensor per exit."""
    return (output,) if isinstance(output, Tensor) else tuple(output)


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


def misclassified(logits: Logits, y: Tensor) -> Tensor:
    """Whether the last exit answers anything but y: (B,) bool. An answer with a NaN is no answer."""
    z = logits[-1]
    return (z.argmax(1) != y) | z.isnan().any(1)


def single(exit: int, of: Callable[[Logits, Tensor], Tensor] = cross_entropy) -> Callable[..., Tensor]:
    """An objective or a judge applied to one exit alone, counted from 0: RDI-Nets' single attack.

    `single(0)` ascends the cross-entropy of the first exit; `single(0, misclassified)` judges by it.
    """

    def at_one_exit(logits: Logits, y: Tensor) -> Tensor:
        return of((logits[exit],), y)

    return at_one_exit


def average(of: Objective = cross_entropy) -> Objective:
    """The mean of an objective over all exits: RDI-Nets' average attack."""

    def over_exits(logits: Logits, y: Tensor) -> Tensor:
        return torch.stack([of((z,), y) for z in logits]).mean(0)

    return over_exits
