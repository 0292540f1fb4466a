"""How much memory bounds may take at once, and what follows for the sizes of their chunks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor

from swiftsure.errors import InputError

_LIMIT: ContextVar[int | None] = ContextVar("memory limit of bounds", default=None)

DEFAULT = 1 << 30
"""Bytes for the coefficients of bounds where no limit was set: a modest share of any machine that trains."""

SHARE_OF_FREE = 0.5
COPIES = 8
"""Tensors of the widest layer's size that one step of a substitution holds for its rows: its input and output, the
field they are multiplied by, the workspace of a transposed convolution, and what the allocator keeps."""
FIELDS = 10
"""Tensors that bounds hold of each layer for each sample: centres and half-widths, lines, and what they come from."""


@contextlib.contextmanager
def limited(size: int | None) -> Iterator[None]:
    """Keep what bounds hold at once below about so many bytes; None: half of what is free, at most 1 GiB.

    Raises:
        InputError: a size that is not a positive number.
    """
    if size is not None and size <= 0:
        raise InputError(f"memory is {size} bytes; allowed: a positive number")
    token = _LIMIT.set(size)
    try:
        yield
    finally:
        _LIMIT.reset(token)


def budget(device: torch.device) -> int:
    """Bytes that bounds on a device may take at once."""
    limit = _LIMIT.get()
    return limit if limit is not None else min(DEFAULT, int(SHARE_OF_FREE * free(device)))


def free(device: torch.device) -> int:
    """Bytes that are free on a device, as far as it says; `DEFAULT` twice where it does not."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [_meminfo(), _cgroup()]
    known = [size for size in found if size is not None]
    return min(known) if known else 2 * DEFAULT


def rows_at_once(width: int, like: Tensor) -> int:
    """How many rows of so many coefficients fit into one half of the budget; the other half is for samples.

    Rows that gradients will flow through are kept whatever happens.
    """
    return max(1, budget(like.device) // (2 * COPIES * width * like.element_size()))


def samples_at_once(values: int, like: Tensor) -> int:
    """How many samples of a network that holds so many values in all its layers fit into the other half."""
    return max(1, budget(like.device) // (2 * FIELDS * values * like.element_size()))


def _meminfo() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _cgroup() -> int | None:
    """What a container's limit leaves."""
    try:
        root = Path("/sys/fs/cgroup")
        return int((root / "memory.max").read_text()) - int((root / "memory.current").read_text())
    except (OSError, ValueError):
        return None


def parse(text: str | int | float) -> int:
    """Bytes from a number or from text such as "4GB", "512 MiB" or "2e9".

    Raises:
        InputError: anything else.
    """
    units = {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}
    units |= {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "": 1}
    plain = str(text).strip().lower().removesuffix("b").strip()
    for unit in units:
        if plain.endswith(unit):
            try:
                size = float(plain.removesuffix(unit)) * units[unit]
            except ValueError:
                continue
            if 1 <= size < 1e18:
                return int(size)
    raise InputError(f'memory is {text!r}; allowed: bytes, or a size such as "4GB" or "512MiB"')
