"""The threat model: parsing, projection against optimality, the linear maximiser, sampling."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftsure.ball import LARGEST, Ball, parse_eps
from swiftsure.errors import InputError

NORMS = ("inf", "2", "1")
balls = st.builds(
    Ball,
    st.one_of(st.just(0.0), st.floats(1e-3, 30.0)),
    st.sampled_from(NORMS),
)


def images(seed: int, *shape: int) -> torch.Tensor:
    """Images with many pixels exactly at the ends of the range, where clipping happens."""
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 1.6 - 0.3).clamp(0, 1)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8/255", 8 / 255),
        (" 2/255 ", 2 / 255),
        ("1.785/255", 1.785 / 255),
        ("0.1", 0.1),
        (0, 0.0),
        (3, 3.0),
        ("1e-2", 0.01),
    ],
)
def test_eps_is_read(text, value):
    assert parse_eps(text) == value
    assert Ball(text) == Ball(value)


@pytest.mark.parametrize(
    "text",
    [
        "8/0",
        "1/2/3",
        "",
        "/",
        "eight",
        "-1/255",
        -0.1,
        "nan",
        math.nan,
        math.inf,
        "1e400",
        1e300,
        "1e999999999",
        "9" * 400 + "/1",
        None,
        True,
        [],
    ],
)
def test_unreadable_eps_is_one_line(text):
    with pytest.raises(InputError, match=r"^eps is .*; allowed: .*$"):
        Ball(text)


def test_norm_and_range():
    norms = [Ball(1, norm).norm for norm in (math.inf, "Linf", 2, 2.0, "L2", 1, "l1")]
    assert norms == ["inf", "inf", "2", "2", "2", "1", "1"]
    with pytest.raises(InputError, match="norm"):
        Ball(1, "3")
    for low, high in [(1, 0), (0, 0), (math.nan, 1), (0, math.inf)]:
        with pytest.raises(InputError, match="pixel range"):
            Ball(1, low=low, high=high)
    assert Ball("1/2", "2").with_eps(0.25).as_dict() == {"eps": 0.25, "norm": "2", "low": 0.0, "high": 1.0}


def test_contains_refuses_what_is_outside():
    x = torch.full((1, 1, 2, 2), 0.5)
    for norm, size in (("inf", 0.1), ("2", 0.2), ("1", 0.4)):
        assert Ball(size, norm).contains(x + 0.1, x).all()
        assert not Ball(size * 0.999, norm).contains(x + 0.1, x).any()
    assert not Ball(1).contains(x + 0.6, x).any()
    assert not Ball(1).contains(x * math.nan, x).any()
    assert not Ball(0).contains(x + 1e-5, x).any()


@given(balls, st.integers(0, 10**6), st.floats(1e-3, 100))
@settings(max_examples=150, deadline=None)
def test_projection_is_the_nearest_point(ball, seed, scale):
    """p is the projection of z on a convex set C iff <z - p, c - p> <= 0 for all c of C; the maximiser of
    <z - p, .> over C is the c that matters, and random points check it independently of the maximiser."""
    x = images(seed, 3, 1, 4, 5)
    z = x + scale * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    p = ball.project(z, x)
    assert ball.contains(p, x).all()
    normal = (z - p).double()
    worst = ball.maximiser(x, (z - p))
    generator = torch.Generator().manual_seed(seed + 1)
    for c in (worst, x, *(ball.sample(x, generator) for _ in range(20))):
        gap = (normal * (c - p).double()).flatten(1).sum(1)
        assert (gap <= 2e-5 * (1 + scale) * (1 + min(ball.radius, 20.0))).all()


@given(balls, st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_points_inside_stay_and_samples_are_inside(ball, seed):
    x = images(seed, 4, 2, 3, 3)
    points = ball.sample(x, torch.Generator().manual_seed(seed))
    assert ball.contains(points, x).all()
    lower, upper = ball.box(x)
    assert ((points >= lower - 1e-6) & (points <= upper + 1e-6)).all()
    torch.testing.assert_close(ball.project(points, x), points, rtol=0, atol=2e-6)
    assert torch.equal(points, ball.sample(x, torch.Generator().manual_seed(seed)))


def test_projection_with_clipping_equals_a_grid_search():
    x = torch.tensor([0.2, 0.9]).view(1, 1, 1, 2)
    z = x + torch.tensor([0.7, 0.5]).view(1, 1, 1, 2)
    grid = torch.linspace(-0.2, 0.8, 1001)
    a, b = torch.meshgrid(grid, torch.linspace(-0.9, 0.1, 1001), indexing="ij")
    for norm, inside in (("1", a.abs() + b.abs() <= 0.6), ("2", a**2 + b**2 <= 0.36)):
        far = ((a - 0.7) ** 2 + (b - 0.5) ** 2).masked_fill(~inside, math.inf)
        best = torch.stack([a.flatten()[far.argmin()], b.flatten()[far.argmin()]])
        torch.testing.assert_close((Ball(0.6, norm).project(z, x) - x).flatten(), best, rtol=0, atol=3e-3)


@given(balls, st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_maximiser_beats_every_other_point(ball, seed):
    x = images(seed, 3, 1, 3, 4)
    slope = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 2))
    slope[:, :, 0] = 0
    best = ball.maximiser(x, slope)
    assert ball.contains(best, x).all()
    assert torch.equal(best[:, :, 0], x[:, :, 0])
    reached = (slope * best).flatten(1).sum(1)
    generator = torch.Generator().manual_seed(seed)
    for scale in (0.1, 1.0, 10.0):
        for other in (ball.project(x + scale * slope, x), ball.sample(x, generator)):
            assert ((slope * other).flatten(1).sum(1) <= reached + 1e-5).all()


def test_maximiser_of_a_zero_slope_is_x():
    x = images(0, 2, 1, 3, 3)
    for norm in NORMS:
        assert torch.equal(Ball(0.5, norm).maximiser(x, torch.zeros_like(x)), x)


@pytest.mark.parametrize("norm", NORMS)
def test_samples_fill_the_ball(norm):
    """In a range that never clips: centred, and as far out as a uniform ball of that dimension."""
    x = torch.zeros(4000, 1, 2, 2)
    ball = Ball(2.0, norm, -10, 10)
    points = ball.sample(x, torch.Generator().manual_seed(0))
    assert points.mean().abs() < 0.03
    # P(distance <= r * eps) = r^4 in four dimensions.
    assert (ball.distance(points, x) <= 1.0).double().mean() == pytest.approx(1 / 16, abs=0.015)
    assert ball.sample(x[:0]).shape == (0, 1, 2, 2)


def test_rounding_of_many_pixels_stays_inside_a_small_l1_ball():
    """Each of 12,288 pixels may move by 1.6 units in the last place: rounded to the nearest, all would move by 2."""
    x = torch.full((1, 3, 64, 64), 0.5)
    ball = Ball(12288 * 1.6 * 2**-24, "1")
    points = ball.project(x + 0.125, x)
    assert ball.contains(points, x).all()
    assert (points > x).all()


@pytest.mark.parametrize("norm", NORMS)
def test_the_largest_radius_clips_nothing(norm):
    x, far = images(0, 2, 1, 3, 3), images(1, 2, 1, 3, 3)
    ball = Ball(LARGEST, norm)
    torch.testing.assert_close(ball.project(far, x), far, rtol=0, atol=1e-6)
    assert ball.contains(ball.sample(x), x).all()
    assert ball.contains(ball.maximiser(x, far - x), x).all()
