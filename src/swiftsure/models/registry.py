"""Networks by name: a name and its options rebuild a network from a config file."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from typing import Any

from torch import nn

from swiftsure.errors import InputError
from swiftsure.exits.multi_exit import give_adaptive

Builder = Callable[..., nn.Module]

_BUILDERS: dict[str, Builder] = {}


def register(name: str) -> Callable[[Builder], Builder]:
    """Give a builder a name, so that `build` and `load` can call it.

    The builder returns an nn.Module and sets its attributes ``input_shape`` (channels, height, width) and
    ``classes``. Its keyword arguments must be plain JSON values: they are stored in config.json.

    Example:
        >>> @register("mine")
        ... def mine(width: int = 8) -> nn.Module: ...

    Raises:
        InputError: the name is taken by another builder.
    """

    def add(builder: Builder) -> Builder:
        known = _BUILDERS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (
            builder.__module__,
            builder.__qualname__,
        ):
            raise InputError(f"a model named {name!r} is registered already; choose another name")
        _BUILDERS[name] = builder
        return builder

    return add


def names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_BUILDERS)


def build(name: str, **options: Any) -> nn.Module:
    """A fresh network with random weights, in training mode as torch makes it.

    Returns:
        The network; ``net.config`` holds name, options, input_shape [C, H, W] and classes, all that is needed
        to build it again. ``net.adaptive(x)`` and ``net.policy`` are there whatever its number of exits.

    Raises:
        InputError: unknown name or option, or a value that the builder refuses.
    """
    if name not in _BUILDERS:
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"unknown model {name!r}; {hint}known: {', '.join(names())}")
    try:
        json.dumps(options)
        net = _BUILDERS[name](**options)
    except (RuntimeError, TypeError, ValueError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"model {name!r} cannot be built with options {options}: {line}") from None
    net.config = {  # type: ignore[assignment]
        "name": name,
        "options": options,
        "input_shape": list(net.input_shape),  # type: ignore[arg-type]
        "classes": net.classes,
    }
    return give_adaptive(net)
