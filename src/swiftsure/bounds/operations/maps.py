"""Linear maps given as functions of points: whatever torch can compute and differentiate needs no rule of its own.

A linear function's vector-Jacobian product is its transpose, wherever it is taken; so torch's own backward passes take
rows through poolings, paddings, slices and transposed convolutions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from swiftsure.bounds.operations.affine import Read, Shape
from swiftsure.bounds.rows import Rows

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class NonnegativeMap:
    """A linear map whose coefficients are all >= 0, plus a constant: its own interval rule.

    Poolings by averages, sums and means over axes, slices, permutations, paddings and upsamplings are of this kind.

    Args:
        function: the map without its constant, (batch, *input_shape) to (batch, *output shape).
        input_shape: of one sample.
        shifted: the map with its constant, where it has one.
    """

    function: Function
    input_shape: Shape
    shifted: Function | None = None

    def value(self, z: Tensor) -> Tensor:
        """The map with its constant."""
        return (self.shifted or self.function)(z)

    def radius(self, r: Tensor) -> Tensor:
        """The map without its constant."""
        return self.function(r)

    def transpose(self, rows: Rows) -> tuple[Rows, ...]:
        """By a vector-Jacobian product."""
        rows = rows.dense().spread()
        return (rows.onto(_pulled_back(self.function, self.input_shape, rows.values), self.input_shape),)


@dataclass(frozen=True)
class WeightedMap:
    """A function linear in the values and linear in a weight: transposed convolutions, layers on several axes.

    Args:
        function: of (values, weight), (batch, *input_shape) to (batch, *output shape). Each output is a sum of products
            of one value and one entry of the weight, so that |W| gives its interval rule.
        read: the weight, and a bias that can be broadcast to one sample's output.
        input_shape: of one sample.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    read: Read
    input_shape: Shape

    def value(self, z: Tensor) -> Tensor:
        """f(z, W) + b."""
        weight, bias = self.read()
        result = self.function(z, weight)
        return result if bias is None else result + bias

    def radius(self, r: Tensor) -> Tensor:
        """f(r, |W|)."""
        return self.function(r, self.read()[0].abs())

    def transpose(self, rows: Rows) -> tuple[Rows, ...]:
        """By a vector-Jacobian product; differentiable in the weight."""
        rows, weight = rows.dense().spread(), self.read()[0]
        values = _pulled_back(lambda z: self.function(z, weight), self.input_shape, rows.values)
        return (rows.onto(values, self.input_shape),)


def _pulled_back(function: Function, shape: Shape, rows: Tensor) -> Tensor:
    """Rows on the values of a linear function as rows on its input: (rows, *output shape) to (rows, *shape)."""
    differentiable = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        origin = torch.zeros(len(rows), *shape, dtype=rows.dtype, device=rows.device, requires_grad=True)
        values = function(origin)
        (result,) = torch.autograd.grad(values, origin, rows, create_graph=differentiable)
    return result
