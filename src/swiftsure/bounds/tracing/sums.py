"""Rules for sums and differences, and for products and quotients with constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from swiftsure.bounds import operations as ops
from swiftsure.bounds.tracing.calls import Call
from swiftsure.bounds.tracing.order import expanded


def add(call: Call) -> int:
    """a + alpha * b."""
    return _sum(call, call.operand("input", 0), call.operand("other", 1), call.number("alpha", None, 1))


def subtract(call: Call) -> int:
    """a - alpha * b."""
    return _sum(call, call.operand("input", 0), call.operand("other", 1), -call.number("alpha", None, 1))


def subtract_from(call: Call) -> int:
    """b - alpha * a."""
    return _sum(call, call.operand("other", 1), call.operand("input", 0), -call.number("alpha", 2, 1))


def _sum(call: Call, a: int | Callable[[], Any], b: int | Callable[[], Any], factor: float) -> int:
    """a + factor * b."""
    if isinstance(a, int) and isinstance(b, int):
        return call.append(ops.Add(factor), None, _broadcast(call, a), _broadcast(call, b))
    if isinstance(a, int):
        assert not isinstance(b, int)
        b = _constant(call, b)
        return call.append(ops.Scale(lambda: (None, factor * b())), None, _broadcast(call, a))
    assert isinstance(b, int)
    a, scale = _constant(call, a), torch.tensor(factor, dtype=torch.float64)
    return call.append(ops.Scale(lambda: (scale, a())), None, _broadcast(call, b))


def multiply(call: Call) -> int:
    """A product with a constant."""
    a, b = call.operand("input", 0), call.operand("other", 1)
    if isinstance(a, int) and isinstance(b, int):
        raise call.refusal("both factors depend on the image")
    live, other = (a, b) if isinstance(a, int) else (b, a)
    assert isinstance(live, int) and not isinstance(other, int)
    factor = _constant(call, other)
    return call.append(ops.Scale(lambda: (factor(), None)), None, _broadcast(call, live))


def divide(call: Call) -> int:
    """A quotient with a constant below."""
    a, b = call.operand("input", 0), call.operand("other", 1)
    if not isinstance(a, int) or isinstance(b, int):
        raise call.refusal("its divisor depends on the image")
    divisor = _constant(call, b)
    return call.append(ops.Scale(lambda: (1 / divisor(), None)), None, _broadcast(call, a))


def negative(call: Call) -> int:
    """-z."""
    minus = torch.tensor(-1.0, dtype=torch.float64)
    return call.append(ops.Scale(lambda: (minus, None)))


def _constant(call: Call, read: Callable[[], Any]) -> Callable[[], Tensor]:
    """A constant that can be broadcast to one sample's values."""
    dims, now = len(call.result), read()
    if not isinstance(now, Tensor):
        # In double precision; as a scalar it takes on the type of what it meets.
        number = torch.tensor(now, dtype=torch.float64)
        return lambda: number
    if now.dtype == torch.bool:
        # A mask; as numbers it has a magnitude and a negative.
        mask, dtype = read, call.traced.probe.dtype
        return _constant(call, lambda: mask().to(dtype))
    if now.dim() <= dims:
        return read
    # Written for batches, such as (1, C, 1, 1).
    if now.dim() > dims + 1 or len(now) > 1:
        raise call.refusal(f"with a constant of shape {tuple(now.shape)}, which is not one for all samples")
    return lambda: read()[0]


def _broadcast(call: Call, source: int) -> int:
    """A value repeated to the shape of the result."""
    before, shape = call.shape(source), call.result
    if before == shape:
        return source
    if len(before) != len(shape):
        raise call.refusal("its values have different numbers of axes")
    return call.map(expanded(shape), shape, source)
