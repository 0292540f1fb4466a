"""The operations a traced network may hold.

Affine ones know their value, their interval rule and their transpose (`affine`, `convolution`, `maps`); activations
know how far they stray from a straight line (`activations`); max pooling rests on one input of each window
(`pooling`).
"""

from __future__ import annotations

from dataclasses import dataclass

from swiftsure.bounds.operations.activations import (
    Activation,
    PiecewiseLinear,
    Relu,
    Smooth,
    SShaped,
    clamp,
    gelu,
    hardsigmoid,
    hardswish,
    leaky_relu,
    sigmoid,
    silu,
    softplus,
    tanh,
)
from swiftsure.bounds.operations.affine import (
    Add,
    Cat,
    Linear,
    Read,
    Reshape,
    Scale,
    Shape,
    batch_norm,
)
from swiftsure.bounds.operations.convolution import AvgPool2d, Conv2d, avg_pool
from swiftsure.bounds.operations.maps import NonnegativeMap, WeightedMap
from swiftsure.bounds.operations.pooling import MaxPool2d, adaptive_max_pool, max_pool


@dataclass(frozen=True)
class Input:
    """The image."""


Affine = Add | Cat | Conv2d | Linear | NonnegativeMap | Reshape | Scale | WeightedMap
"""What has a value, a radius and a transpose."""

Bent = PiecewiseLinear | Smooth
"""Activations, as types that can be told apart."""

Operation = Affine | PiecewiseLinear | Smooth | MaxPool2d | Input

__all__ = [
    "Activation",
    "Add",
    "Affine",
    "AvgPool2d",
    "Bent",
    "Cat",
    "Conv2d",
    "Input",
    "Linear",
    "MaxPool2d",
    "NonnegativeMap",
    "Operation",
    "PiecewiseLinear",
    "Read",
    "Relu",
    "Reshape",
    "SShaped",
    "Scale",
    "Shape",
    "Smooth",
    "WeightedMap",
    "adaptive_max_pool",
    "avg_pool",
    "batch_norm",
    "clamp",
    "gelu",
    "hardsigmoid",
    "hardswish",
    "leaky_relu",
    "max_pool",
    "sigmoid",
    "silu",
    "softplus",
    "tanh",
]
