"""Ranges of entropy and of the largest probability over boxes, against vertices, samples and ascent."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swiftsure.bounds import entropy as ranges
from swiftsure.errors import InputError

SCALES = (0.1, 1.0, 5.0, 30.0)


def boxes(count: int, classes: int, scale: float, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    center = torch.randn(count, classes, generator=generator, dtype=torch.float64) * scale
    radius = torch.rand(count, classes, generator=generator, dtype=torch.float64) * scale
    return center - radius, center + radius


def points(lower: Tensor, upper: Tensor, count: int, seed: int) -> Tensor:
    """Inner points, vertices and points with equal entries: (boxes, points, classes)."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(len(lower), count, lower.shape[1], generator=generator, dtype=torch.float64)
    inner = lower[:, None] + (upper - lower)[:, None] * share
    vertices = torch.where(share > 0.5, upper[:, None], lower[:, None])
    level = lower.amin() + (upper.amax() - lower.amin()) * share[..., :1]
    return torch.cat([inner, vertices, level.maximum(lower[:, None]).minimum(upper[:, None])], 1)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.sampled_from(SCALES), st.integers(0, 1000))
def test_no_point_of_a_box_leaves_the_ranges(classes: int, scale: float, seed: int) -> None:
    lower, upper = boxes(8, classes, scale, seed)
    z = points(lower, upper, 300, seed)
    found, peak = ranges.entropy(z), z.softmax(-1).amax(-1)
    assert (found.amax(1) <= ranges.highest_entropy(lower, upper)).all()
    assert (found.amin(1) >= ranges.lowest_entropy(lower, upper)).all()
    assert (found.amin(1) >= ranges.lowest_entropy_bound(lower, upper)).all()
    assert (peak.amax(1) <= ranges.highest_probability(lower, upper) + 1e-12).all()
    assert (peak.amin(1) >= ranges.lowest_probability(lower, upper) - 1e-12).all()


