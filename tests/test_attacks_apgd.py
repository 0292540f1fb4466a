"""apgd: its schedule, what it keeps, its losses, its targets; square: its windows, its budget, its queries."""

import math

import pytest
import torch
from torch import nn

from attacked import NORMS, Counted, generator, images, linear
from swiftsure.attacks import (
    GradientReport,
    apgd,
    apgd_targeted,
    cross_entropy,
    dlr,
    interval_attack,
    margin,
    misclassified,
    never,
    pgd,
    square,
    targeted_margin,
)
from swiftsure.attacks._square import Draw, bump, learned, mosaic, move_budget, set_window, stripes, uphill
from swiftsure.attacks._steps import checkpoints
from swiftsure.ball import Ball


class Wavy(nn.Module):
    """Many small hills: where a climb ends depends on where it starts and how it steps."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        slopes = torch.linspace(0.5, 1, x[0].numel()).view(x.shape[1:])
        z = (torch.sin(40 * x) * slopes).flatten(1).sum(1)
        return torch.stack([torch.full_like(z, 100.0), z], 1)


class Remembering(nn.Module):
    """Keeps the largest margin that each sample has ever had."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.best = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.net(x)
        value = margin((logits.detach(),), torch.zeros(len(x), dtype=torch.long))
        self.best = value if self.best is None else torch.maximum(self.best, value)
        return logits


