"""fab: the shortest move to a plane, the distance to the boundary of linear networks, and what only it finds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attacked import NORMS, images, linear, optimum
from swiftsure.attacks import (
    deployed,
    fab_targeted,
    misclassified,
    never,
    run_suite,
    single,
    targeted_margin,
)
from swiftsure.attacks._fab import to_plane
from swiftsure.ball import Ball
from swiftsure.exits import MultiExit, Policy

SIDE = 10


@given(st.integers(0, 10**6), st.sampled_from(NORMS), st.floats(0.0, 3.0), st.booleans())
@settings(max_examples=60, deadline=None)
def test_to_plane_is_the_shortest_move(seed, norm, size, edges):
    """No ball of that length holds a point that gains more: the two problems are dual."""
    torch.manual_seed(seed)
    x, slope = torch.rand(6, 1, 5, 5), torch.randn(6, 1, 5, 5)
    if edges:
        # Pixels at the ends of their range, and some without a slope.
        x, slope = x.round(), slope * (torch.rand_like(slope) > 0.3)
    slope = slope / slope.flatten(1).abs().amax(1).clamp_min(1e-9).view(-1, 1, 1, 1)
    missing = torch.randn(6) * size
    ball = Ball(1.0, norm)
    move = to_plane(x, slope, missing, ball)
    assert ((x + move >= -1e-6) & (x + move <= 1 + 1e-6)).all()
    gain = (move * slope).flatten(1).sum(1)
    direction = slope * missing.sign().view(-1, 1, 1, 1)
    most = (ball.room(x, direction) * slope.abs()).flatten(1).sum(1)
    torch.testing.assert_close(
        gain, missing.sign() * torch.minimum(missing.abs(), most), rtol=1e-4, atol=1e-5
    )
    length = ball.distance(move, torch.zeros_like(move))
    for row in range(6):
        # In float64: a ball of that very length.
        longest = optimum(
            direction[row].flatten(), x[row : row + 1], Ball(float(length[row]) * (1 + 1e-5) + 1e-7, norm)
        )
        assert abs(float(gain[row].abs()) - float(longest)) <= 1e-4 * max(1.0, float(longest))


def distance_to_boundary(w: torch.Tensor, x: torch.Tensor, gap: torch.Tensor, norm: str) -> torch.Tensor:
    """The least radius at which a linear margin of that gap can be made up, by bisection on the optimum."""
    low, high = torch.zeros(len(x)), torch.full((len(x),), float(SIDE**2))
    for _ in range(40):
        middle = (low + high) / 2
        reached = (
            torch.cat([optimum(w, x[i : i + 1], Ball(float(middle[i]), norm)) for i in range(len(x))])
            >= gap.double()
        )
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    return high


@pytest.mark.parametrize("norm", NORMS)
def test_the_boundary_of_a_linear_network_is_found_from_both_sides(norm):
    net = linear(SIDE)
    x = images(3, 12, 1, SIDE, SIDE)
    with torch.no_grad():
        logits = net(x)
    y = logits.argmax(1)
    w = (net[1].weight[1] - net[1].weight[0]).detach()
    for label in (0, 1):
        some = y == label
        if not some.any():
            continue
        towards = w if label == 0 else -w
        gap = (logits[some, label] - logits[some, 1 - label]).clamp_min(0)
        far = distance_to_boundary(towards, x[some], gap, norm)
        for number, radius in enumerate(far.tolist()):
            one, its = x[some][number : number + 1], y[some][number : number + 1]
            for factor, broken in ((1.01, True), (0.99, False)):
                x_adv = fab_targeted(net, one, its, Ball(radius * factor, norm), steps=20)
                assert bool(misclassified((net(x_adv),), its)) is broken


def test_the_judge_never_still_leads_to_the_boundary():
    net, x, y = linear(SIDE), images(3, 6, 1, SIDE, SIDE), torch.zeros(6, dtype=torch.long)
    y = net(x).argmax(1)
    whole = Ball(1.0)
    x_adv = fab_targeted(net, x, y, whole, judge=never, steps=10)
    assert misclassified((net(x_adv),), y).all()
    assert (whole.distance(x_adv, x) < 0.5).all()
    # In a ball too small for any boundary it goes as far as it may towards it.
    small = Ball(1e-4)
    x_adv = fab_targeted(net, x, y, small, steps=10)
    assert small.contains(x_adv, x).all()
    assert (small.distance(x_adv, x) > 0.9e-4).all()


def test_exits_are_approached_as_they_answer():
    torch.manual_seed(0)
    stages = [nn.Identity(), nn.Identity()]
    heads = [nn.Sequential(nn.Flatten(), nn.Linear(16, 3)) for _ in stages]
    net = MultiExit(stages, heads, Policy("entropy", [0.9])).eval()
    x = images(0, 30, 1, 4, 4)
    assert net.policy is not None
    y = net.adaptive(x).label
    policy = net.policy
    aims = {
        policy.misclassified: deployed(policy, targeted_margin),
        single(0, misclassified): single(0, targeted_margin),
    }
    for judge, objective in aims.items():
        right = ~judge(net(x), y)
        x_adv = fab_targeted(net, x, y, Ball(0.4), objective=objective, judge=judge)
        assert right.sum() > 5
        assert judge(net(x_adv), y)[right].double().mean() > 0.5
    found = run_suite(net, x, y, Ball(0.1), judge=net.policy.misclassified, answer=net.adaptive)
    assert list(found.broken_last) == list(found.broken)
