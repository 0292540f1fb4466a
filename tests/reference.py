"""A slow and plain float64 reference of the bounds: the values that `swiftsure.bounds` must equal.

The network itself is run on abstract values, one image at a time: `net(zonotope)` works because the value answers
`__torch_function__`. So nothing here traces a graph, folds a layer, goes backwards, works in chunks or leaves a unit
out; every coefficient of every symbol is a dense float64 number.

`Interval` carries centre and radius. `Zonotope` carries an affine form of the input symbols and of one error symbol
per unstable unit, with the relaxation of MixTrain (Wang et al. 2018; the slopes of DeepZ, Fast-Lin, Wong-Kolter).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftsure.ball import Ball

Map = Callable[[Tensor], Tensor]


@dataclass
class Units:
    """What one ReLU met, for one image."""

    count: int
    unstable: int
    """Neither intervals nor the symbolic bounds prove them stable: each has an error symbol."""
    settled_by_interval: int
    """Stable by intervals while their symbolic bounds cross zero."""
    tightened_by_interval: int
    """Their symbolic bounds cross zero, and intervals are tighter on one side: only here does `pure` differ."""


class Region:
    """The ball round one image (C, H, W), and the symbols that all values of one walk share.

    Args:
        image: the centre of the ball.
        ball: the threat model.
        pure: take the symbolic bounds alone, not the tighter of them and of plain intervals on each side.
    """

    def __init__(self, image: Tensor, ball: Ball, pure: bool = False) -> None:
        image = image.double()
        lower = (image - ball.radius).clamp(ball.low, ball.high)
        upper = (image + ball.radius).clamp(ball.low, ball.high)
        self.ball, self.pure = ball, pure
        self.middle, self.radius = (lower + upper) / 2, (upper - lower) / 2
        self.start = self.middle if ball.norm == "inf" else image
        self.inputs = image.numel()
        self.symbols = self.inputs
        self.hidden: list[Units] = []

    def interval(self) -> Interval:
        """The clipped box."""
        return Interval(self.middle[None], self.radius[None])

    def zonotope(self) -> Zonotope:
        """x' = start + sum_i symbol_i, symbol i being how far pixel i is from its start."""
        identity = torch.eye(self.inputs, dtype=torch.float64).view(self.inputs, *self.start.shape)
        return Zonotope(self, torch.cat([self.start[None], identity]), self.interval())

    def span(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper bound of an affine form given as rows (1 + symbols, units): (units,) each."""
        centre, coefficient, errors = rows[0], rows[1 : 1 + self.inputs], rows[1 + self.inputs :]
        drift = (self.middle - self.start).flatten() @ coefficient
        width = self.radius.flatten() @ coefficient.abs()
        lower, upper = drift - width, drift + width
        if self.ball.norm != "inf":
            order = 2 if self.ball.norm == "2" else torch.inf
            reach = self.ball.radius * torch.linalg.vector_norm(coefficient, ord=order, dim=0)
            lower, upper = torch.maximum(lower, -reach), torch.minimum(upper, reach)
        slack = errors.abs().sum(0)
        return centre + lower - slack, centre + upper + slack


class Abstract:
    """A set of tensors (1, ...) on which a network can be run as if it were one tensor."""

    @property
    def shape(self) -> torch.Size:
        raise TypeError("an abstract value has a shape only in its two kinds")

    def affine(self, linear: Map, absolute: Map, shift: Tensor | None) -> Abstract:
        """Image under t -> linear(t) + shift; `absolute` is the linear map with |weights|."""
        raise TypeError("an abstract value maps only in its two kinds")

    def plus(self, other: Any) -> Abstract:
        raise TypeError("an abstract value adds only in its two kinds")

    def relu(self) -> Abstract:
        raise TypeError("an abstract value rectifies only in its two kinds")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func not in RULES:
            raise TypeError(f"the reference has no rule for {func}")
        return RULES[func](*args, **(kwargs or {}))

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return len(self.shape)

    def times(self, factor: Any) -> Abstract:
        factor = torch.as_tensor(factor, dtype=torch.float64)
        return self.affine(lambda t: t * factor, lambda t: t * factor.abs(), None)

    def reshape(self, *shape: Any) -> Abstract:
        return self._like(torch.empty(self.shape, device="meta").reshape(*shape).shape)

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Abstract:
        return self._like(torch.empty(self.shape, device="meta").flatten(start_dim, end_dim).shape)

    def _like(self, shape: torch.Size) -> Abstract:
        if shape[0] != 1:
            raise TypeError(f"reshaping to {tuple(shape)} mixes the images of a batch")
        return self.affine(*[lambda t: t.reshape(len(t), *shape[1:])] * 2, None)

    view = reshape

    def clamp(self, low: float, high: float) -> Any:
        return torch.clamp(self, low, high)

    def tanh(self) -> Any:
        return torch.tanh(self)

    def __add__(self, other: Any) -> Abstract:
        return self.plus(other)

    def __sub__(self, other: Any) -> Abstract:
        return self.plus(-other)

    def __neg__(self) -> Abstract:
        return self.times(-1.0)

    def __mul__(self, factor: Any) -> Abstract:
        return self.times(factor)

    def __truediv__(self, divisor: Any) -> Abstract:
        return self.times(1.0 / torch.as_tensor(divisor, dtype=torch.float64))

    __radd__ = __add__
    __rmul__ = __mul__


@dataclass
class Interval(Abstract):
    """All tensors within radius of centre, both (1, ...), entry by entry."""

    centre: Tensor
    radius: Tensor
    before: tuple[Interval, Tensor, Tensor | None] | None = field(default=None, repr=False)
    """If a linear layer made it: that layer's input, weight and bias, for margins merged into the layer."""

    @property
    def shape(self) -> torch.Size:
        return self.centre.shape

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        return self.centre - self.radius, self.centre + self.radius

    def affine(self, linear: Map, absolute: Map, shift: Tensor | None) -> Interval:
        centre = linear(self.centre)
        return Interval(centre if shift is None else centre + shift, absolute(self.radius))

    def plus(self, other: Any) -> Interval:
        if isinstance(other, Interval):
            return Interval(self.centre + other.centre, self.radius + other.radius)
        return Interval(self.centre + other, self.radius)

    def relu(self) -> Interval:
        lower, upper = (end.clamp_min(0) for end in self.bounds)
        return Interval((lower + upper) / 2, (upper - lower) / 2)

    def margins(self, label: int) -> Tensor:
        """Lower bounds of z_label - z_j, merged into the linear layer that made the logits: (classes,)."""
        if self.before is None:
            raise TypeError("the logits do not come straight from a linear layer")
        value, weight, bias = self.before
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        merged = _linear(value, weight[label] - weight, bias[label] - bias)
        return merged.bounds[0][0]


@dataclass
class Zonotope(Abstract):
    """Row 0 is the centre, the next rows the coefficients of the input symbols, the rest of the error symbols.

    rows: (1 + symbols so far, ...); box: what plain intervals know of the same value.
    """

    region: Region
    rows: Tensor
    box: Interval

    @property
    def shape(self) -> torch.Size:
        return self.rows[:1].shape

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        lower, upper = self.region.span(self.rows.flatten(1))
        return lower.view(self.shape), upper.view(self.shape)

    def affine(self, linear: Map, absolute: Map, shift: Tensor | None) -> Zonotope:
        rows = linear(self.rows)
        if shift is not None:
            rows = torch.cat([rows[:1] + shift, rows[1:]])
        return Zonotope(self.region, rows, self.box.affine(linear, absolute, shift))

    def plus(self, other: Any) -> Zonotope:
        if isinstance(other, Zonotope):
            rows = _with_symbols(self.rows, self.region.symbols) + _with_symbols(
                other.rows, self.region.symbols
            )
            return Zonotope(self.region, rows, self.box.plus(other.box))
        return Zonotope(self.region, torch.cat([self.rows[:1] + other, self.rows[1:]]), self.box.plus(other))

    def relu(self) -> Zonotope:
        lower, upper = self.bounds
        low, high = self.box.bounds
        crossing = (lower < 0) & (upper > 0)
        by_interval = ((low >= 0) | (high <= 0)) & crossing
        tightened = ((low > lower) | (high < upper)) & crossing
        if not self.region.pure:
            lower, upper = torch.maximum(lower, low), torch.minimum(upper, high)
        passes, vanishes = lower >= 0, upper <= 0
        unstable = ~passes & ~vanishes
        self.region.hidden.append(
            Units(
                count=unstable.numel(),
                unstable=int(unstable.sum()),
                settled_by_interval=int(by_interval.sum()),
                tightened_by_interval=int(tightened.sum()),
            )
        )
        slope = torch.where(unstable, upper / torch.where(unstable, upper - lower, 1.0), passes.double())
        half = torch.where(unstable, -slope * lower / 2, 0.0)
        where = unstable.flatten().nonzero().flatten()
        fresh = torch.zeros(len(where), unstable.numel(), dtype=torch.float64)
        fresh = fresh.index_put((torch.arange(len(where)), where), half.flatten()[where])
        old = _with_symbols(self.rows, self.region.symbols)
        rows = torch.cat([old[:1] * slope + half, old[1:] * slope, fresh.view(-1, *self.shape[1:])])
        self.region.symbols += len(where)
        return Zonotope(self.region, rows, self.box.relu())

    def margins(self, label: int) -> Tensor:
        """Lower bounds of z_label - z_j, the class subtracted before concretising: (classes,)."""
        return self.region.span(self.rows[:, label : label + 1] - self.rows)[0]


def _with_symbols(rows: Tensor, symbols: int) -> Tensor:
    """The same form with zero coefficients for the symbols that appeared since."""
    missing = 1 + symbols - len(rows)
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows


def _conv(value, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    def by(kernel: Tensor) -> Map:
        return lambda t: F.conv2d(t, kernel, None, stride, padding, dilation, groups)

    return value.affine(by(weight), by(weight.abs()), None if bias is None else bias.view(1, -1, 1, 1))


def _linear(value, weight, bias=None):
    result = value.affine(lambda t: F.linear(t, weight), lambda t: F.linear(t, weight.abs()), bias)
    if isinstance(result, Interval):
        result.before = (value, weight, bias)
    return result


def _batch_norm(value, mean, variance, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    if training:
        raise TypeError("batch norm with the statistics of the batch is not an affine map")
    scale = (variance + eps).rsqrt() * (1.0 if weight is None else weight)
    shift = -mean * scale + (0.0 if bias is None else bias)
    shape = (1, -1) + (1,) * (value.dim() - 2)
    return value.times(scale.view(shape)).plus(shift.view(shape))


def _dropout(value, p=0.5, training=True, inplace=False):
    if training:
        raise TypeError("dropout in training mode is random")
    return value


RULES: dict[Any, Callable[..., Any]] = {
    F.conv2d: _conv,
    F.linear: _linear,
    F.batch_norm: _batch_norm,
    F.dropout: _dropout,
    F.relu: lambda value, inplace=False: value.relu(),
    torch.relu: lambda value: value.relu(),
    torch.flatten: Abstract.flatten,
    torch.reshape: Abstract.reshape,
    torch.add: lambda left, right: left + right,
}


def run(net: nn.Module, value: Abstract) -> tuple[Any, ...]:
    """The outputs of a net in eval mode and float64, always as a tuple."""
    outputs = net(value)
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)


def in_double(net: nn.Module) -> nn.Module:
    """A float64 copy in eval mode."""
    return copy.deepcopy(net).double().eval()


def walk(
    net: nn.Module, image: Tensor, ball: Ball, method: str, pure: bool = False
) -> tuple[Region, tuple[Any, ...]]:
    """Run a float64 eval net on the ball round one image: the region, with its counts, and the outputs."""
    region = Region(image, ball, pure)
    return region, run(net, region.interval() if method == "interval" else region.zonotope())


def margins(
    net: nn.Module, x: Tensor, y: Tensor, ball: Ball, method: str, *, pure: bool = False
) -> tuple[Tensor, ...]:
    """Lower bounds of z_y - z_j, one (batch, classes) per output of the net, float64."""
    net = in_double(net)
    with torch.no_grad():
        per_image = [
            [output.margins(int(label)) for output in walk(net, image, ball, method, pure)[1]]
            for image, label in zip(x, y, strict=True)
        ]
    return tuple(torch.stack(rows) for rows in zip(*per_image, strict=True))


def output_bounds(
    net: nn.Module, x: Tensor, ball: Ball, method: str, *, pure: bool = False
) -> tuple[tuple[Tensor, Tensor], ...]:
    """Lower and upper bounds of the logits, a pair of (batch, classes) per output of the net, float64."""
    net = in_double(net)
    with torch.no_grad():
        per_image = [[output.bounds for output in walk(net, image, ball, method, pure)[1]] for image in x]
    return tuple(
        (torch.cat([low for low, _ in pairs]), torch.cat([high for _, high in pairs]))
        for pairs in zip(*per_image, strict=True)
    )


def hidden_units(net: nn.Module, x: Tensor, ball: Ball) -> list[Units]:
    """What each ReLU met, image after image, under the symbolic method."""
    net = in_double(net)
    with torch.no_grad():
        return [units for image in x for units in walk(net, image, ball, "symbolic")[0].hidden]
