"""What must hold of the bounds of any network, whoever computes them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import networks
from swiftsure import bounds
from swiftsure.ball import Ball
from swiftsure.bounds import relaxation

METHODS = tuple(bounds.TECHNIQUES)
CHEAP = METHODS[:-1]
some_methods = st.sampled_from([CHEAP, CHEAP, CHEAP, METHODS])
"""alpha-crown, which takes as long as all others many times over, on every fourth network."""
quick = settings(max_examples=60, deadline=None, database=None, derandomize=True)


def corners(ball: Ball, x: Tensor, generator: torch.Generator) -> Tensor:
    """Extreme points: corners of the box for "inf", the ball's tips along one pixel, or along random directions."""
    if ball.norm == "inf":
        sign = torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1
        return ball.project(x + sign * ball.radius, x)
    if ball.norm == "1":
        pixel = torch.randint(0, x[0].numel(), (len(x), 1), generator=generator)
        sign = torch.randint(0, 2, (len(x), 1), generator=generator).to(x) * 2 - 1
        tip = torch.zeros_like(x).flatten(1).scatter(1, pixel, sign * ball.radius)
        return ball.project(x + tip.view_as(x), x)
    direction = torch.randn(x.shape, generator=generator, dtype=x.dtype).flatten(1)
    return ball.project(x + (F.normalize(direction) * ball.radius).view_as(x), x)


def attacked(score: Callable[[Tensor], Tensor], ball: Ball, x: Tensor, steps: int = 6) -> Tensor:
    """Points of the ball with a low score, by normalised gradient descent from the centre."""
    point = x.clone()
    for step in range(steps):
        point.requires_grad_()
        (slope,) = torch.autograd.grad(
            score(point * 1).sum(), point, allow_unused=True, materialize_grads=True
        )
        move = slope.sign() if ball.norm == "inf" else F.normalize(slope.flatten(1)).view_as(x)
        point = ball.project((point - move * ball.radius * (1.0 if step == 0 else 0.5)).detach(), x)
    return point


def points(case: networks.Case, net: nn.Module) -> Iterator[Tensor]:
    """The centre, random points, corners, and for each exit and class points that gradients lead to."""
    x, ball, generator = case.x, case.ball, torch.Generator().manual_seed(0)
    yield x
    for _ in range(8):
        yield ball.sample(x, generator)
        yield corners(ball, x, generator)
    with torch.no_grad():
        exits = networks.outputs(net(x.clone()))
    for exit_, logits in enumerate(exits):
        for j in range(logits.shape[1]):
            for sign in (1.0, -1.0):
                yield attacked(lambda p, e=exit_, j=j, s=sign: s * networks.outputs(net(p))[e][:, j], ball, x)

            def margin(p: Tensor, e: int = exit_, j: int = j) -> Tensor:
                z = networks.outputs(net(p))[e]
                return z.gather(1, case.y[:, None])[:, 0] - z[:, j]

            yield attacked(margin, ball, x)


@settings(quick, max_examples=80)
@given(networks.cases(), some_methods, st.booleans())
def test_no_point_of_the_ball_leaves_the_bounds(
    case: networks.Case, methods: tuple[str, ...], double: bool
) -> None:
    case = case.double() if double else case
    net = copy.deepcopy(case.net).eval()
    boxes = {
        method: networks.outputs(bounds.output_bounds(case.net, case.x, case.ball, method), pairs=True)
        for method in methods
    }
    proofs = {
        method: networks.outputs(bounds.margins(case.net, case.x, case.y, case.ball, method))
        for method in methods
    }
    rounding = 1e-9 if double else 1e-4
    for point in points(case, net):
        assert case.ball.contains(point, case.x).all()
        with torch.no_grad():
            exits = networks.outputs(net(point.clone()))
        for method in methods:
            for logits, (lower, upper), proof in zip(exits, boxes[method], proofs[method], strict=True):
                slack = rounding * (1 + logits.abs().max() + (upper - lower).max())
                assert (logits >= lower - slack).all(), method
                assert (logits <= upper + slack).all(), method
                margin = logits.gather(1, case.y[:, None]) - logits
                assert (margin >= proof - slack).all(), method


