"""Linear networks: what each inner method reaches of the analytic optimum, in each norm, with and without clipping."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from attacked import NORMS, generator, images, linear, optimum
from swiftsure.attacks import (
    apgd,
    apgd_targeted,
    dlr,
    interval_attack,
    margin,
    never,
    square,
    targeted_dlr,
    wrm_unprojected,
)
from swiftsure.ball import Ball


def share_reached(x_adv, x, weight, ball):
    """Of the optimum's gain, per image, in the worst one; never above 1."""
    share = ((x_adv - x).flatten(1) @ weight).double() / optimum(weight, x, ball)
    assert (share <= 1 + 1e-4).all()
    return share.min().item()


def ball_of(norm, size, side, clipped):
    """size is a share of the norm of an image of ones."""
    eps = size * {"inf": 1, "2": side, "1": side**2}[norm]
    return Ball(eps, norm) if clipped else Ball(eps, norm, low=-1e4, high=1e4)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [0.02, 0.2, 0.6])
@pytest.mark.parametrize("clipped", [False, True])
def test_within_one_percent(norm, size, clipped):
    side = 14
    net = linear(side)
    weight = (net[1].weight[1] - net[1].weight[0]).detach()
    x, y, ball = (
        images(3, 8, 1, side, side),
        torch.zeros(8, dtype=torch.long),
        ball_of(norm, size, side, clipped),
    )
    for attack in (
        apgd,  # cross-entropy
        partial(apgd, objective=dlr),  # the margin, as there are two classes
        partial(apgd, random_start=False, restarts=2),
        partial(apgd_targeted, objective=targeted_dlr),
        partial(interval_attack, restarts=1, objective=margin),
    ):
        x_adv = attack(net, x, y, ball, judge=never, generator=generator())
        assert share_reached(x_adv, x, weight, ball) >= 0.99


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("smooth", "clipped", "size"),
    [(False, True, 0.1), (True, False, 0.1), (False, True, 0.6), (False, False, 0.2)],
)
def test_square_at_five_thousand_queries(norm, smooth, clipped, size):
    """Weights of white noise, and smoothed over 7x7."""
    net, side = linear(28), 28
    if smooth:
        weights = net[1].weight.data.view(2, 1, side, side)
        net[1].weight.data = F.avg_pool2d(weights, 7, 1, 3).view(2, -1)
    weight = (net[1].weight[1] - net[1].weight[0]).detach()
    x, y, ball = (
        images(3, 2, 1, side, side),
        torch.zeros(2, dtype=torch.long),
        ball_of(norm, size, side, clipped),
    )
    x_adv = square(net, x, y, ball, judge=never, generator=generator())
    assert share_reached(x_adv, x, weight, ball) >= 0.85


def test_wrm_comes_to_rest_where_loss_and_cost_balance():
    """A linear objective of slope g: eps g - d is 0 at d = eps g."""
    net, eps = linear(6), 0.4
    slope = net[1].weight[1].detach()
    x = torch.full((3, 1, 6, 6), 0.5)
    found = wrm_unprojected(
        net, x, torch.zeros(3).long(), Ball(eps), objective=lambda logits, y: logits[-1][:, 1], steps=60
    )
    torch.testing.assert_close((found - x).flatten(1), (eps * slope).expand(3, -1), rtol=1e-3, atol=1e-6)
    far = wrm_unprojected(
        net, x, torch.zeros(3).long(), Ball(eps), objective=lambda logits, y: 1e3 * logits[-1][:, 1]
    )
    assert far.min() == 0
    assert far.max() == 1
    assert (far - x).abs().amax() > eps
