"""Activations: functions of one value, and how far each strays from a straight line over an interval.

Everything that bounds need of an activation f is one question: over lower <= z <= upper, what are the least and the
largest value of f(z) - slope * z? With slope 0 the answer is f's range, for intervals. With any slope s it gives two
parallel lines around f, s z + least <= f(z) <= s z + largest: a relaxation. So no technique can be unsound by its
choice of slopes, whether it takes a chord, a tangent or what an optimiser found; only `extremes` has to be right.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[[Tensor], Tensor]


class Activation(Protocol):
    """A function of one value, applied to each entry."""

    def value(self, z: Tensor) -> Tensor:
        """f(z)."""

    def range(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the largest value of f over [lower, upper]."""

    def extremes(self, slope: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the largest value of f(z) - slope * z over [lower, upper], or numbers just outside of them.

        ``slope`` may have leading axes that the others lack.
        """

    def straight(self, center: Tensor, radius: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Where f is a straight line over centre +- radius.

        Returns:
            slope and intercept of that line (0 elsewhere; None for an intercept that is 0 everywhere), and a bool mask
            of the places where f bends or a bound is NaN.
        """

    def parallel(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One slope for both sides, with its `extremes`: (slope, least, largest)."""

    def tight(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Slopes of a line below and a line above f that leave little area between them and f."""

    def lines(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The lines of `tight`: slope and intercept below, slope and intercept above."""


def _extremes_at(function: Function, slope: Tensor, points: list[Tensor]) -> tuple[Tensor, Tensor]:
    excess = torch.stack([function(point) - slope * point for point in points])
    return excess.amin(0), excess.amax(0)


def _least_area(f: Activation, candidates: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Of candidate slopes (candidates, units), the one whose line below f lies highest at mid-interval; same above.

    The area between a line and f over an interval depends on the line's height at the middle alone.
    """
    with torch.no_grad():
        least, largest = f.extremes(candidates, lower, upper)
        height = candidates * ((lower + upper) / 2)
        below, above = (height + least).argmax(0, keepdim=True), (height + largest).argmin(0, keepdim=True)
    # The choice has no gradient, the slope chosen has.
    return candidates.gather(0, below)[0], candidates.gather(0, above)[0]


class _Lines:
    """What follows from `tight` and `extremes`."""

    def lines(self: Activation, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The lines of `tight`: slope and intercept below, slope and intercept above."""
        below, above = self.tight(lower, upper)
        least, largest = self.extremes(below, lower, upper)[0], self.extremes(above, lower, upper)[1]
        return below, least, above, largest


@dataclass(frozen=True)
class PiecewiseLinear(_Lines):
    """A continuous function of straight pieces: leaky ReLU, clamps, hard sigmoid.

    Args:
        function: f itself.
        bends: where two pieces meet, increasing.
        slopes: of the pieces, one more than there are bends; all >= 0 (f never falls).
    """

    function: Function
    bends: tuple[float, ...]
    slopes: tuple[float, ...]

    def value(self, z: Tensor) -> Tensor:
        """f(z)."""
        return self.function(z)

    def range(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """f at both ends, as f never falls."""
        return self.function(lower), self.function(upper)

    def _corners(self, lower: Tensor, upper: Tensor) -> Tensor:
        """The ends of the interval and the bends inside it: (bends + 2, units); a bend outside becomes an end."""
        return torch.stack([lower, *(lower.clamp_min(b).minimum(upper) for b in self.bends), upper])

    def extremes(self, slope: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Exact: f(z) - slope * z is piecewise linear too, so its extremes lie at ends and bends."""
        corners = self._corners(lower, upper)
        corners = corners.view(len(corners), *[1] * (slope.dim() - lower.dim()), *lower.shape)
        excess = self.function(corners) - slope * corners
        return excess.amin(0), excess.amax(0)

    def straight(self, center: Tensor, radius: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Straight where no bend lies strictly inside the interval."""
        lower, upper = center - radius, center + radius
        slope, intercept = torch.zeros_like(center), torch.zeros_like(center)
        bent = torch.ones_like(center, dtype=torch.bool)
        edges = (-math.inf, *self.bends, math.inf)
        for left, right, gradient in zip(edges, edges[1:], self.slopes, strict=False):
            inside = (lower >= left) & (upper <= right) & bent
            bent = bent & ~inside
            known = left if math.isfinite(left) else right
            height = float(self.function(torch.tensor(known, dtype=torch.float64))) - gradient * known
            slope = slope.masked_fill(inside, gradient)
            intercept = intercept.masked_fill(inside, height)
        return slope, intercept, bent

    def parallel(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The chord's slope: for one bend the least area of all slopes."""
        rise = self.function(upper) - self.function(lower)
        slope = rise / (upper - lower).clamp_min(torch.finfo(lower.dtype).tiny)
        return (slope, *self.extremes(slope, lower, upper))

    def tight(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """The best line of all: a side of the convex hull of f's corners, so a chord between two of them."""
        corners = self._corners(lower, upper)
        heights = self.function(corners)
        first, second = torch.triu_indices(len(corners), len(corners), 1, device=lower.device)
        width = corners[second] - corners[first]
        # Corners that coincide have no chord, and near ones none but noise; a slope of f's own stands in for it.
        apart = width > _NEAR
        chords = ((heights[second] - heights[first]) / width.where(apart, 1.0)).where(apart, max(self.slopes))
        return _least_area(self, chords, lower, upper)


class Relu(PiecewiseLinear):
    """max(z, 0), with its few formulas written out: it is what most networks consist of."""

    def __init__(self) -> None:
        super().__init__(torch.relu, (0.0,), (0.0, 1.0))

    def straight(self, center: Tensor, radius: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Always on or always off."""
        active = center >= radius
        # Written so that NaN is not stable.
        return active.to(center.dtype), None, ~active & ~(center <= -radius)

    def parallel(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u / (u - l), which is 1 or 0 where the relaxation itself proves the unit stable."""
        falls, rises = (-lower).relu(), upper.relu()
        slope = rises / (rises + falls).clamp_min(torch.finfo(lower.dtype).tiny)
        return slope, torch.zeros_like(slope), slope * falls

    def extremes(self, slope: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """At the ends and, if it lies between them, at 0, where the excess is 0 whatever the slope."""
        at_lower, at_upper = lower.relu() - slope * lower, upper.relu() - slope * upper
        least, largest = torch.minimum(at_lower, at_upper), torch.maximum(at_lower, at_upper)
        bends = (lower < 0) & (upper > 0)
        # By relu, not by clamps: a line along one of f's pieces has gradient 0, as inside; an ascent starts there.
        return least.where(~bends, -(-least).relu()), largest.where(~bends, largest.relu())

    def tight(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Below, slope 1 where u > -l, else 0 (CROWN's adaptive choice: the lesser area); above, the chord."""
        return (upper > -lower).to(lower.dtype), self.parallel(lower, upper)[0]

    def lines(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Both lines below pass through the origin; the chord meets f at both ends."""
        chord, zero, height = self.parallel(lower, upper)
        return (upper > -lower).to(lower.dtype), zero, chord, height


@dataclass(frozen=True)
class Smooth(_Lines):
    """A function whose slope rises or falls steadily between a few known places.

    `extremes` is sound by this argument. Let g(z) = f(z) - s z on [l, u]. Cut [l, u] at `inflections`. On each part f'
    is monotone, so g' changes its sign at most once and g has its extremes at the part's ends or at one point z* with
    f'(z*) = s. Bisection with f' keeps z* between two points w apart (or ends at a part's end, if g' has one sign). At
    any point t of that bracket |g(z*) - g(t)| <= curvature * w^2 / 2, since g'(z*) = 0 and |f''| <= curvature; this is
    added as slack. An inflection known to within h only adds a sliver of width 2 h around it, where the deviation from
    its value is again within curvature * h^2 of what ends and inflection give; `_SLIVER` covers it.

    Args:
        function: f.
        derivative: f'.
        inflections: where f' turns from rising to falling or back, or jumps; increasing.
        rising: whether f' rises (or is constant) on each of the parts between them, one more than inflections.
        curvature: a bound of |f''| wherever it exists.
        monotone: whether f never falls.
    """

    function: Function
    derivative: Function
    inflections: tuple[float, ...]
    rising: tuple[bool, ...]
    curvature: float
    monotone: bool

    def value(self, z: Tensor) -> Tensor:
        """f(z)."""
        return self.function(z)

    def range(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """At the ends where f never falls, else by `extremes`."""
        if self.monotone:
            return self.function(lower), self.function(upper)
        return self.extremes(torch.zeros_like(lower), lower, upper)

    def extremes(self, slope: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """See the class: values at the ends, at inflections and at bisected critical points, and a slack."""
        edges = [lower, *(lower.clamp_min(i).minimum(upper) for i in self.inflections), upper]
        with torch.no_grad():
            widest = torch.zeros_like(lower)
            critical = []
            for a, b, rising in zip(edges, edges[1:], self.rising, strict=False):
                low, high = a.expand(slope.shape), b.expand(slope.shape)
                for _ in range(_HALVINGS):
                    middle = (low + high) / 2
                    right = (self.derivative(middle) < slope) == rising
                    low, high = torch.where(right, middle, low), torch.where(right, high, middle)
                widest = torch.maximum(widest, b - a)
                critical.append(((low + high) / 2).maximum(lower).minimum(upper))
            width = widest * 0.5**_HALVINGS + _SLIVER
            slack = self.curvature * width.square() / 2
        # A critical point moves with the slope, but g is flat there: its value's gradient does not see the move. Where
        # it is an end of the interval, that end's value is taken, whose gradient does.
        least, largest = _extremes_at(self.function, slope, edges)
        lesser, larger = _extremes_at(self.function, slope, critical)
        return least.where(least <= lesser, lesser) - slack, largest.where(largest >= larger, larger) + slack

    def straight(self, center: Tensor, radius: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Nowhere."""
        zero = torch.zeros_like(center)
        return zero, None, torch.ones_like(center, dtype=torch.bool)

    def _chord(self, lower: Tensor, upper: Tensor) -> Tensor:
        width = upper - lower
        # Over a very short interval the quotient is noise.
        wide = width > 1e-4
        chord = (self.function(upper) - self.function(lower)) / width.where(wide, 1.0)
        return chord.where(wide, self.derivative((lower + upper) / 2))

    def parallel(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of some slopes the one whose two lines lie closest."""
        slopes = self._candidates(lower, upper)
        with torch.no_grad():
            least, largest = self.extremes(slopes, lower, upper)
            best = (largest - least).argmin(0, keepdim=True)
        slope = slopes.gather(0, best)[0]
        return (slope, *self.extremes(slope, lower, upper))

    def tight(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """The best of the chord and of tangents at some points."""
        return _least_area(self, self._candidates(lower, upper), lower, upper)

    def _candidates(self, lower: Tensor, upper: Tensor) -> Tensor:
        share = torch.linspace(0, 1, _TANGENTS, dtype=lower.dtype, device=lower.device)
        points = lower + (upper - lower) * share.view(-1, *[1] * lower.dim())
        return torch.cat([self._chord(lower, upper)[None], self.derivative(points)])


@dataclass(frozen=True)
class SShaped(Smooth):
    """A smooth function that is convex below 0, concave above, and symmetric about the point (0, f(0))."""

    def tight(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """The best lines of all, found as sides of the convex hull of f.

        From the left end, f's upper hull is the line that touches f at some d >= 0, up to d, and f itself from there
        on; where f is convex or d lies beyond the right end, it is the chord. The line above at mid-interval is that
        line or the tangent there. Below it is the same for the mirrored interval, as f' is even.
        """
        return self._above(-upper, -lower), self._above(lower, upper)

    def _above(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Slope of the side of the upper hull at mid-interval."""
        with torch.no_grad():
            # A line from the left end to a point before d is flatter than f there.
            near, far = lower.clamp_min(0.0).minimum(upper), upper
            for _ in range(_HALVINGS):
                point = (near + far) / 2
                before = self.derivative(point) * (point - lower) > self.function(point) - self.function(
                    lower
                )
                near, far = torch.where(before, point, near), torch.where(before, far, point)
            touch = (near + far) / 2
            beyond = far == upper
        # The slope of a touching line does not change with the point at which it touches.
        side = self._chord(lower, torch.where(beyond, upper, touch))
        middle = (lower + upper) / 2
        return torch.where(middle > touch, self.derivative(middle), side)


_HALVINGS = 20
_SLIVER = 1e-6
_NEAR = 1e-6
_TANGENTS = 9


def leaky_relu(slope: float) -> PiecewiseLinear:
    """z for z >= 0, slope * z below; 0 <= slope."""
    return PiecewiseLinear(lambda z: F.leaky_relu(z, slope), (0.0,), (slope, 1.0))


def clamp(low: float, high: float) -> PiecewiseLinear:
    """z cut to [low, high]; either may be infinite. Hardtanh and ReLU6 are clamps."""
    bends = tuple(bend for bend in (low, high) if math.isfinite(bend))
    slopes = ((0.0,) if math.isfinite(low) else ()) + (1.0,) + ((0.0,) if math.isfinite(high) else ())
    return PiecewiseLinear(lambda z: z.clamp(low, high), bends, slopes)


def hardsigmoid() -> PiecewiseLinear:
    """z / 6 + 1 / 2 cut to [0, 1]."""
    return PiecewiseLinear(F.hardsigmoid, (-3.0, 3.0), (0.0, 1 / 6, 0.0))


def sigmoid() -> Smooth:
    """1 / (1 + e^-z): its slope rises up to 0 and falls after; |f''| <= sqrt(3) / 18 < 0.0963."""
    return SShaped(torch.sigmoid, _sigmoid_slope, (0.0,), (True, False), 0.0963, monotone=True)


def tanh() -> Smooth:
    """tanh z = 2 sigmoid(2 z) - 1; |f''| <= 4 / (3 sqrt(3)) < 0.77."""
    return SShaped(
        torch.tanh, lambda z: 1 - torch.tanh(z).square(), (0.0,), (True, False), 0.77, monotone=True
    )


def gelu() -> Smooth:
    """z Phi(z). f'' = phi(z) (2 - z^2): zero at +-sqrt(2), and |f''| <= 2 phi(0) < 0.798."""
    root = math.sqrt(2)
    return Smooth(F.gelu, _gelu_slope, (-root, root), (False, True, False), 0.798, monotone=False)


def silu() -> Smooth:
    """z sigmoid(z). f'' = sigmoid'(z) (2 - z tanh(z / 2)): zero where z tanh(z / 2) = 2, and |f''| <= 1 / 2."""
    root = 2.399357280515468
    return Smooth(F.silu, _silu_slope, (-root, root), (False, True, False), 0.5, monotone=False)


def hardswish() -> Smooth:
    """z (z + 3) / 6 cut to 0 below -3 and to z above 3. f' is 0, then (2 z + 3) / 6 with jumps at +-3, then 1."""
    return Smooth(F.hardswish, _hardswish_slope, (-3.0, 3.0), (True, True, True), 1 / 3, monotone=False)


def softplus() -> Smooth:
    """ln(1 + e^z): its slope, the sigmoid, only rises; |f''| <= 1 / 4."""
    return Smooth(F.softplus, torch.sigmoid, (), (True,), 0.25, monotone=True)


def _sigmoid_slope(z: Tensor) -> Tensor:
    value = torch.sigmoid(z)
    return value * (1 - value)


def _gelu_slope(z: Tensor) -> Tensor:
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return torch.special.ndtr(z) + z * density


def _silu_slope(z: Tensor) -> Tensor:
    value = torch.sigmoid(z)
    return value + z * value * (1 - value)


def _hardswish_slope(z: Tensor) -> Tensor:
    return torch.where(z <= -3, 0.0, torch.where(z >= 3, 1.0, (2 * z + 3) / 6))
