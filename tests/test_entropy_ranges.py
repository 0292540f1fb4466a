"""Ranges of entropy and of the largest probability over boxes, against vertices, samples and ascent."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swiftsure.bounds import entropy as ranges
from swiftsure.errors import InputError

SCALES = (0.1, 1.0, 5.0, 30.0)
ALL = (
    ranges.highest_entropy, ranges.lowest_entropy, ranges.lowest_entropy_bound,
    ranges.highest_probability, ranges.lowest_probability,
)  # fmt: skip


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
    levels = torch.linspace(0, 1, 2001, dtype=torch.float64)[:, None, None]
    levels = lower.amin() + levels * (upper.amax() - lower.amin())
    best = ranges.entropy(levels.maximum(lower).minimum(upper)).amax(0)
    assert (ranges.highest_entropy(lower, upper) - best <= 1e-3 * scale).all()
    top = torch.eye(classes, dtype=torch.bool)
    alone = torch.where(top, upper[:, None], lower[:, None]).softmax(-1).diagonal(dim1=1, dim2=2).amax(1)
    torch.testing.assert_close(ranges.highest_probability(lower, upper), alone)
    level = lower.amax(1, keepdim=True)
    torch.testing.assert_close(
        ranges.lowest_probability(lower, upper), torch.minimum(upper, level).softmax(-1).amax(1)
    )


@pytest.mark.parametrize("classes", [2, 5, 9, 12])
@pytest.mark.parametrize("scale", SCALES)
def test_branch_and_bound_equals_all_vertices(classes: int, scale: float) -> None:
    lower, upper = boxes(20, classes, scale, 7)
    every = torch.cartesian_prod(*[torch.tensor([False, True])] * classes)
    least = ranges.entropy(torch.where(every, upper[:, None], lower[:, None])).amin(1)
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


def test_thresholds_are_not_rounded_to_float32() -> None:
    lower, upper = boxes(20, 4, 1.0, 7)
    for a, b, least in zip(lower, upper, ranges.lowest_entropy(lower, upper).tolist(), strict=True):
        threshold = least * (1 - 1e-10)
        assert ranges.lowest_entropy(a, b, threshold) >= threshold


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


@pytest.mark.parametrize("center", [[0.0, -50.0, -60.0], [0.0, 0.0, 0.0], [300.0, -900.0, 2.0]])
@pytest.mark.parametrize("radius", [0.0, 40.0])
def test_gradients_are_numbers_where_a_probability_is_1_or_all_are_equal(
    center: list[float], radius: float
) -> None:
    middle = torch.tensor(center, dtype=torch.float64)
    lower, upper = (middle - radius).requires_grad_(), (middle + radius).requires_grad_()
    for bound in ALL:
        if bound is ranges.lowest_entropy:
            continue
        for gradient in torch.autograd.grad(bound(lower, upper), (lower, upper)):
            assert gradient.isfinite().all(), bound


@pytest.mark.parametrize("classes", [3, 5, 10])
def test_a_largest_probability_just_above_one_in_k(classes: int) -> None:
    """The least entropy of K - 1 equal entries and one just below; not that of K entries that sum to more than 1."""
    for far in (1e-8, 1e-9, 1e-10, 1e-12, 0.0):
        z = torch.zeros(classes, dtype=torch.float64)
        z[0] = -far
        assert ranges.lowest_entropy_bound(z, z) <= ranges.entropy(z)


@pytest.mark.parametrize("classes", [10, 1000])
def test_slack_covers_rounding(classes: int) -> None:
    """Against 50 digits, at boxes that are points, where nothing but rounding is left."""
    generator = torch.Generator().manual_seed(classes)
    for scale in (0.01, 1.0, 20.0, 1e4):
        z = torch.randn(classes, generator=generator, dtype=torch.float64) * scale
        exact = entropy_in_decimals(z)
        assert abs(Decimal(float(ranges.entropy(z))) - exact) < ranges.SLACK / 10
        assert Decimal(float(ranges.highest_entropy(z, z))) >= exact
        assert Decimal(float(ranges.lowest_entropy_bound(z, z))) <= exact
        assert Decimal(float(ranges.lowest_entropy(z, z))) <= exact


def entropy_in_decimals(z: Tensor) -> Decimal:
    with localcontext() as context:
        context.prec = 50
        logits = [Decimal(value) for value in z.tolist()]
        weights = [(value - max(logits)).exp() for value in logits]
        mean = sum(w * (value - max(logits)) for w, value in zip(weights, logits, strict=True)) / sum(weights)
        return sum(weights).ln() - mean


def test_infinite_ends_are_like_far_ones() -> None:
    inf = torch.inf
    lower = torch.tensor([[0.0, -inf, -inf], [0.0, -inf, -2.0], [-inf, 0.0, -inf]])
    upper = torch.tensor([[0.0, inf, -1.0], [0.0, -1.0, -2.0], [inf, 0.0, inf]])
    far = lower.clamp_min(-700), upper.clamp_max(700)
    for bound in ALL:
        torch.testing.assert_close(bound(lower, upper), bound(*far), rtol=0, atol=1e-9)


def test_a_search_that_is_cut_short_stays_below(monkeypatch: pytest.MonkeyPatch) -> None:
    lower, upper = boxes(20, 12, 3.0, 7)
    whole = ranges.lowest_entropy(lower, upper)
    monkeypatch.setattr(ranges, "NODES", 0)
    short = ranges.lowest_entropy(lower, upper)
    assert (short <= whole + 1e-11).all() and (short < whole - 1e-3).any()
    assert (short >= ranges.lowest_entropy_bound(lower, upper)).all()


def test_nan_empty_boxes_and_bad_shapes() -> None:
    lower, upper = boxes(3, 4, 1.0, 1)
    lower[0, 0] = torch.nan
    upper[1, 2] = lower[1, 2] - 1e-9
    for bound in ALL:
        result = bound(lower, upper)
        assert result[:2].isnan().all() and result[2].isfinite(), bound
    with pytest.raises(InputError, match="shapes"):
        ranges.highest_entropy(torch.zeros(2, 3), torch.zeros(2, 4))
