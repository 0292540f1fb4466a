"""How a test writes down one spelling of an operation: a body to build a small network around."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

CHANNELS, SIZE = 4, 6
Function = Callable[[Any, Tensor], Any]


class Body(nn.Module):
    """Any function of (module, x), with parts that become attributes, parameters or submodules."""

    def __init__(self, function: Function, **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


@dataclass
class Spelling:
    """How real code writes an operation; it takes maps (batch, CHANNELS, SIZE, SIZE) around zero."""

    name: str
    function: Function
    parts: dict[str, Any] = field(default_factory=dict)
    line: str = ""
    """Words that the refusal must hold."""

    def __str__(self) -> str:
        return self.name

    def body(self) -> nn.Module:
        torch.manual_seed(0)
        parts = {
            name: part() if callable(part) and not isinstance(part, nn.Module) else part
            for name, part in self.parts.items()
        }
        return Body(self.function, **parts)


def module(
    make: Callable[[], nn.Module], shape: Callable[[Tensor], Tensor] = lambda x: x, line: str = ""
) -> Spelling:
    """A module applied to maps, or to what ``shape`` makes of them."""
    name = " ".join(str(make()).split())
    return Spelling(name, lambda self, x: self.part(shape(x)), {"part": make}, line)


def call(name: str, function: Callable[[Tensor], Any], line: str = "") -> Spelling:
    """A function of maps."""
    return Spelling(name, lambda self, x: function(x), {}, line)


def weighed(name: str, function: Function, line: str = "", **parts: Callable[[], Tensor]) -> Spelling:
    """A function of (module, maps) that reads parameters or buffers."""
    return Spelling(name, function, dict(parts), line)


def lines(x: Tensor) -> Tensor:
    """(batch, CHANNELS, SIZE * SIZE)."""
    return x.flatten(2)


def solid(x: Tensor) -> Tensor:
    """(batch, 2, 2, SIZE, SIZE)."""
    return x.view(x.size(0), 2, 2, SIZE, SIZE)


def parameter(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(torch.randn(shape))


def buffer(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape)
