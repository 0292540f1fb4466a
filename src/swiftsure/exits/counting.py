"""Multiply-adds of each stage and each head, by torch's own counter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

Step = Callable[..., Any]
"""A stage (state -> state) or a head (tensor -> logits)."""


@dataclass(frozen=True)
class Count:
    """Multiply-adds of one image: of convolutions, and of linear layers and other matrix products."""

    convolution: int
    linear: int

    @property
    def total(self) -> int:
        """Both."""
        return self.convolution + self.linear


def as_state(value: Any) -> tuple[Tensor, ...]:
    """What a stage returned, as the tuple that the next one takes; its first tensor is what the head reads."""
    return value if isinstance(value, tuple) else (value,)


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Torch's counter around what runs inside the block; it counts two operations for each multiply-add.

    Attention and recurrent layers run in their plain forms there: of fused ones the counter sees nothing.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    # Not by their `flags`, which set the precision of matrix products as well.
    backends: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
    enabled = [backend.enabled for backend in backends]
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for backend in backends:
            backend.enabled = False
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for backend, before in zip(backends, enabled, strict=True):
            backend.enabled = before


def counted(step: Step, *inputs: Tensor) -> tuple[Any, Count]:
    """What a step returns for one image, and what that took."""
    with counting() as counter:
        value = step(*inputs)
    found = {"convolution": 0, "linear": 0}
    for operation, flops in counter.get_flop_counts().get("Global", {}).items():
        found["convolution" if "conv" in str(operation) else "linear"] += flops // 2
    return value, Count(**found)


def count_exits(stages: Iterable[Step], heads: Iterable[Step], image: Tensor) -> list[tuple[Count, Count]]:
    """(stage, head) for each exit, for one image (1, C, H, W); in evaluation mode, as the caller sees to."""
    counts = []
    state: tuple[Tensor, ...] = (image,)
    with torch.no_grad():
        for stage, head in zip(stages, heads, strict=True):
            value, trunk = counted(stage, *state)
            state = as_state(value)
            _, branch = counted(head, state[0])
            counts.append((trunk, branch))
    return counts


def cumulative(counts: Sequence[tuple[Count, Count]]) -> list[int]:
    """What an input has cost when it leaves at each exit: the trunk so far and every head so far."""
    return list(accumulate(trunk.total + branch.total for trunk, branch in counts))


def paper(counts: Sequence[tuple[Count, Count]]) -> list[float]:
    """RDI-Nets' own accounting: convolutions only, earlier heads free, in units of 2**20."""
    trunk = accumulate(stage.convolution for stage, _ in counts)
    return [(so_far + head.convolution) / 2**20 for so_far, (_, head) in zip(trunk, counts, strict=True)]
