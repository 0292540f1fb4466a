"""Activations against dense grids: what every line around them rests on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swiftsure.bounds import operations as ops


@dataclass(frozen=True)
class Known:
    """An activation, what torch computes for it, and how sharply it can bend inside a piece."""

    operation: ops.Bent
    function: Callable[[Tensor], Tensor]
    curvature: float = 0.0
    jump: float = 0.0
    """By how much torch's own function is discontinuous."""


ACTIVATIONS = {
    "relu": Known(ops.Relu(), F.relu),
    "leaky relu .1": Known(ops.leaky_relu(0.1), lambda z: F.leaky_relu(z, 0.1)),
    "leaky relu 2": Known(ops.leaky_relu(2.0), lambda z: F.leaky_relu(z, 2.0)),
    "clamp": Known(ops.clamp(-0.5, 1.0), lambda z: z.clamp(-0.5, 1.0)),
    "clamp below": Known(ops.clamp(0.3, math.inf), lambda z: z.clamp_min(0.3)),
    "clamp above": Known(ops.clamp(-math.inf, 0.3), lambda z: z.clamp_max(0.3)),
    "relu6": Known(ops.clamp(0.0, 6.0), F.relu6),
    "hardsigmoid": Known(ops.hardsigmoid(), F.hardsigmoid),
    "sigmoid": Known(ops.sigmoid(), torch.sigmoid, 0.1),
    "tanh": Known(ops.tanh(), torch.tanh, 0.77),
    "gelu": Known(ops.gelu(), F.gelu, 0.8),
    "silu": Known(ops.silu(), F.silu, 0.5),
    "hardswish": Known(ops.hardswish(), F.hardswish, 0.34),
    # From 20 on torch returns z itself.
    "softplus": Known(ops.softplus(), F.softplus, 0.25, 2.1e-9),
}
BENDS = {
    "relu": [0.0],
    "leaky relu .1": [0.0],
    "leaky relu 2": [0.0],
    "clamp": [-0.5, 1.0],
    "clamp below": [0.3],
    "clamp above": [0.3],
    "relu6": [0.0, 6.0],
    "hardsigmoid": [-3.0, 3.0],
}
every = pytest.mark.parametrize("name", ACTIVATIONS)
GRID = 501


