"""Side heads by name: small modules from what a cut yields to logits, described in plain JSON so that they load again.

What a cut yields: a map (batch, C, H, W), a map with its channels last (batch, H, W, C), as Swin has them, tokens
(batch, N, D), or features (batch, F).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from swiftsure.errors import InputError
from swiftsure.suggestion import unknown

Builder = Callable[..., nn.Module]
Description = dict[str, Any]
"""{"kind": a name, and options of its builder}."""

_BUILDERS: dict[str, Builder] = {}

_OWN = ("linear", "pooled", "conv")

CONV_GRID = 8
"""What a convolutional head pools larger maps to, in pixels a side."""


def register_head(name: str) -> Callable[[Builder], Builder]:
    """Give a builder of heads a name, for `attach`, recipes and `load`.

    The builder takes ``shape`` (of one sample, without the batch) and ``classes``, then options that are plain JSON
    values; it returns a module.

    Example:
        >>> @register_head("mine")
        ... def mine(shape: Sequence[int], classes: int, width: int = 8) -> nn.Module: ...

    Raises:
        InputError: the name is taken by another builder.
    """

    def add(builder: Builder) -> Builder:
        known = _BUILDERS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (
            builder.__module__,
            builder.__qualname__,
        ):
            raise InputError(f"a head named {name!r} is registered already; choose another name")
        _BUILDERS[name] = builder
        return builder

    return add


def head_names() -> list[str]:
    """All registered heads, sorted."""
    return sorted(_BUILDERS)


def described(head: Any, shape: Sequence[int]) -> Description:
    """A head as it is stored, from a name or from a table with kind and options.

    Args:
        head: what the user gave.
        shape: of one sample of what it reads; heads of this file are told where its channels are.

    Raises:
        InputError: it is neither.
    """
    if isinstance(head, str):
        head = {"kind": head}
    if not isinstance(head, Mapping) or not isinstance(head.get("kind"), str):
        raise InputError(
            f"a head is {head!r}; allowed: a torch.nn.Module, one of {', '.join(head_names())}, or a table with such a "
            "kind and its options"
        )
    return {**(_layout(shape) if head["kind"] in _OWN else {}), **head}


def _layout(shape: Sequence[int]) -> Description:
    """Images are square as a rule; then height and width of a map are the two that are equal."""
    return {"channels_last": True} if len(shape) == 3 and shape[0] == shape[1] != shape[2] else {}


def build_head(description: Mapping[str, Any], shape: Sequence[int], classes: int) -> nn.Module:
    """A fresh head.

    Args:
        description: kind and options.
        shape: of one sample of what the head reads.
        classes: of its logits.

    Raises:
        InputError: an unknown kind or option, or a value or shape that the builder refuses.
    """
    kind, options = (
        str(description["kind"]),
        {key: value for key, value in description.items() if key != "kind"},
    )
    if kind not in _BUILDERS:
        raise InputError(unknown("head", kind, head_names()))
    try:
        json.dumps(options)
        return _BUILDERS[kind](tuple(shape), classes, **options)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"head {kind!r} cannot be built with options {options}: {line}") from None


class _TokenMean(nn.Module):
    """The mean over tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, N, D) to (batch, D)."""
        return x.mean(1)


class _ChannelsFirst(nn.Module):
    """Channels from the end to the front."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, H, W, C) to (batch, C, H, W)."""
        return x.permute(0, 3, 1, 2)


@register_head("linear")
def linear(shape: Sequence[int], classes: int, channels_last: bool = False) -> nn.Module:
    """The mean over pixels or tokens, then a linear layer."""
    if len(shape) == 3:
        return nn.Sequential(*_pooled(*_map(shape, channels_last), classes, 1))
    if len(shape) == 2:
        return nn.Sequential(_TokenMean(), nn.Linear(shape[1], classes))
    if len(shape) == 1:
        return nn.Sequential(nn.Linear(shape[0], classes))
    raise ValueError(f"it reads {shape}; allowed: (C, H, W), (N, D) or (F)")


