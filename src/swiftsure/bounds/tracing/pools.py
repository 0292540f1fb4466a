"""Rules for average and max pooling."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from swiftsure.bounds import operations as ops
from swiftsure.bounds.tracing.calls import Call, Rule, axes, pair


def average_pool(dims: int) -> Rule:
    """Of maps as a convolution where every window is divided by one number."""
    function: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[dims - 1]

    def rule(call: Call) -> int:
        kernel = axes(call.argument("kernel_size", 1), dims)
        stride = axes(call.argument("stride", 2) or kernel, dims)
        padding = axes(call.argument("padding", 3, 0), dims)
        ceil, counted = call.argument("ceil_mode", 4, False), call.argument("count_include_pad", 5, True)
        divisor = call.argument("divisor_override", 6) if dims > 1 else None
        if divisor is not None and divisor <= 0:
            raise call.refusal(f"divisor_override is {divisor}")
        if dims == 2 and len(call.shape()) == 3 and not ceil and (counted or divisor or not any(padding)):
            return call.append(
                ops.avg_pool(
                    pair(kernel), pair(stride), pair(padding), divisor, call.shape(), call.traced.probe
                )
            )
        last = (divisor,) if dims > 1 else ()
        return call.map(lambda z: function(z, kernel, stride, padding, ceil, counted, *last))

    return rule


def max_pool(dims: int) -> Rule:
    """Of one axis, as a map of one row, or two."""

    def rule(call: Call) -> int:
        kernel = axes(call.argument("kernel_size", 1), dims)
        stride = axes(call.argument("stride", 2) or kernel, dims)
        padding, dilation = (
            axes(call.argument("padding", 3, 0), dims),
            axes(call.argument("dilation", 4, 1), dims),
        )
        call.argument("ceil_mode", 5)
        if call.argument("return_indices", 6, False):
            raise call.refusal("it returns indices")
        before, after = _as_maps(call, dims)
        if dims == 1:
            kernel, stride, padding, dilation = (1, *kernel), (1, *stride), (0, *padding), (1, *dilation)
        pool = ops.max_pool(pair(kernel), pair(stride), pair(padding), pair(dilation), before, after)
        return _on_maps(call, pool, before, after)

    return rule


def adaptive_max_pool(dims: int) -> Rule:
    """Of one axis, as a map of one row, or two."""

    def rule(call: Call) -> int:
        call.argument("output_size", 1)
        if call.argument("return_indices", 2, False):
            raise call.refusal("it returns indices")
        before, after = _as_maps(call, dims)
        return _on_maps(call, ops.adaptive_max_pool(before, after), before, after)

    return rule


def largest(call: Call) -> int:
    """The largest value of each map."""
    dims, shape = call.argument("dim", 1, ()), call.shape()
    call.argument("keepdim", 2)
    if len(shape) != 3 or sorted(axis % 4 for axis in axes(dims, 1)) != [2, 3]:
        raise call.refusal("only over both axes of a map has one")
    size, after = (shape[1], shape[2]), (shape[0], 1, 1)
    pool = call.append(ops.max_pool(size, size, (0, 0), (1, 1), shape, after), after)
    return call.reshape(call.result, pool)


def _as_maps(call: Call, dims: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes (channels, height, width) of the source and the result; a line is a map of one row."""
    if len(call.shape()) != dims + 1:
        raise call.refusal(f"on values of shape {call.shape()}")
    rows = (1,) * (2 - dims)
    before, after = ((shape[0], *rows, *shape[1:]) for shape in (call.shape(), call.result))
    return before, after


def _on_maps(call: Call, pool: ops.MaxPool2d, before: tuple[int, ...], after: tuple[int, ...]) -> int:
    if pool.sees_padding_alone:
        raise call.refusal("a window lies on padding alone")
    source = call.reshape(before, call.source)
    return call.reshape(call.result, call.append(pool, after, source))
