"""Networks cut short, for attacks on single exits: no stage behind the exit attacked has to run."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from swiftsure.errors import InputError
from swiftsure.exits import MultiExit
from swiftsure.exits.counting import as_state


class CutShort(nn.Module):
    """Shares the network's modules, and what is known of its images and classes."""

    def __init__(self, net: MultiExit) -> None:
        super().__init__()
        self.net = net
        self.config = getattr(net, "config", None)
        self.part: tuple[str, int] = ("all", 0)
        """What of the network runs: objects that are alike in it are the same function."""


class UpTo(CutShort):
    """One exit of a network: images (B, C, H, W) to its logits (B, classes).

    Args:
        net: shared, not copied.
        exit: its number, from 0; -1 for the last.
    """

    def __init__(self, net: MultiExit, exit: int) -> None:
        super().__init__(net)
        self.exit = range(net.exits)[exit]
        self.part = ("up to", self.exit)

    def forward(self, x: Tensor) -> Tensor:
        """Runs the stages up to the exit, and its head alone."""
        state: tuple[Tensor, ...] = (x,)
        for stage in list(self.net.stages)[: self.exit + 1]:
            state = as_state(stage(*state))
        # Nothing runs behind this head that could mind what it does to its input; autograd might.
        return self.net.heads[self.exit](state[0].clone() if self.net.copies[self.exit] else state[0])


class OwnExits(CutShort):
    """K copies of a batch in one, copy i of which leaves at exit i: a stage runs once, for all that go on.

    Args:
        net: shared, not copied.
        size: images of the batch, B.

    Example:
        >>> victim = OwnExits(net, len(x))
        >>> x_adv = pgd(victim, x.repeat(net.exits, 1, 1, 1), y.repeat(net.exits), ball)
        >>> of_exit_0 = x_adv[: len(x)]
    """

    def __init__(self, net: MultiExit, size: int) -> None:
        super().__init__(net)
        # Labels were checked against the whole network, and one image alone cannot be passed.
        self.config = {"classes": None, **(self.config or {})}
        self.size = size
        self.part = ("own exits of", size)

    def forward(self, x: Tensor) -> Tensor:
        """(K * B, C, H, W), copy after copy, to logits (K * B, classes).

        Raises:
            InputError: another number of rows: which exits those are for is not known.
        """
        if len(x) != self.net.exits * self.size:
            raise InputError(f"{len(x)} rows; allowed: {self.net.exits} copies of {self.size} images")
        state: tuple[Tensor, ...] = (x,)
        logits = []
        for stage, head, copied in zip(self.net.stages, self.net.heads, self.net.copies, strict=True):
            state = as_state(stage(*state))
            leaving = state[0][: self.size]
            logits.append(head(leaving.clone() if copied else leaving))
            state = tuple(part[self.size :] for part in state)
        return torch.cat(logits)
