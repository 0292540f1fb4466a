"""Affine operations: one small class each with its value, its interval rule and its transpose.

An affine operation f(z) = W z + b has three methods:

- ``value(*z)``: f itself, on points (batch, *shape);
- ``radius(*r)``: |W| r, the half-width of f over a box of half-widths r (batch, *shape);
- ``transpose(rows)``: for rows a on f's values, the rows a W on each input's values.

Parameters are read from the live module at each call, so one trace serves a whole training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from swiftsure.bounds.rows import Rows

Shape = tuple[int, ...]
Read = Callable[[], tuple[Tensor, Tensor | None]]
"""Weight and bias of a layer as they are now."""


@dataclass(frozen=True)
class Linear:
    """A linear layer on a flat input.

    Args:
        read: weight (out, in) and bias (out,).
    """

    read: Read

    @property
    def weight(self) -> Tensor:
        """W as it is now, (out, in)."""
        return self.read()[0]

    def value(self, z: Tensor) -> Tensor:
        """W z + b: (batch, in) to (batch, out)."""
        return F.linear(z, *self.read())

    def radius(self, r: Tensor) -> Tensor:
        """|W| r: (batch, in) to (batch, out)."""
        return F.linear(r, self.weight.abs())

    def transpose(self, rows: Rows) -> tuple[Rows, ...]:
        """a W."""
        weight = self.weight
        values = rows.values @ weight if rows.channel is None else weight.index_select(0, rows.channel)
        return (rows.onto(values, (weight.shape[1],)),)


@dataclass(frozen=True)
class Scale:
    """scale * z + shift, element by element: batch norm with fixed statistics, normalisation, constants.

    ``read`` returns (scale, shift), each broadcastable to one sample's values (channels first) or None.
    """

    read: Callable[[], tuple[Tensor | None, Tensor | None]]

    def value(self, z: Tensor) -> Tensor:
        """scale * z + shift."""
        scale, shift = self.read()
        z = z if scale is None else z * scale
        return z if shift is None else z + shift

    def radius(self, r: Tensor) -> Tensor:
        """|scale| * r."""
        scale, _ = self.read()
        return r if scale is None else r * scale.abs()

    def transpose(self, rows: Rows) -> tuple[Rows, ...]:
        """a * scale."""
        scale, _ = self.read()
        if scale is None:
            return (rows,)
        rows = rows.spread()
        if rows.window is None or scale.dim() == 0 or (scale.dim() == 3 and scale.shape[1:] == (1, 1)):
            return (rows.with_values(rows.values * scale),)
        alone = replace(rows, sample=None, each=0)
        return (rows.with_values(rows.values * alone.gather(scale.expand(1, *rows.shape))),)


@dataclass(frozen=True)
class Add:
    """z_1 + factor * z_2."""

    factor: float = 1.0

    def value(self, a: Tensor, b: Tensor) -> Tensor:
        """a + factor * b: equal shapes."""
        return torch.add(a, b, alpha=self.factor)

    def radius(self, a: Tensor, b: Tensor) -> Tensor:
        """a + |factor| * b."""
        return torch.add(a, b, alpha=abs(self.factor))

    def transpose(self, rows: Rows) -> tuple[Rows, ...]:
        """The same rows for both, times the factor for the second."""
        if abs(self.factor) == 1:
            return rows, rows if self.factor == 1 else rows.negative()
        spread = rows.spread()
        return rows, spread.with_values(spread.values * self.factor)


@dataclass(frozen=True)
class Reshape:
    """Flatten, view and reshape of each sample: the same values in the same order."""

    input_shape: Shape
    output_shape: Shape

    def value(self, z: Tensor) -> Tensor:
        """(batch, *input_shape) to (batch, *output_shape)."""
        return z.reshape(len(z), *self.output_shape)

    radius = value

    def transpose(self, rows: Rows) -> tuple[Rows, ...]:
        """The same coefficients in the input's shape."""
        return (rows if self.input_shape == self.output_shape else rows.reshape(self.input_shape),)


@dataclass(frozen=True)
class Cat:
    """Several values joined along an axis.

    Args:
        axis: of one sample's values.
        shapes: of the parts, for one sample.
    """

    axis: int
    shapes: tuple[Shape, ...]

    def value(self, *z: Tensor) -> Tensor:
        """The parts joined."""
        return torch.cat(z, self.axis + 1)

    radius = value

    def transpose(self, rows: Rows) -> tuple[Rows, ...]:
        """Each part's own coefficients; parts of channels keep their windows."""
        rows = rows.spread() if self.axis == 0 else rows.dense().spread()
        parts = rows.values.split([shape[self.axis] for shape in self.shapes], self.axis + 1)
        return tuple(
            rows.onto(part, shape, rows.window, rows.spills)
            for part, shape in zip(parts, self.shapes, strict=True)
        )


def batch_norm(
    read: Callable[[], tuple[Tensor, Tensor, Tensor | None, Tensor | None]], eps: float, dims: int
) -> Scale:
    """Batch norm with population statistics as a per-channel affine map.

    Args:
        read: (mean, variance, weight, bias), (channels,) each.
        eps: added to the variance.
        dims: number of axes of one sample's values, channels first.
    """
    shape = (-1,) + (1,) * (dims - 1)

    def scale_and_shift() -> tuple[Tensor, Tensor]:
        mean, variance, weight, bias = read()
        scale = torch.rsqrt(variance + eps)
        if weight is not None:
            scale = scale * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        return scale.view(shape), shift.view(shape)

    return Scale(scale_and_shift)