@quick
@given(networks.cases())
def test_merged_margins_are_never_looser_than_two_logit_bounds(case: networks.Case) -> None:
    """Not so for two lines around units that intervals have tightened, nor for the lesser of two reaches."""
    net, x = case.net.double(), case.x.double()
    for method in ("interval", "symbolic") if case.ball.norm == "inf" else ("interval",):
        proofs = networks.outputs(bounds.margins(net, x, case.y, case.ball, method))
        boxes = networks.outputs(bounds.output_bounds(net, x, case.ball, method), pairs=True)
        for proof, (lower, upper) in zip(proofs, boxes, strict=True):
            apart = lower.gather(1, case.y[:, None]) - upper
            apart.scatter_(1, case.y[:, None], 0.0)
            assert (proof >= apart - 1e-9 * (1 + apart.abs().max())).all(), method
            assert (proof.gather(1, case.y[:, None]) == 0).all(), method


@settings(quick, max_examples=30)
@given(networks.cases(), some_methods)
def test_a_ball_of_radius_zero_is_the_network_itself(case: networks.Case, methods: tuple[str, ...]) -> None:
    net, x = copy.deepcopy(case.net).double().eval(), case.x.double()
    with torch.no_grad():
        exits = networks.outputs(net(x.clone()))
    for method in methods:
        ball = case.ball.with_eps(0)
        for logits, pair in zip(
            exits, networks.outputs(bounds.output_bounds(net, x, ball, method), pairs=True), strict=True
        ):
            for end in pair:
                torch.testing.assert_close(end, logits, rtol=1e-9, atol=1e-9)


@settings(quick, max_examples=40)
@given(networks.cases(exits=2), some_methods)
def test_two_exits_equal_two_networks(case: networks.Case, methods: tuple[str, ...]) -> None:
    net, x = case.net.double(), case.x.double()
    alone = [nn.Sequential(net.trunk, head).train(net.training) for head in (net.early, net.late)]
    for method in methods:
        together = bounds.margins(net, x, case.y, case.ball, method)
        assert isinstance(together, tuple)
        assert len(together) == 2
        for shared, single in zip(together, alone, strict=True):
            found = bounds.margins(single, x, case.y, case.ball, method)
            torch.testing.assert_close(shared, found, rtol=1e-10, atol=1e-10)


@settings(quick, max_examples=20)
@given(networks.cases())
def test_alpha_crown_is_never_looser_than_crown(case: networks.Case) -> None:
    case = case.double()
    crown, alpha = (
        networks.outputs(bounds.output_bounds(case.net, case.x, case.ball, method), pairs=True)
        for method in ("crown", "alpha-crown")
    )
    for (lower, upper), (low, high) in zip(crown, alpha, strict=True):
        assert (low >= lower - 1e-9 * (1 + lower.abs())).all()
        assert (high <= upper + 1e-9 * (1 + upper.abs())).all()
    # Margins that CROWN proves are left alone; the others are taken as far as they go, or until they are proven.
    crown, alpha = (
        networks.outputs(bounds.margins(case.net, case.x, case.y, case.ball, method))
        for method in ("crown", "alpha-crown")
    )
    for proof, better in zip(crown, alpha, strict=True):
        assert (better >= proof - 1e-9 * (1 + proof.abs())).all()


@pytest.mark.parametrize("norm", ["inf", "2", "1"])
@pytest.mark.parametrize(
    "affine",
    [
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(18, 4)),
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2, 2, 1, bias=False), nn.Flatten()),
        lambda: nn.Sequential(nn.AvgPool2d(2, 1), nn.Flatten()),
    ],
    ids=["linear", "convolution", "pooling"],
)
def test_all_techniques_are_exact_on_one_affine_map(affine: Callable[[], nn.Module], norm: str) -> None:
    """The least and the largest value are attained at the ball's own maximisers."""
    torch.manual_seed(0)
    net, ball = affine().double(), Ball(0.3, norm)
    x = (torch.rand(2, 2, 3, 3) * 1.4 - 0.2).clamp(0, 1).double().requires_grad_()
    logits = net(x)
    least, largest = logits.detach().clone(), logits.detach().clone()
    for j in range(logits.shape[1]):
        (slope,) = torch.autograd.grad(logits[:, j].sum(), x, retain_graph=True)
        with torch.no_grad():
            largest[:, j] = net(ball.maximiser(x.detach(), slope))[:, j]
            least[:, j] = net(ball.maximiser(x.detach(), -slope))[:, j]
    for method in METHODS:
        lower, upper = bounds.output_bounds(net, x.detach(), ball, method)
        if norm == "inf":
            torch.testing.assert_close((lower, upper), (least, largest), rtol=1e-9, atol=1e-9, msg=method)
            continue
        # Where the pixel range cuts the ball, the lesser of two reaches is not the exact one.
        assert (lower <= least + 1e-9).all() and (upper >= largest - 1e-9).all(), method
        inside = x.detach() * 0.2 + 0.4
        lower, upper = bounds.output_bounds(net, inside, Ball(0.3, norm), method)
        center = net(inside).detach()
        for j in range(logits.shape[1]):
            (slope,) = torch.autograd.grad(logits[:, j].sum(), x, retain_graph=True)
            dual = 2 if norm == "2" else torch.inf
            reach = 0.3 * torch.linalg.vector_norm(slope.flatten(1), ord=dual, dim=1)
            found = (center[:, j] - lower[:, j], upper[:, j] - center[:, j])
            if method == "interval":  # knows the box round the ball only
                assert all((side > reach + 1e-6).all() for side in found)
            else:
                torch.testing.assert_close(found, (reach, reach), rtol=1e-9, atol=1e-9, msg=method)


