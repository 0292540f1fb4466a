"""A slow and plain float64 reference of backward substitution, by dense matrices.

The network is run on a `Tape`, one image at a time. Each of its values knows two matrices for each value that it was
made of: `below` and `above`, the same for affine operations, the lines for bent ones. A linear function of a value goes
back row by row, positive coefficients through one matrix and negative ones through the other, down to the image. No
windows, no centres, no chunks, no unit left out, and nothing of `swiftsure.bounds` but the slopes of smooth curves,
which any rule may choose; the lines through these slopes are found on a grid.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reference
from reference import Abstract, Interval, Map, in_double, run
from swiftsure.ball import Ball
from swiftsure.bounds import operations as ops

METHODS = {
    "crown-ibp": ("tight", False),
    "symbolic": ("parallel", True),
    "crown": ("tight", True),
}
"""Which lines, and whether hidden units are bounded by substitution too."""

Lines = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Curve:
    """An activation: f, where its straight pieces meet, and for smooth ones where its slopes come from."""

    function: Map
    bends: tuple[float, ...] = ()
    slopes: ops.Smooth | None = None
    lowest: float | None = None
    """Where f is least, if it does not only rise."""
    relu: bool = False

    def lines(self, kind: str, lower: Tensor, upper: Tensor) -> Lines:
        """(slope, intercept) of the line below and of the line above."""
        if self.slopes is not None:
            if kind == "parallel":
                slopes = [self.slopes.parallel(lower, upper)[0]] * 2
            else:
                slopes = list(self.slopes.tight(lower, upper))
        elif kind == "parallel":
            slopes = [self._chord(lower, upper)] * 2
        elif self.relu:
            slopes = [(upper > -lower).double(), self._chord(lower, upper)]
        else:
            slopes = [self._hull(lower, upper, sign) for sign in (1.0, -1.0)]
        below, above = slopes
        return below, self._excess(below, lower, upper, 1.0), above, self._excess(above, lower, upper, -1.0)

    def _chord(self, lower: Tensor, upper: Tensor) -> Tensor:
        wide = upper > lower
        rise = self.function(upper) - self.function(lower)
        return torch.where(wide, rise / torch.where(wide, upper - lower, 1.0), 0.0)

    def _points(self, lower: Tensor, upper: Tensor) -> Tensor:
        return torch.stack([lower, *(lower.clamp(min=b).minimum(upper) for b in self.bends), upper])

    def _hull(self, lower: Tensor, upper: Tensor, sign: float) -> Tensor:
        """Slope of the side of the convex hull of f's graph below (sign 1) or above mid-interval."""
        points, middle = self._points(lower, upper), (lower + upper) / 2
        best, slope = torch.full_like(lower, torch.inf), torch.zeros_like(lower)
        for i, left in enumerate(points):
            for right in points[i + 1 :]:
                spans = (left <= middle) & (middle <= right) & (left < right)
                gradient = (self.function(right) - self.function(left)) / (right - left).where(
                    spans, torch.ones(())
                )
                height = sign * (self.function(left) + gradient * (middle - left))
                better = spans & (height < best)
                best, slope = height.where(better, best), gradient.where(better, slope)
        return slope

    def _excess(self, slope: Tensor, lower: Tensor, upper: Tensor, sign: float) -> Tensor:
        """sign * the least value of sign * (f(z) - slope * z) over the interval."""

        def at(points: Tensor) -> Tensor:
            return sign * (self.function(points) - slope * points)

        points = self._points(lower, upper)
        least = at(points).amin(0)
        if self.slopes is not None:
            left, right = lower.detach(), upper.detach()
            for _ in range(3):  # ever finer around the best point
                share = torch.linspace(0, 1, 401, dtype=torch.float64).view(-1, *[1] * lower.dim())
                grid = left + (right - left) * share
                place = at(grid).detach().argmin(0, keepdim=True)
                left, right = (grid.gather(0, (place + d).clamp(0, 400))[0] for d in (-1, 1))
            least = torch.minimum(least, at((left + right) / 2))
        return sign * least


class Tied(Exception):
    """Two inputs of a pooling window leave the same area, and either may be the one to rest on."""


