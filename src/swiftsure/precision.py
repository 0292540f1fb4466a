"""The arithmetic in which verdicts are given: what the weights' type says, and nothing coarser."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """No autocast, no TF32 or bfloat16 in place of float32; all restored."""
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
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
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


def in_full_precision(function: Callable[P, T]) -> Callable[P, T]:
    """The function, run in `full_precision`."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with full_precision():
            return function(*args, **kwargs)

    return run
