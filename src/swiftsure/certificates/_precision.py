"""The arithmetic that certificates are computed in: what the weights' type says, and nothing coarser."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from swiftsure.errors import InputError
from swiftsure.modes import evaluating


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
    device, _ = place(net)
    with evaluating(net), torch.no_grad(), torch.autocast(device.type, enabled=False), _full_precision():
        yield


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    backends: Any = torch.backends
    switches = (
        backends.cuda.matmul,
        backends.cudnn.conv,
        backends.cudnn.rnn,
        backends.mkldnn.matmul,
        backends.mkldnn.conv,
    )
    found = [switch.fp32_precision for switch in switches]
    # Torch has two sets of flags for the same thing, and refuses to read the older one while they contradict each
    # other. So both are set; where it refuses on entry, the caller has left the older one aside, and so do we.
    matmul = cudnn = None
    with contextlib.suppress(RuntimeError):
        matmul = torch.get_float32_matmul_precision()
    with contextlib.suppress(RuntimeError):
        cudnn = backends.cudnn.allow_tf32
    try:
        if matmul is not None:
            torch.set_float32_matmul_precision("highest")
        if cudnn is not None:
            backends.cudnn.allow_tf32 = False
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if cudnn is not None:
            backends.cudnn.allow_tf32 = cudnn
        for switch, precision in zip(switches, found, strict=True):
            switch.fp32_precision = precision
