"""Where certificates are computed, and in which type."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from swiftsure.errors import InputError
from swiftsure.modes import evaluating
from swiftsure.precision import full_precision


def place(net: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a network computes, and in which type; a network without numbers of its own: the CPU, float32.

    Raises:
        InputError: its type is coarser than float32, so that the rounding of a bound could be as large as itself.
    """
    tensors = (tensor for tensor in [*net.parameters(), *net.buffers()] if tensor.is_floating_point())
    tensor = next(tensors, torch.empty(0))
    if tensor.dtype not in (torch.float32, torch.float64):
        name = str(tensor.dtype).removeprefix("torch.")
        raise InputError(f"the weights are {name}; allowed for certificates: float32 and float64")
    return tensor.device, tensor.dtype


@contextlib.contextmanager
def certifying(net: nn.Module) -> Iterator[None]:
    """Evaluation semantics, no gradients, no autocast, no TF32 or bfloat16 in place of float32; all restored."""
    place(net)
    with evaluating(net), torch.no_grad(), full_precision():
        yield