class Tape(Abstract):
    """One value of the network and how it hangs together with what it was made of.

    Args:
        region: the ball; it also holds the list of all values so far.
        box: what plain intervals know.
        below, above: [(source, matrix (units, the source's units))]; the value lies between the two sums.
        shift_below, shift_above: (units,).
    """

    def __init__(
        self,
        region: Any,
        box: Interval,
        below: list[tuple[Tape, Tensor]],
        shift_below: Tensor,
        above: list[tuple[Tape, Tensor]] | None = None,
        shift_above: Tensor | None = None,
    ) -> None:
        self.region, self.box = region, box
        self.below, self.shift_below = below, shift_below
        self.above = below if above is None else above
        self.shift_above = shift_below if shift_above is None else shift_above
        self.curve: Curve | None = None
        self.limits: tuple[Tensor, Tensor] | None = None
        region.tape.append(self)
        self.index = len(region.tape) - 1

    @property
    def shape(self) -> torch.Size:
        return self.box.shape

    @property
    def units(self) -> int:
        return self.shape.numel()

    def affine(self, linear: Map, absolute: Map, shift: Tensor | None) -> Tape:
        box = self.box.affine(linear, absolute, shift)
        identity = torch.eye(self.units, dtype=torch.float64).view(self.units, *self.shape[1:])
        matrix = linear(identity).reshape(self.units, -1).T
        offset = torch.zeros(box.shape, dtype=torch.float64) if shift is None else shift.expand(box.shape)
        return Tape(self.region, box, [(self, matrix)], offset.flatten())

    def plus(self, other: Any) -> Tape:
        if isinstance(other, Tape):
            identity = torch.eye(self.units, dtype=torch.float64)
            box = self.box.plus(other.box)
            return Tape(
                self.region, box, [(self, identity), (other, identity)], torch.zeros(self.units).double()
            )
        other = torch.as_tensor(other, dtype=torch.float64).expand(self.shape)
        return self.affine(lambda t: t, lambda t: t, other)

    def relu(self) -> Tape:
        return self.bend(RELU)

    def bend(self, curve: Curve) -> Tape:
        self.limits = lower, upper = self.bounded()
        below, least, above, largest = curve.lines(self.region.lines, lower, upper)
        value = Tape(
            self.region,
            _bend(self.box, curve),
            [(self, below.diag())],
            least,
            [(self, above.diag())],
            largest,
        )
        value.curve = curve
        return value

    def max_pool(self, box: Interval, windows: list[list[int]]) -> Tape:
        """Each output z' between lines around that one z of its inputs which leaves the least between them at
        mid-interval; for z' is at least max(z, the highest lower bound), and at most max(z, all others' upper bounds).
        """
        lower, upper = self.bounded()
        below = torch.zeros(len(windows), self.units, dtype=torch.float64)
        above, shift_below, shift_above = below.clone(), [], []
        for unit, window in enumerate(windows):
            found = []
            for i in window:
                lines = self._lines_of_a_largest(i, window, lower, upper)
                heights = [slope * (lower[i] + upper[i]) / 2 + shift for slope, shift in lines]
                found.append(((heights[1] - heights[0]).item(), i, lines))
            (least, chosen, lines), *others = sorted(found, key=lambda entry: entry[0])
            for area, i, alike in others:
                if (
                    area < least + 1e-9
                    and lower[i] < upper[i]
                    and any(slope != 0 for slope, _ in (*lines, *alike))
                ):
                    raise Tied
            (below[unit, chosen], least_shift), (above[unit, chosen], largest_shift) = lines
            shift_below.append(least_shift)
            shift_above.append(largest_shift)
        return Tape(
            self.region,
            box,
            [(self, below)],
            torch.stack(shift_below),
            [(self, above)],
            torch.stack(shift_above),
        )

    def _lines_of_a_largest(
        self, i: int, window: list[int], lower: Tensor, upper: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(slope, shift) of the line below and of the line above, resting on input i."""
        zero, one = torch.zeros(()).double(), torch.ones(()).double()
        rivals = [upper[j] for j in window if j != i]
        if not rivals or max(rivals) <= lower[i]:
            return (one, zero), (one, zero)
        floor, ceiling = max(lower[j] for j in window), max(rivals)
        ends = [torch.maximum(end, ceiling) for end in (lower[i], upper[i])]
        chord = (ends[1] - ends[0]) / (upper[i] - lower[i]) if upper[i] > lower[i] else zero
        above = (chord, ends[0] - chord * lower[i])
        if self.region.lines == "parallel":
            turn = min(max(floor, lower[i]), upper[i])
            corners = [torch.maximum(z, floor) - chord * z for z in (lower[i], turn, upper[i])]
            return (chord, min(corners)), above
        rises = (lower[i] + upper[i]) / 2 > floor
        return ((one, zero) if rises else (zero, floor)), above

    def bounded(self) -> tuple[Tensor, Tensor]:
        """l, u of each unit: intervals', side by side with the technique's own if that refines."""
        lower, upper = (end.flatten() for end in self.box.bounds)
        if not self.region.refine:
            return lower, upper
        identity = torch.eye(self.units, dtype=torch.float64)
        return torch.maximum(lower, self.lowest(identity)), torch.minimum(upper, -self.lowest(-identity))

    def lowest(self, rows: Tensor) -> Tensor:
        """Lower bounds of rows (functions, units) of linear functions of this value: (functions,)."""
        pending = {self.index: rows}
        constant = torch.zeros(len(rows), dtype=torch.float64)
        for index in range(self.index, 0, -1):
            if index not in pending:
                continue
            coefficients, value = pending.pop(index), self.region.tape[index]
            positive, negative = coefficients.clamp_min(0), coefficients.clamp_max(0)
            constant = constant + positive @ value.shift_below + negative @ value.shift_above
            for (source, low), (_, high) in zip(value.below, value.above, strict=True):
                known = pending.get(source.index, 0.0)
                pending[source.index] = known + positive @ low + negative @ high
        coefficients = pending.get(0, torch.zeros(len(rows), self.region.inputs, dtype=torch.float64))
        constant = constant + coefficients @ self.region.start.flatten()
        return self.region.span(torch.cat([constant[None], coefficients.T]))[0]


# Operations that the forward reference lacks


def _bend(box: Interval, curve: Curve) -> Interval:
    lower, upper = box.bounds
    ends = curve.function(lower), curve.function(upper)
    least, largest = ends if curve.lowest is None else (torch.minimum(*ends), torch.maximum(*ends))
    if curve.lowest is not None:
        lowest = torch.as_tensor(curve.lowest, dtype=torch.float64)
        least = torch.where((lower < lowest) & (lowest < upper), curve.function(lowest), least)
    return Interval((least + largest) / 2, (largest - least) / 2)


def _bent(value: Any, curve: Curve) -> Any:
    return _bend(value, curve) if isinstance(value, Interval) else value.bend(curve)


def _leaky(value: Any, slope: float) -> Any:
    return _bent(value, Curve(lambda z: F.leaky_relu(z, slope), (0.0,)))


def _clamp(value: Any, low: float, high: float) -> Any:
    return _bent(value, Curve(lambda z: z.clamp(low, high), (low, high)))


def _max_pool(value, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    box = value if isinstance(value, Interval) else value.box
    options = (kernel_size, stride or kernel_size, padding, dilation, ceil_mode)
    least, largest = (F.max_pool2d(end, *options) for end in box.bounds)
    pooled = Interval((least + largest) / 2, (largest - least) / 2)
    if isinstance(value, Interval):
        return pooled
    kernel, stride, padding, dilation = ((o, o) if isinstance(o, int) else tuple(o) for o in options[:4])
    (channels, height, width), windows = value.shape[1:], []
    for channel in range(channels):
        for i in range(pooled.shape[2]):
            for j in range(pooled.shape[3]):
                rows = [i * stride[0] - padding[0] + k * dilation[0] for k in range(kernel[0])]
                columns = [j * stride[1] - padding[1] + k * dilation[1] for k in range(kernel[1])]
                windows.append(
                    [
                        (channel * height + r) * width + c
                        for r in rows
                        for c in columns
                        if 0 <= r < height and 0 <= c < width
                    ]
                )
    return value.max_pool(pooled, windows)


def _averaged(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """A map whose coefficients are all >= 0."""

    def rule(value: Any, *options: Any, **more: Any) -> Any:
        return value.affine(*[lambda t: function(t, *options, **more)] * 2, None)

    return rule


def _cat(values: Sequence[Any], dim: int = 0) -> Any:
    boxes = [value if isinstance(value, Interval) else value.box for value in values]
    box = Interval(torch.cat([b.centre for b in boxes], dim), torch.cat([b.radius for b in boxes], dim))
    if isinstance(values[0], Interval):
        return box
    # Where each unit of each part lies in the whole.
    numbers = torch.arange(sum(value.units for value in values)).split([value.units for value in values])
    order = torch.cat([n.view(value.shape) for n, value in zip(numbers, values, strict=True)], dim).flatten()
    identity = torch.eye(len(order), dtype=torch.float64)[order]
    links = list(zip(values, identity.split([value.units for value in values], 1), strict=True))
    return Tape(values[0].region, box, links, torch.zeros(len(order)).double())


RELU = Curve(torch.relu, (0.0,), relu=True)
reference.RULES.update(
    {
        F.max_pool2d: _max_pool,
        torch.cat: _cat,
        F.avg_pool2d: _averaged(F.avg_pool2d),
        F.adaptive_avg_pool2d: _averaged(F.adaptive_avg_pool2d),
        F.leaky_relu: lambda v, negative_slope=0.01, inplace=False: _leaky(v, negative_slope),
        F.hardtanh: lambda v, min_val=-1.0, max_val=1.0, inplace=False: _clamp(v, min_val, max_val),
        torch.clamp: lambda v, low, high: _clamp(v, low, high),
        F.relu6: lambda v, inplace=False: _bent(v, Curve(F.relu6, (0.0, 6.0))),
        F.hardsigmoid: lambda v, inplace=False: _bent(v, Curve(F.hardsigmoid, (-3.0, 3.0))),
        torch.sigmoid: lambda v: _bent(v, Curve(torch.sigmoid, (), ops.sigmoid())),
        torch.tanh: lambda v: _bent(v, Curve(torch.tanh, (), ops.tanh())),
        F.softplus: lambda v, beta=1, threshold=20: _bent(v, Curve(F.softplus, (), ops.softplus())),
        F.gelu: lambda v, approximate="none": _bent(v, Curve(F.gelu, (), ops.gelu(), -0.7517915246935645)),
        F.silu: lambda v, inplace=False: _bent(v, Curve(F.silu, (), ops.silu(), -1.2784645427610738)),
        F.hardswish: lambda v, inplace=False: _bent(v, Curve(F.hardswish, (-3.0, 3.0), ops.hardswish(), -1.5)),
    }
)  # fmt: skip


# Bounds of a network


def walk(net: nn.Module, image: Tensor, ball: Ball, method: str) -> tuple[Any, ...]:
    """The outputs of a float64 eval net on the ball round one image, as `Tape`s."""
    region: Any = reference.Region(image, ball)
    (region.lines, region.refine), region.tape = METHODS[method], []
    Tape(region, region.interval(), [], torch.zeros(region.inputs).double())
    return run(net, region.tape[0])


def margins(net: nn.Module, x: Tensor, y: Tensor, ball: Ball, method: str) -> tuple[Tensor, ...]:
    """Lower bounds of z_y - z_j, one (batch, classes) per output of the net, float64; differentiable."""
    if method == "interval":
        return reference.margins(net, x, y, ball, method)
    net = in_double(net) if next(iter(net.parameters())).dtype != torch.float64 or net.training else net
    per_image = []
    for image, label in zip(x, y, strict=True):
        rows = []
        for output in walk(net, image, ball, method):
            identity = torch.eye(output.units, dtype=torch.float64)
            rows.append(output.lowest(identity[int(label)] - identity))
        per_image.append(rows)
    return tuple(torch.stack(rows) for rows in zip(*per_image, strict=True))


def output_bounds(net: nn.Module, x: Tensor, ball: Ball, method: str) -> tuple[tuple[Tensor, Tensor], ...]:
    """Lower and upper bounds of the logits, a pair of (batch, classes) per output of the net, float64."""
    if method == "interval":
        return reference.output_bounds(net, x, ball, method)
    net = copy.deepcopy(net).double().eval()
    with torch.no_grad():
        per_image = []
        for image in x:
            outputs = walk(net, image, ball, method)
            identity = [torch.eye(output.units, dtype=torch.float64) for output in outputs]
            per_image.append([(o.lowest(e), -o.lowest(-e)) for o, e in zip(outputs, identity, strict=True)])
    return tuple(
        (torch.stack([low for low, _ in pairs]), torch.stack([high for _, high in pairs]))
        for pairs in zip(*per_image, strict=True)
    )