# How bounds are computed must not show


@contextlib.contextmanager
def computed(share: float, size: int | None) -> Iterator[None]:
    """By whole fields from this share of bent units on, and in chunks of about so many bytes."""
    before, relaxation.DENSE_SHARE = relaxation.DENSE_SHARE, share
    try:
        with bounds.memory.limited(size):
            yield
    finally:
        relaxation.DENSE_SHARE = before


ways = st.builds(computed, st.sampled_from([0.0, 0.2, 2.0]), st.sampled_from([None, 1, 20_000]))


@quick
@given(networks.cases(), some_methods, ways)
def test_an_image_does_not_depend_on_its_batch(
    case: networks.Case, methods: tuple[str, ...], way: contextlib.AbstractContextManager[None]
) -> None:
    """The box is clipped to the pixel range, not to what the batch happens to hold."""
    net, x = case.net.double(), case.x.double()
    extremes = torch.stack(
        [torch.full_like(x[0], max(case.ball.low, 0.0)), torch.full_like(x[0], case.ball.high)]
    )
    batch, labels = torch.cat([x, extremes]), torch.cat([case.y, case.y[:1], case.y[:1]])
    with way:
        among = {method: bounds.margins(net, batch, labels, case.ball, method) for method in methods}
    for method in methods:
        # What is rounded differently may take an ascent to another slope, next to the best one.
        room = 1e-4 if method == "alpha-crown" else 1e-10
        for together, alone in zip(
            networks.outputs(among[method]),
            networks.outputs(bounds.margins(net, x[:1], case.y[:1], case.ball, method)),
            strict=True,
        ):
            torch.testing.assert_close(together[:1], alone, rtol=room, atol=room, msg=method)


@settings(quick, max_examples=25)
@given(networks.cases(), ways)
def test_gradients_equal_finite_differences(
    case: networks.Case, way: contextlib.AbstractContextManager[None]
) -> None:
    """Along a random direction in weight space, gradients through l, u and slopes included."""
    net, x = copy.deepcopy(case.net).double().eval(), case.x.double()
    parameters = list(net.parameters())
    start = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(0)
    way_in_space = [
        torch.randn(parameter.shape, generator=generator, dtype=torch.float64) for parameter in parameters
    ]

    def total(method: str, step: float) -> Tensor:
        with torch.no_grad():
            for parameter, value, direction in zip(parameters, start, way_in_space, strict=True):
                parameter.copy_(value + step * direction)
        margins = networks.outputs(bounds.margins(net, x, case.y, case.ball, method))
        return sum(
            (margin * torch.arange(1.0, margin.numel() + 1).view_as(margin)).sum() for margin in margins
        )

    with way:
        for method in CHEAP:
            gradients = torch.autograd.grad(
                total(method, 0.0), parameters, allow_unused=True, materialize_grads=True
            )
            slope = sum(
                (gradient * direction).sum()
                for gradient, direction in zip(gradients, way_in_space, strict=True)
            ).item()
            here, step = total(method, 0.0).item(), 1e-7
            sides = [(total(method, h).item() - here) / h for h in (step, -step)]
            # Two sides that disagree meet in a kink (a unit turning stable), where there is no derivative.
            if abs(sides[0] - sides[1]) < 1e-4 * (1 + abs(slope)):
                assert slope == pytest.approx(sum(sides) / 2, rel=1e-3, abs=1e-3), method