@register_head("pooled")
def pooled(shape: Sequence[int], classes: int, grid: int = 4, channels_last: bool = False) -> nn.Module:
    """Average pooling of a map to at most grid x grid, then a linear layer on all of it."""
    _require_sizes(grid=grid)
    return nn.Sequential(*_pooled(*_map(shape, channels_last), classes, grid))


@register_head("conv")
def conv(
    shape: Sequence[int],
    classes: int,
    width: int = 16,
    grid: int = 2,
    channels_last: bool = False,
    side: int = CONV_GRID,
) -> nn.Module:
    """Average pooling to at most side x side, a 3x3 convolution to `width` channels, ReLU, then as "pooled"."""
    _require_sizes(width=width, grid=grid, side=side)
    first, (channels, height, breadth) = _map(shape, channels_last)
    size = min(height, side), min(breadth, side)
    if size != (height, breadth):
        first = [*first, _averaged((height, breadth), size)]
    first = [*first, nn.Conv2d(channels, width, 3, 1, 1), nn.ReLU()]
    return nn.Sequential(*_pooled(first, (width, *size), classes, grid))


def _require_sizes(**sizes: Any) -> None:
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}; allowed: an integer >= 1")


def _pooled(first: list[nn.Module], shape: tuple[int, int, int], classes: int, grid: int) -> list[nn.Module]:
    channels, height, width = shape
    rows, columns = min(height, grid), min(width, grid)
    linear = nn.Linear(channels * rows * columns, classes)
    return [*first, _averaged((height, width), (rows, columns)), nn.Flatten(), linear]


def _averaged(size: tuple[int, int], wanted: tuple[int, int]) -> nn.Module:
    """Average pooling from one size to another; adaptive pooling is slow, so only where windows differ."""
    if size == wanted:
        return nn.Identity()
    (height, width), (rows, columns) = size, wanted
    if height % rows == 0 and width % columns == 0:
        return nn.AvgPool2d((height // rows, width // columns))
    return nn.AdaptiveAvgPool2d(wanted)


def sized(shape: Sequence[int], classes: int, macs: int) -> Description:
    """The largest head that costs at most so many multiply-adds.

    A "conv" head as wide as it may be, if that is at least 8 channels; else the finest "pooled" one; else "linear",
    which costs next to nothing.

    Args:
        shape: of one sample of what the head reads.
        classes: of its logits.
        macs: what it may cost.
    """
    if len(shape) != 3:
        return {"kind": "linear"}
    last = _layout(shape)
    _, (channels, height, breadth) = _map(shape, bool(last))
    rows, columns = min(height, CONV_GRID), min(breadth, CONV_GRID)
    one = rows * columns * channels * 9 + min(rows, 2) * min(columns, 2) * classes
    # Twice as wide as what it reads is wide enough: more would only be cost.
    width = min(macs // one, 2 * channels)
    if width >= min(8, 2 * channels):
        return {"kind": "conv", "width": int(width), **last}
    for grid in (4, 3, 2):
        if min(height, grid) * min(breadth, grid) * channels * classes <= macs:
            return {"kind": "pooled", "grid": grid, **last}
    return {"kind": "linear", **last}


def _map(shape: Sequence[int], channels_last: bool) -> tuple[list[nn.Module], tuple[int, int, int]]:
    """What brings the channels to the front, and (C, H, W)."""
    if len(shape) != 3:
        raise ValueError(f"it reads {tuple(shape)}; allowed: a map (C, H, W)")
    if not isinstance(channels_last, bool):
        raise ValueError(f"channels_last is {channels_last!r}; allowed: true or false")
    if channels_last:
        height, width, channels = shape
        return [_ChannelsFirst()], (channels, height, width)
    channels, height, width = shape
    return [], (channels, height, width)
