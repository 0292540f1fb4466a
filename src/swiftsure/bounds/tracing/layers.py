"""Rules for linear layers, convolutions and batch norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swiftsure.bounds import operations as ops
from swiftsure.bounds.tracing.calls import Call, Rule, axes, pair


def linear(call: Call) -> int:
    """On the last axis."""
    weight, bias = call.tensor("weight", 1), call.tensor("bias", 2)
    if len(call.shape()) == 1:
        return call.append(ops.Linear(_both(weight, bias)))
    return call.append(ops.WeightedMap(F.linear, _both(weight, bias), call.shape()))


def matmul(call: Call) -> int:
    """A product with a constant matrix on the right."""
    left, right = call.operand("input", 0), call.operand("other", 1)
    if isinstance(right, int) or not isinstance(left, int) or right().dim() != 2:
        raise call.refusal("only a constant matrix on the right has one")
    if len(call.shape(left)) == 1:
        return call.append(ops.Linear(lambda: (right().t(), None)), None, left)
    return call.append(ops.WeightedMap(torch.matmul, lambda: (right(), None), call.shape(left)), None, left)


def batch_norm(call: Call) -> int:
    """With population statistics."""
    names = ("running_mean", "running_var", "weight", "bias")
    reads: list[Any] = [call.tensor(name, 1 + i) for i, name in enumerate(names)]
    call.argument("momentum", 6)
    if reads[0]() is None or (call.module is None and call.argument("training", 5, False)):
        raise call.refusal("it takes its statistics from the batch; track_running_stats=True keeps them")
    eps = call.number("eps", 7, 1e-5)
    return call.append(ops.batch_norm(lambda: tuple(read() for read in reads), eps, len(call.shape())))


def _both(weight: Callable[[], Any], bias: Callable[[], Any], dims: int = 0) -> ops.Read:
    """Weight and bias, the latter with so many axes after its own."""
    if not dims:
        return lambda: (weight(), bias())
    after = (-1, *[1] * dims)

    def read() -> tuple[Tensor, Tensor | None]:
        b = bias()
        return weight(), None if b is None else b.view(after)

    return read


def convolution(dims: int) -> Rule:
    """Of one, two or three axes, with any padding that is linear in the values."""

    def rule(call: Call) -> int:
        weight, bias = call.tensor("weight", 1), call.tensor("bias", 2)
        stride, dilation = (
            axes(call.argument(name, i, 1), dims) for name, i in (("stride", 3), ("dilation", 5))
        )
        groups = int(call.number("groups", 6, 1))
        first: Any = weight()
        kernel = tuple(first.shape[2:])
        mode = "constant" if call.module is None else call.module.padding_mode.replace("zeros", "constant")
        # (before, after) for each axis.
        padding: Any = call.argument("padding", 4, 0)
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            sides = [(n // 2, n - n // 2) for n in total]
        else:
            sides = [(n, n) for n in axes(0 if padding == "valid" else padding, dims)]
        source, shape = call.source, call.shape()
        if len(shape) != dims + 1:
            raise call.refusal(f"on values of shape {shape}")
        if mode != "constant" or any(before != after for before, after in sides):
            widths = [n for side in reversed(sides) for n in side]
            shape = (shape[0], *(n + sum(side) for n, side in zip(shape[1:], sides, strict=True)))
            source = call.map(lambda z: F.pad(z, widths, mode), shape)
            sides = [(0, 0)] * dims
        edges = tuple(before for before, _ in sides)
        if dims == 2:
            conv: ops.Operation = ops.Conv2d(
                _both(weight, bias), pair(kernel), pair(stride), pair(edges), pair(dilation), groups, shape
            )
        else:
            function: Any = F.conv1d if dims == 1 else F.conv3d
            conv = ops.WeightedMap(
                lambda z, w: function(z, w, None, stride, edges, dilation, groups),
                _both(weight, bias, dims),
                shape,
            )
        return call.append(conv, None, source)

    return rule


def transposed_convolution(dims: int) -> Rule:
    """Of one, two or three axes."""
    function: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]

    def rule(call: Call) -> int:
        weight, bias = call.tensor("weight", 1), call.tensor("bias", 2)
        names = ("stride", "padding", "output_padding", "groups", "dilation")
        rest = [call.argument(name, 3 + i, int("padding" not in name)) for i, name in enumerate(names)]
        if len(call.shape()) != dims + 1:
            raise call.refusal(f"on values of shape {call.shape()}")
        return call.append(
            ops.WeightedMap(lambda z, w: function(z, w, None, *rest), _both(weight, bias, dims), call.shape())
        )

    return rule
