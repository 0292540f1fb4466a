"""The mode of a network: evaluation for a while, and then exactly what it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Every module of net in evaluation mode (dropout off, batch norm in its stored statistics).

    On leaving, also by an exception, each module has the flag it came with: a trunk that was frozen in
    evaluation mode inside a training network stays so. Nothing but the flags is touched.
    """
    # The flags are set directly: a network's own train() may do more than that, and it could not be undone.
    found = [(module, module.training) for module in net.modules()]
    try:
        for module, _ in found:
            module.training = False
        yield
    finally:
        for module, training in found:
            module.training = training