@pytest.mark.parametrize("classes", [2, 3, 5, 10, 200])
@pytest.mark.parametrize("scale", SCALES)
def test_ranges_are_attained(classes: int, scale: float) -> None:
    """The largest entropy at a common level, the least and the extreme probabilities at vertices."""
    lower, upper = boxes(4, classes, scale, classes)
    levels = torch.linspace(float(lower.min()), float(upper.max()), 20_001, dtype=torch.float64)
    best = torch.stack(
        [
            max(
                ranges.entropy(part[:, None].maximum(a).minimum(b)).max()
                for part in levels.split(max(1, 2_000_000 // classes))
            )
            for a, b in zip(lower, upper, strict=True)
        ]
    )
    highest = ranges.highest_entropy(lower, upper)
    assert (highest - best <= 1e-3 * scale).all()
    top = torch.eye(classes, dtype=torch.bool)
    alone = torch.where(top, upper[:, None], lower[:, None]).softmax(-1).diagonal(dim1=1, dim2=2).amax(1)
    torch.testing.assert_close(ranges.highest_probability(lower, upper), alone)
    level = lower.amax(1, keepdim=True)
    torch.testing.assert_close(
        ranges.lowest_probability(lower, upper), torch.minimum(upper, level).softmax(-1).amax(1)
    )


@pytest.mark.parametrize("classes", [2, 5, 9, 12])
def test_branch_and_bound_equals_all_vertices(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lower, upper = boxes(20, classes, 3.0, 7)
    every = torch.cartesian_prod(*[torch.tensor([False, True])] * classes)
    least = ranges.entropy(torch.where(every, upper[:, None], lower[:, None])).amin(1)
    torch.testing.assert_close(ranges.lowest_entropy(lower, upper), least, rtol=0, atol=1e-10)
    monkeypatch.setattr(ranges, "ENUMERATED", 1)
    torch.testing.assert_close(ranges.lowest_entropy(lower, upper), least, rtol=0, atol=1e-10)
    for threshold in (0.05, 0.5, 1.0):
        settled = ranges.lowest_entropy(lower, upper, threshold)
        assert (settled <= least + 1e-10).all()
        assert torch.equal(settled >= threshold, least >= threshold)


@pytest.mark.parametrize("classes", [20, 100])
def test_many_classes_against_a_descent_over_vertices(classes: int) -> None:
    lower, upper = boxes(3, classes, 1.0, 11)
    found, bound = ranges.lowest_entropy(lower, upper), ranges.lowest_entropy_bound(lower, upper)
    assert (bound <= found + 1e-12).all()
    for a, b, least in zip(lower, upper, found, strict=True):
        generator = torch.Generator().manual_seed(0)
        best = math.inf
        for _ in range(10):
            up = torch.rand(classes, generator=generator) > 0.5
            while True:
                flips = up ^ torch.eye(classes, dtype=torch.bool)
                values = ranges.entropy(torch.where(torch.cat([up[None], flips]), b, a))
                if values[1:].min() >= values[0] - 1e-12:
                    break
                up = flips[int(values[1:].argmin())]
            best = min(best, float(values[0]))
        assert float(least) == pytest.approx(best, abs=1e-6)


def test_wide_and_narrow_boxes() -> None:
    wide = (
        torch.tensor([[-1e4, -1e4, -5.0], [1e4, -1e4, -5.0]]),
        torch.tensor([[1e4, 1e4, 5.0], [1e4, -9e3, 5.0]]),
    )
    assert ranges.highest_entropy(*wide).tolist() == pytest.approx([math.log(3), 0.0], abs=1e-9)
    assert ranges.lowest_entropy(*wide).tolist() == pytest.approx([0.0, 0.0], abs=1e-9)
    assert ranges.lowest_entropy_bound(*wide).tolist() == pytest.approx([0.0, 0.0], abs=1e-9)
    assert ranges.lowest_probability(*wide).tolist() == pytest.approx([1 / 3, 1.0])
    z = torch.randn(50, 10, dtype=torch.float64) * 5
    for bound in (ranges.highest_entropy, ranges.lowest_entropy, ranges.lowest_entropy_bound):
        torch.testing.assert_close(bound(z, z), ranges.entropy(z), rtol=0, atol=1e-9)
    torch.testing.assert_close(ranges.highest_probability(z, z), z.softmax(-1).amax(-1))
    torch.testing.assert_close(ranges.lowest_probability(z, z), z.softmax(-1).amax(-1))


def test_a_shift_changes_nothing() -> None:
    lower, upper = boxes(10, 6, 2.0, 3)
    for bound in (ranges.highest_entropy, ranges.lowest_entropy, ranges.highest_probability):
        torch.testing.assert_close(bound(lower + 500, upper + 500), bound(lower, upper), rtol=1e-9, atol=1e-9)


def test_gradients_equal_finite_differences() -> None:
    lower, upper = boxes(6, 5, 1.0, 5)
    lower.requires_grad_(), upper.requires_grad_()
    for bound in (ranges.highest_entropy, ranges.highest_probability, ranges.lowest_probability):
        assert torch.autograd.gradcheck(bound, (lower, upper), eps=1e-6, atol=1e-4, rtol=1e-3), bound


def test_the_gradient_of_the_bound_raises_it() -> None:
    """At a kink of the bound its gradient is one of several; each must point upwards."""
    lower, upper = (side.requires_grad_() for side in boxes(30, 6, 1.0, 5))
    before = ranges.lowest_entropy_bound(lower, upper)
    to_lower, to_upper = torch.autograd.grad(before.sum(), (lower, upper))
    after = ranges.lowest_entropy_bound(lower + 1e-5 * to_lower, upper + 1e-5 * to_upper)
    assert ((after > before) | (before == 0)).all() and (before > 0).sum() > 20


def test_nan_stays_nan_and_bad_shapes_are_refused() -> None:
    lower, upper = boxes(2, 4, 1.0, 1)
    lower[0, 0] = torch.nan
    for bound in (ranges.highest_entropy, ranges.lowest_entropy_bound, ranges.lowest_entropy):
        result = bound(lower, upper)
        assert result[0].isnan() and result[1].isfinite()
    with pytest.raises(InputError, match="shapes"):
        ranges.highest_entropy(torch.zeros(2, 3), torch.zeros(2, 4))