def test_checkpoints_of_the_paper():
    """Croce and Hein 2020: p = 0.22, 0.41, 0.57, 0.70, 0.80, 0.87, 0.93, 0.99."""
    assert sorted(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(0) == {0}
    assert max(checkpoints(7)) <= 7


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", [apgd, square])
def test_the_best_point_is_kept(attack, norm):
    ball = Ball({"inf": 0.3, "2": 0.8, "1": 2.0}[norm], norm)
    x, y, net = images(0, 8, 1, 4, 4), torch.zeros(8, dtype=torch.long), Remembering(Wavy())
    x_adv = attack(
        net, x, y, ball, objective=margin, judge=never, steps=30, restarts=3, generator=generator()
    )
    if norm == "1" and attack is apgd:
        # It begins in wider balls, whose points do not count.
        assert (margin((Wavy()(x_adv),), y) > margin((Wavy()(x),), y)).all()
    else:
        torch.testing.assert_close(margin((Wavy()(x_adv),), y), net.best)


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_steps_halve(norm):
    """The top of a bowl, inside the ball: steps of 2 eps come no nearer than eps; halved eight times, they do."""
    goal = images(1, 1, 1, 3, 3) * 0.2 + 0.4

    def bowl(logits, y):
        return -(logits[-1] - goal.flatten()).square().sum(1)

    net, x, ball = nn.Flatten(), torch.full((4, 1, 3, 3), 0.5), Ball({"inf": 0.2, "2": 0.6}[norm], norm)
    assert ball.contains(goal.expand(4, -1, -1, -1), x).all()
    y = torch.zeros(4, dtype=torch.long)
    x_adv = apgd(net, x, y, ball, objective=bowl, judge=never, generator=generator())
    assert ((x_adv - goal).abs() < 0.05 * ball.radius).all()
    plain = pgd(net, x, y, ball, objective=bowl, step_size=2 * ball.radius, generator=generator())
    assert ((plain - goal).abs().amax((1, 2, 3)) > 0.2 * ball.radius).all()


def test_scaled_logits_blind_cross_entropy_but_not_dlr():
    net = linear(4, 3)
    x = images(0, 12, 1, 4, 4)
    with torch.no_grad():
        y = net(x).argmax(1)
    net[1].weight.data *= 1e6
    net[1].bias.data *= 1e6
    blind, report = GradientReport(), GradientReport()
    ball = Ball(0.6)
    missed = apgd(net, x, y, ball, objective=cross_entropy, report=blind, random_start=False)
    broken = apgd(net, x, y, ball, objective=dlr, report=report, random_start=False)
    assert blind.zero_share > 0.5
    assert report.zero_share == 0
    assert misclassified((net(broken),), y).all()
    assert not misclassified((net(missed),), y).all()


def test_targets_go_from_the_likeliest_class_on():
    net = linear(4, 5)
    x = images(0, 6, 1, 4, 4)
    with torch.no_grad():
        clean = net(x)
    y, ranked = clean.argmax(1), clean.argsort(1, descending=True)[:, 1:]
    for targets in (1, 3, 9):
        seen = []

        def recorded(logits, y, target, seen=seen):
            seen.append(target)
            return targeted_margin(logits, y, target)

        apgd_targeted(net, x, y, Ball(1e-3), objective=recorded, targets=targets, steps=2, restarts=2)
        # Three looks for two steps, two restarts of all targets.
        wanted = [ranked[:, i] for i in range(min(targets, 4))] * 2
        assert len(seen) == 3 * len(wanted)
        assert all(torch.equal(a, b) for a, b in zip(seen[::3], wanted, strict=True))


def test_a_far_class_is_found_only_by_aiming_at_it():
    """Class 1 is the likeliest wrong one and out of reach; class 2 is far behind, but steep."""

    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            t = x.flatten(1).mean(1)
            other = torch.where(t > 0.5, 40 * (t - 0.5), 3 * (t - 0.5))
            zero = torch.zeros_like(t)
            return torch.stack([zero + 1, 0.9 - 0.1 * (t - 0.5), other - 2, zero - 9, zero - 9], 1)

    x, y = torch.full((3, 1, 2, 2), 0.45), torch.zeros(3, dtype=torch.long)
    options = {"generator": generator(), "random_start": False}
    untargeted = apgd(Two(), x, y, Ball(0.2), objective=dlr, **options)
    assert not misclassified((Two()(untargeted),), y).any()
    x_adv = apgd_targeted(Two(), x, y, Ball(0.2), targets=2, **options)
    assert misclassified((Two()(x_adv),), y).all()


def test_square_asks_for_no_gradient_and_keeps_to_its_queries():
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = linear(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not torch.is_grad_enabled()
            # An answer without slope: one decimal of each logit.
            return (self.net(x) * 10).round() / 10

    net = Hidden()
    x, counted = images(0, 6, 1, 4, 4), Counted(net)
    with torch.no_grad():
        y = net(x).argmax(1)
    report = GradientReport()
    square(counted, x, y, Ball(0.3), steps=40, restarts=2, judge=never, report=report)
    assert counted.seen == [6] * 82
    assert report.samples == 0
    x_adv = square(net, x, y, Ball(0.6), steps=300, generator=generator())
    with torch.no_grad():
        assert misclassified((net(x_adv),), y).sum() >= 5


def test_windows_lie_anywhere_inside():
    draw = Draw(generator(), torch.zeros(1))
    for side, height, width in ((1, 3, 4), (2, 3, 4), (3, 3, 4)):
        windows = draw.windows(400, side, height, width)
        assert windows.shape == (400, side * side)
        rows, columns = windows // width, windows % width
        assert windows.min() >= 0
        assert windows.max() == height * width - 1
        assert (rows.amax(1) - rows.amin(1) == side - 1).all()
        assert (columns.amax(1) - columns.amin(1) == side - 1).all()
        assert len(windows[:, 0].unique()) == (height - side + 1) * (width - side + 1)


def test_windows_around_a_pixel_that_holds_budget():
    held = torch.zeros(400, 5, 6)
    held[:, 0, 1] = held[:, 2, 3] = 0.1
    draw = Draw(generator(), torch.zeros(1))
    chosen = [draw.window_of(held, side) for side in (1, 2, 3, 5)]
    assert chosen[0].unique().tolist() == [1, 15]
    assert chosen[1].unique(dim=0).tolist() == [[0, 1, 6, 7], [8, 9, 14, 15]]
    for windows in chosen[2:]:
        assert (held.flatten(1).gather(1, windows) > 0).any(1).all()
        assert ((windows % 6).amax(1) - (windows % 6).amin(1) == windows.shape[1] ** 0.5 - 1).all()
    # Where nobody holds anything, some window all the same.
    assert draw.window_of(torch.zeros(3, 5, 6), 2).shape == (3, 4)


def test_what_square_learns_of_the_slope():
    """Of a linear objective n independent moves tell all, and none of them is forgotten where they are orthogonal."""
    true = torch.randn(2, 1, 3, 3, generator=generator())
    slope = torch.zeros_like(true)
    for pixel in range(9):
        move = torch.zeros_like(true)
        move.flatten(1)[:, pixel] = 0.1 * (pixel + 1)
        slope = learned(slope, move, (true * move).flatten(1).sum(1))
    torch.testing.assert_close(slope, true)
    again = learned(slope, torch.ones_like(true), true.flatten(1).sum(1))
    torch.testing.assert_close(again, true)
    # A first look has no rise, a rounded network no slope: nothing moves, nothing is learned.
    for rise in (math.inf, math.nan, -math.inf):
        assert torch.equal(learned(slope, torch.ones_like(true), torch.full((2,), rise)), slope)
    assert torch.equal(learned(slope, torch.zeros_like(true), torch.ones(2)), slope)
    # A change so small that what it tells is beyond float32.
    assert torch.equal(learned(slope, torch.full_like(true, 1e-19), torch.full((2,), 1e3)), slope)
    x, draw = images(0, 40, 1, 4, 4), Draw(generator(), torch.zeros(1))
    steep = torch.randn(x.shape, generator=generator())
    for norm in ("2", "1"):
        ball = Ball(0.7, norm)
        best = ball.sample(x, generator())
        goal, tried = ball.maximiser(x, steep), uphill(x, best, steep, ball, draw)
        gained, most = ((steep * (to - best)).flatten(1).sum(1) for to in (tried, goal))
        part = gained / most
        assert ball.contains(tried, x).all()
        assert (part > 0).all()
        assert ((part - 1).abs() < 1e-4).sum() in range(5, 25)


def test_square_does_not_walk_back_where_it_has_learned_nothing():
    """A plateau everywhere: what is tried stays as far out as the start is, and is no clean image."""
    seen: list[torch.Tensor] = []

    class Flat(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return torch.tensor([[1.0, 0.0]]).expand(len(x), -1)

    x, y = torch.full((2, 1, 8, 8), 0.5), torch.zeros(2, dtype=torch.long)
    for norm, eps in (("2", 0.8), ("1", 3.0)):
        # No pixel may come to the end of its range, where budget lies idle.
        ball = Ball(eps, norm, low=-9, high=9)
        seen.clear()
        x_adv = square(Flat(), x, y, ball, steps=60, generator=generator())
        queries = [tried for tried in seen if len(tried) == 2]
        assert len(queries) >= 61
        assert all((ball.distance(tried, x) > 0.9 * eps).all() for tried in queries[-61:])
        torch.testing.assert_close(ball.distance(x_adv, x), torch.full((2,), eps), rtol=1e-2, atol=0)


def test_moves_of_the_square_attack():
    draw, x = Draw(generator(), torch.zeros(1)), torch.full((50, 3, 9, 8), 0.5)
    box = Ball(0.25)
    best = stripes(x, box, draw)
    assert ((best - x).abs() == 0.25).all()
    assert (best[:, :, :1] == best).all()
    tried = set_window(x, best, 4, False, box, draw)
    changed = (tried != best).flatten(2)
    assert ((tried - x).abs() == 0.25).all()
    assert changed.any(2).any(1).all()
    assert (changed.sum(2) <= 16).all()
    for norm in ("2", "1"):
        ball = Ball(1.5, norm, low=-9, high=9)
        best = mosaic(x, ball, draw)
        torch.testing.assert_close(ball.distance(best, x), torch.full((50,), 1.5), rtol=1e-4, atol=0)
        for fine in (False, True):
            tried = move_budget(x, best, 3, fine, ball, draw)
            # All that there is stays spent, and only two windows change.
            torch.testing.assert_close(ball.distance(tried, x), torch.full((50,), 1.5), rtol=1e-3, atol=0)
            changed = ((tried - best).abs() > 1e-6).any(1).flatten(1).sum(1)
            assert (changed <= 18).all()
            assert (changed > 0).all()


def test_budget_is_taken_from_where_it_is():
    draw, x = Draw(generator(), torch.zeros(1)), torch.full((200, 2, 12, 12), 0.5)
    best = x.clone()
    best[:, 1, 4, 7] += 0.4
    for norm in ("2", "1"):
        tried = move_budget(x, best, 3, False, Ball(0.4, norm), draw)
        assert ((tried - best).abs().flatten(1).amax(1) > 0.01).all()


def test_a_bump_is_highest_in_the_middle():
    torch.testing.assert_close(
        bump(3, 3, torch.zeros(1)),
        torch.tensor([[0.25, 0.25, 0.25], [0.25, 1.25, 0.25], [0.25, 0.25, 0.25]]),
    )
    for height, width in ((1, 1), (1, 2), (2, 5), (4, 4), (7, 7)):
        values = bump(height, width, torch.zeros(1))
        assert values.shape == (height, width)
        assert (values > 0).all()
        assert torch.equal(values, values.flip(0, 1))


def test_interval_attack_leaves_flat_ground():
    """Around x every gradient is 0: the one unit is off. Bounds of a region see where it would turn on."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flatten, self.unit, self.out = nn.Flatten(), nn.Linear(16, 1), nn.Linear(1, 2)
            self.unit.weight.data, self.unit.bias.data = torch.ones(1, 16), torch.tensor([-8.6])
            self.out.weight.data, self.out.bias.data = torch.tensor([[0.0], [9.0]]), torch.tensor([1.0, 0.0])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(torch.relu(self.unit(self.flatten(x))))

    net, x, y = Flat(), torch.full((4, 1, 4, 4), 0.5), torch.zeros(4, dtype=torch.long)
    for norm, eps in (("inf", 0.1), ("2", 0.4), ("1", 1.6)):
        ball, report = Ball(eps, norm), GradientReport()
        stuck = pgd(net, x, y, ball, random_start=False, report=report)
        assert report.zero_share == 1
        assert not misclassified((net(stuck),), y).any()
        x_adv = interval_attack(net, x, y, ball, restarts=1)
        assert misclassified((net(x_adv),), y).all()
        without = interval_attack(net, x, y, ball, restarts=1, moves=0)
        assert not misclassified((net(without),), y).any()


def test_a_network_of_one_nan_is_no_crash():
    class Nan(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.full((len(x), 3), math.nan) * x.sum()

    x, y = images(0, 3, 1, 4, 4), torch.zeros(3, dtype=torch.long)
    for attack in (apgd, apgd_targeted, square):
        for judge in (never, misclassified):
            x_adv = attack(Nan(), x, y, Ball(0.1), steps=5, judge=judge, generator=generator())
            assert Ball(0.1).contains(x_adv, x).all()