def intervals(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ends of intervals from 1e-9 to 1e4 wide, most of them near the bends, some between or at whole numbers."""
    generator = torch.Generator().manual_seed(seed)
    middle = torch.randn(count, generator=generator, dtype=torch.float64) * 2
    width = 10 ** (torch.rand(count, generator=generator, dtype=torch.float64) * 13 - 9)
    width[: count // 2] = torch.rand(count // 2, generator=generator, dtype=torch.float64) * 8
    share = torch.rand(count, generator=generator, dtype=torch.float64)
    lower, upper = middle - share * width, middle + (1 - share) * width
    whole = slice(0, count // 8)
    lower[whole], upper[whole] = lower[whole].round(), upper[whole].round()
    return torch.minimum(lower, upper), torch.maximum(lower, upper)


def grid(lower: Tensor, upper: Tensor) -> Tensor:
    """Points of each interval, (GRID + some, units): evenly spread, and everything that is special about them."""
    even = lower + (upper - lower) * torch.linspace(0, 1, GRID, dtype=lower.dtype)[:, None]
    bends = torch.tensor(sorted({bend for some in BENDS.values() for bend in some}), dtype=lower.dtype)
    special = torch.cat([torch.linspace(-25, 25, 1001, dtype=lower.dtype), bends])[:, None].expand(
        -1, len(lower)
    )
    return torch.cat([even, special]).clamp(lower, upper)


def excess(known: Known, slope: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Least and largest f(z) - slope * z over the grid, and how far the truth may lie beyond them."""
    points = grid(lower, upper)
    values = known.function(points) - slope * points
    # Points are 1/20 apart, or wider apart beyond +-25, where every f here is all but straight.
    step = ((upper - lower) / (GRID - 1)).clamp_max(1 / 20)
    return values.amin(0), values.amax(0), known.curvature * step.square() / 8


def rounding(known: Known, lower: Tensor, upper: Tensor, eps: float = 2e-16) -> Tensor:
    return known.jump + 8 * eps * (1 + torch.maximum(lower.abs(), upper.abs()))


def slopes_of(known: Known, lower: Tensor, upper: Tensor) -> dict[str, Tensor]:
    points = lower + (upper - lower) * torch.rand(len(lower), generator=torch.Generator().manual_seed(5))
    points = points.requires_grad_()
    (tangent,) = torch.autograd.grad(known.function(points).sum(), points)
    chord = (known.function(upper) - known.function(lower)) / (upper - lower).clamp_min(1e-300)
    return {
        "0": torch.zeros_like(lower),
        "1": torch.ones_like(lower),
        "random": torch.randn(len(lower), generator=torch.Generator().manual_seed(4), dtype=torch.float64),
        "tangent": tangent,
        "chord": chord,
    }


@every
def test_extremes_hold_all_points_and_little_more(name: str) -> None:
    known = ACTIVATIONS[name]
    lower, upper = intervals(500)
    slack = rounding(known, lower, upper)
    for kind, slope in slopes_of(known, lower, upper).items():
        least, largest = known.operation.extremes(slope, lower, upper)
        low, high, beyond = excess(known, slope, lower, upper)
        room = slack * (1 + slope.abs())
        assert (least <= low + room).all(), kind
        assert (largest >= high - room).all(), kind
        # What the slack of bisection adds grows with the interval: about 1e-12 of its square.
        extra = beyond + room + known.curvature * (1e-6 + (upper - lower) * 2e-6).square()
        assert (least >= low - extra).all(), kind
        assert (largest <= high + extra).all(), kind


@every
def test_extremes_take_slopes_with_leading_axes(name: str) -> None:
    known = ACTIVATIONS[name]
    lower, upper = intervals(50)
    slopes = torch.stack([torch.full_like(lower, s) for s in (-1.0, 0.0, 0.3, 1.0, 2.0)])
    together = known.operation.extremes(slopes, lower, upper)
    alone = [known.operation.extremes(slope, lower, upper) for slope in slopes]
    for side, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(side, torch.stack(parts))


@every
def test_range_is_that_of_the_grid(name: str) -> None:
    known = ACTIVATIONS[name]
    lower, upper = intervals(500, seed=1)
    least, largest = known.operation.range(lower, upper)
    low, high, beyond = excess(known, torch.zeros_like(lower), lower, upper)
    room = rounding(known, lower, upper)
    assert ((least <= low + room) & (largest >= high - room)).all()
    extra = beyond + room + known.curvature * (1e-6 + (upper - lower) * 2e-6).square()
    assert ((least >= low - extra) & (largest <= high + extra)).all()


@every
def test_bounds_of_parallel_and_tight_lines(name: str) -> None:
    """Both hold the function; the parallel pair is no wider apart than around the chord."""
    known = ACTIVATIONS[name]
    lower, upper = intervals(500, seed=2)
    room = rounding(known, lower, upper)
    slope, least, largest = known.operation.parallel(lower, upper)
    low, high, _ = excess(known, slope, lower, upper)
    assert ((least <= low + room) & (largest >= high - room)).all()
    chord = slopes_of(known, lower, upper)["chord"]
    around_chord = known.operation.extremes(chord, lower, upper)
    assert (
        largest - least <= (around_chord[1] - around_chord[0]) * 1.0001 + 1e-6 * (upper - lower) + 1e-9
    ).all()
    for slope in known.operation.tight(lower, upper):
        least, largest = known.operation.extremes(slope, lower, upper)
        low, high, _ = excess(known, slope, lower, upper)
        assert ((least <= low + room) & (largest >= high - room)).all()


@every
def test_tight_lines_leave_little_area(name: str) -> None:
    """At mid-interval, which decides the area, against the best of all slopes."""
    known = ACTIVATIONS[name]
    lower, upper = intervals(400, seed=3)
    some = (upper - lower > 1e-3) & (upper - lower < 50)
    lower, upper = lower[some], upper[some]
    points = grid(lower, upper)
    values, middle = known.function(points), (lower + upper) / 2
    below, above = known.operation.tight(lower, upper)
    ends = known.operation.extremes(below, lower, upper)[0], known.operation.extremes(above, lower, upper)[1]

    def best(sign: float) -> Tensor:
        """The height of the best line, concave in its slope."""
        steep, flat = torch.full_like(lower, 2.1), torch.full_like(lower, -0.6)
        for _ in range(40):
            slopes = flat + (steep - flat) / 3, steep - (steep - flat) / 3
            heights = [sign * slope * middle + (sign * (values - slope * points)).amin(0) for slope in slopes]
            climbs = heights[0] < heights[1]
            flat, steep = slopes[0].where(climbs, flat), steep.where(climbs, slopes[1])
        return sign * torch.maximum(*heights)

    span = best(-1.0) - best(1.0) + 1e-3
    below_hull = (best(1.0) - (below * middle + ends[0])) / span
    above_hull = (above * middle + ends[1] - best(-1.0)) / span
    for loss in (below_hull, above_hull):
        if isinstance(known.operation, ops.PiecewiseLinear):
            assert loss.max() < 1e-5
        elif isinstance(known.operation, ops.SShaped):
            assert loss.max() < 1e-4
        else:
            # A few tangents come close: over wide intervals up to half of the hull's height is lost, hardly ever more.
            assert loss.mean() < 0.04 and loss.max() < 0.6
        assert loss.min() > -0.01


def test_relu_slopes_are_crowns() -> None:
    lower = torch.tensor([-1.0, -1.0, -1.0, -2.0, 0.5, -2.0])
    upper = torch.tensor([2.0, 1.0, 0.5, 2.5, 1.0, -1.0])
    below, above = ops.Relu().tight(lower, upper)
    assert below.tolist() == [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    torch.testing.assert_close(above, torch.tensor([2 / 3, 1 / 2, 1 / 3, 5 / 9, 1.0, 0.0]))
    slope, least, largest = ops.Relu().parallel(lower, upper)
    torch.testing.assert_close(slope, above)
    torch.testing.assert_close(least, torch.zeros(6))
    torch.testing.assert_close(largest, torch.tensor([2 / 3, 1 / 2, 1 / 3, 10 / 9, 0.0, 0.0]))


@every
def test_straight_pieces_are_found_and_are_straight(name: str) -> None:
    known = ACTIVATIONS[name]
    lower, upper = intervals(2000, seed=4)
    center, radius = (lower + upper) / 2, (upper - lower) / 2
    slope, lift, bent = known.operation.straight(center, radius)
    low, high = center - radius, center + radius
    points = grid(low, high)
    line = slope * points + (0.0 if lift is None else lift)
    off = (known.function(points) - line).abs().amax(0)
    assert (off[~bent] <= 4 * rounding(known, low, high)[~bent]).all()
    inside = torch.zeros_like(bent)
    for bend in BENDS.get(name, []):
        inside |= (low < bend) & (bend < high)
    expected = inside if name in BENDS else torch.ones_like(bent)
    assert torch.equal(bent, expected)
    assert expected.any()
    assert (~expected).any() or name not in BENDS


@every
def test_what_is_unknown_is_not_straight(name: str) -> None:
    nan, one = torch.tensor([math.nan]), torch.tensor([1.0])
    operation = ACTIVATIONS[name].operation
    for center, radius in ((nan, one), (one, nan), (nan, nan)):
        assert operation.straight(center, radius)[2].all()


@every
def test_points_and_very_wide_intervals(name: str) -> None:
    known = ACTIVATIONS[name]
    for dtype in (torch.float32, torch.float64):
        point = torch.tensor([-7.0, -3.0, -1.5, -0.5, 0.0, 0.3, 1.0, 3.0, 6.0, 25.0], dtype=dtype)
        eps = torch.finfo(dtype).eps
        slope, least, largest = known.operation.parallel(point, point)
        below, above = known.operation.tight(point, point)
        for s, low, high in [
            (slope, least, largest),
            *[(s, *known.operation.extremes(s, point, point)) for s in (below, above)],
        ]:
            value, room = known.function(point), 8 * eps * (1 + point.abs()) + 1e-12
            assert (s * point + low <= value + room).all() and (s * point + high >= value - room).all()
            assert (high - low <= 4 * room).all()
        far = torch.tensor([1e3, 1e6, 1e9, 1e12], dtype=dtype)
        for lower, upper in (
            (-far, far), (-far, far * 0 + 0.5), (far * 0 - 0.5, far), (far, 2 * far), (-2 * far, -far),
        ):  # fmt: skip
            for s in (*known.operation.tight(lower, upper), known.operation.parallel(lower, upper)[0]):
                low, high = known.operation.extremes(s, lower, upper)
                points = grid(lower, upper)
                found = known.function(points) - s * points
                room = 16 * eps * (1 + torch.maximum(lower.abs(), upper.abs())) * (1 + s.abs())
                assert (found >= low - room).all() and (found <= high + room).all()


@every
def test_single_precision_errs_by_rounding_only(name: str) -> None:
    known = ACTIVATIONS[name]
    lower, upper = (end.float() for end in intervals(500, seed=6))
    for slope in (*known.operation.tight(lower, upper), known.operation.parallel(lower, upper)[0]):
        least, largest = known.operation.extremes(slope, lower, upper)
        low, high, _ = excess(known, slope.double(), lower.double(), upper.double())
        room = rounding(known, lower.double(), upper.double(), 1.2e-7) * (1 + slope.abs())
        assert (least <= low + room).all() and (largest >= high - room).all()


@every
def test_gradients_of_extremes(name: str) -> None:
    """To the slope and to both ends, away from places where another point takes over."""
    operation = ACTIVATIONS[name].operation
    lower, upper = (end[60:] for end in intervals(200, seed=7))
    some = (upper - lower > 1e-2) & (upper - lower < 50)
    slope = torch.randn(int(some.sum()), generator=torch.Generator().manual_seed(8)).double()
    arguments, checked = [slope, lower[some], upper[some]], 0
    for side in (0, 1):
        known = [argument.clone().requires_grad_() for argument in arguments]
        here = operation.extremes(*known)[side]
        gradients = torch.autograd.grad(here.sum(), known)
        for place, gradient in enumerate(gradients):
            ways = []
            for step in (1e-6, -1e-6):
                shifted = list(arguments)
                shifted[place] = shifted[place] + step
                ways.append((operation.extremes(*shifted)[side] - here.detach()) / step)
            # Where both ways differ, another point takes over here.
            smooth = (ways[0] - ways[1]).abs() < 1e-4
            assert ((gradient - ways[0]).abs()[smooth] < 1e-3).all()
            checked += int(smooth.sum())
    assert checked > 300
