"""Rules for activations."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, fx

from swiftsure.bounds import operations as ops
from swiftsure.bounds.tracing.calls import Call, Rule


def activation(make: Callable[[], ops.Operation]) -> Rule:
    """One without arguments."""
    return lambda call: call.append(make())


def leaky_relu(call: Call) -> int:
    """Of a slope that does not fall."""
    slope = call.number("negative_slope", 1, 0.01)
    if not 0 <= slope < math.inf:
        raise call.refusal("a slope below 0 makes it fall and rise")
    return call.append(ops.leaky_relu(slope))


def clamp(low_name: str, high_name: str, low_default: float | None, high_default: float | None) -> Rule:
    """Between two numbers, each of which may be None."""

    def rule(call: Call) -> int:
        low, high = call.argument(low_name, 1, low_default), call.argument(high_name, 2, high_default)
        return _clamp(call, -math.inf if low is None else low, math.inf if high is None else high)

    return rule


def clamp_one_side(name: str) -> Rule:
    """Below or above a number, given as such or as a tensor written in the forward pass."""

    def rule(call: Call) -> int:
        limit = call.operand("other" if name in ("maximum", "minimum") else name, 1)
        value = None if isinstance(limit, int) else limit()
        if isinstance(value, Tensor):
            node = call.node.args[1] if len(call.node.args) > 1 else None
            fixed = (
                isinstance(node, fx.Node) and node.op == "get_attr" and node.target in call.traced.constants
            )
            value = float(value) if fixed and value.numel() == 1 else None
        if not isinstance(value, int | float):
            raise call.refusal("only a number as the other one has one")
        return _clamp(call, *((value, math.inf) if name in ("min", "maximum") else (-math.inf, value)))

    return rule


def _clamp(call: Call, low: float, high: float) -> int:
    if not low <= high:
        raise call.refusal(f"{low} is more than {high}")
    return call.append(ops.clamp(low, high))


def gelu(call: Call) -> int:
    """The exact one."""
    if call.argument("approximate", 1, "none") != "none":
        raise call.refusal("the tanh form is another function; approximate='none' has a rule")
    return call.append(ops.gelu())


def softplus(call: Call) -> int:
    """With torch's own beta and threshold."""
    if (call.number("beta", 1, 1), call.number("threshold", 2, 20)) != (1, 20):
        raise call.refusal("only beta=1 and threshold=20 have one")
    return call.append(ops.softplus())


def refused(reason: str) -> Rule:
    """An operation whose lack of a rule has a reason worth telling."""

    def rule(call: Call) -> int:
        raise call.refusal(reason)

    return rule
