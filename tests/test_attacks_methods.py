"""What holds for every inner method alike, in all norms."""

import functools
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from attacked import NORMS, Counted, TwoExits, conv_net, generator, images, linear
from swiftsure import certify
from swiftsure.attacks import (
    GradientReport,
    apgd,
    apgd_targeted,
    fab_targeted,
    gate_forcing,
    interval_attack,
    margin,
    max_average,
    misclassified,
    never,
    pgd,
    run_suite,
    single,
    square,
    wrm,
)
from swiftsure.ball import Ball
from swiftsure.errors import InputError
from swiftsure.exits import MultiExit, Policy
from swiftsure.modes import evaluating
from trained import BALLS, held_out, network

METHODS = {
    "apgd": partial(apgd, steps=12),
    "apgd_targeted": partial(apgd_targeted, steps=6),
    "fab_targeted": partial(fab_targeted, steps=8, random_start=True),
    "pgd": partial(pgd, steps=4),
    "square": partial(square, steps=20),
    "wrm": partial(wrm, steps=3),
    "interval": partial(interval_attack, steps=3, restarts=2),
    "max_average": partial(max_average, steps=3),
}
ALL = pytest.mark.parametrize("attack", METHODS.values(), ids=list(METHODS))


@ALL
@given(
    st.integers(0, 10**6),
    st.sampled_from(NORMS),
    st.one_of(st.floats(0, 1e-3), st.floats(1e-3, 20)),
    st.integers(2, 5),
)
@settings(max_examples=25, deadline=None)
def test_always_inside(attack, seed, norm, eps, classes):
    net, ball = conv_net(classes, seed), Ball(eps, norm)
    x, y = images(seed, 5, 1, 8, 8), torch.randint(0, classes, (5,), generator=generator(seed))
    x_adv = attack(net, x, y, ball, generator=generator(seed), restarts=1 + seed % 2)
    assert ball.contains(x_adv, x).all()
    assert x_adv.shape == x.shape
    assert x_adv.dtype == x.dtype
    assert not x_adv.requires_grad
    if eps == 0:
        assert torch.equal(x_adv, x)


@ALL
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 9), (1, 9, 1), (3, 2, 7)])
@pytest.mark.parametrize("norm", NORMS)
def test_any_shape_and_no_image(attack, shape, norm):
    torch.manual_seed(0)
    net, ball = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 3)), Ball(0.2, norm)
    x, y = images(1, 4, *shape), torch.tensor([0, 1, 2, 0])
    x_adv = attack(net, x, y, ball, generator=generator())
    assert ball.contains(x_adv, x).all()
    assert attack(net, x[:0], y[:0], ball).shape == (0, *shape)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net, x, y: apgd_targeted(net, x, y, Ball(0.1), exit=5), "exit is 5; allowed: 0 to 1, or -1"),
        (lambda net, x, y: fab_targeted(net, x, y, Ball(0.1), exit=-3), "exit is -3; allowed: 0 to 1"),
        (lambda net, x, y: interval_attack(net, x, y, Ball(0.1), exit=5), "exit is 5; allowed: 0 to 1"),
        (lambda *_: gate_forcing(Policy("entropy", [0.5]), 7), "exit is 7; allowed: 0 to 1"),
        (lambda net, x, y: pgd(net, x, y + 3, Ball(0.1)), r"label 0 is 3; allowed: 0 to 2"),
        (lambda net, x, y: apgd(net, x, y + 3, Ball(0.1)), r"label 0 is 3; allowed: 0 to 2"),
        (lambda net, x, y: run_suite(net, x, y + 3, Ball(0.1)), r"label 0 is 3; allowed: 0 to 2"),
        (lambda net, x, y: run_suite(net, x, y, Ball(0.1), batch=2.5), "batch is 2.5; allowed: an integer"),
        (
            lambda net, x, y: run_suite(net[0], x, y, Ball(0.1)),
            r"returns \[\(1, 4, 6, 6\)\]; allowed: logits",
        ),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(call, message):
    """Of a network that does not say what it takes."""
    two = MultiExit(
        [nn.Identity(), nn.Identity()], [nn.Sequential(nn.Flatten(), nn.Linear(64, 3)) for _ in range(2)]
    )
    x, y = images(0, 3, 1, 8, 8), torch.tensor([0, 1, 2])
    net = nn.Sequential(nn.Conv2d(1, 4, 3)) if "returns" in message else two
    with pytest.raises(InputError, match=message) as error:
        call(net, x, y)
    assert "\n" not in str(error.value)


def test_a_new_head_may_have_more_classes():
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), images(0, 3, 1, 8, 8)
    with pytest.raises(InputError, match="label 2 is 4"):
        pgd(net, x, torch.tensor([0, 1, 4]), Ball(0.1))
    net[1] = nn.Linear(64, 5)
    pgd(net, x, torch.tensor([0, 1, 4]), Ball(0.1), steps=1)


@ALL
@pytest.mark.parametrize("norm", NORMS)
def test_deterministic_by_generator(attack, norm):
    net, x, y, ball = conv_net(), images(0, 6, 1, 8, 8), torch.arange(6) % 3, Ball(0.3, norm)
    attack = partial(attack, net, x, y, ball, restarts=2, judge=never)
    torch.manual_seed(0)
    first = attack(generator=generator(7))
    torch.manual_seed(1)
    assert torch.equal(first, attack(generator=generator(7)))
    if norm == "inf":  # in the others short runs may well end at one point
        assert not torch.equal(first, attack(generator=generator(8)))


@ALL
def test_leaves_the_network_as_found(attack):
    net, x, y, ball = conv_net(), images(0, 6, 1, 8, 8), torch.arange(6) % 3, Ball(0.1)
    F.cross_entropy(net(x), y).backward()
    modes = [module.training for module in net.modules()]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    grads = [parameter.grad.clone() for parameter in net.parameters()]
    x_given, y_given = x.clone(), y.clone()
    attack(net, x, y, ball, restarts=2)
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(torch.equal(p.grad, grad) for p, grad in zip(net.parameters(), grads, strict=True))
    assert torch.equal(x, x_given)
    assert torch.equal(y, y_given)

    def broken(*_):
        assert not any(module.training for module in net.modules())
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        attack(net, x, y, ball, objective=broken)
    assert [module.training for module in net.modules()] == modes
    assert torch.is_grad_enabled()


@ALL
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(attack, context):
    net, ball = conv_net(), Ball(0.1)
    x, y = images(0, 6, 1, 8, 8), torch.arange(6) % 3
    wanted = attack(net, x, y, ball, generator=generator(), restarts=2)
    with context():
        got = attack(net, x.clone(), y.clone(), ball, generator=generator(), restarts=2)
        assert not torch.is_grad_enabled()
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", [name for name in METHODS if name != "wrm"])
def test_few_classes(name, norm, classes):
    """A ball that holds every image of the range: whatever the class, some point of it is wrong."""
    net = linear(4, classes)
    net[1].weight.data *= 20
    x, ball = images(0, 9, 1, 4, 4) * 0.2 + 0.4, Ball({"inf": 1, "2": 4, "1": 16}[norm], norm)
    with torch.no_grad():
        y = net(x).argmax(1)
        options = {"steps": 300} if name == "square" else {}
        x_adv = METHODS[name](net, x, y, ball, generator=generator(), **options)
        assert misclassified((net(x_adv),), y).all()


@pytest.mark.parametrize(
    ("name", "gradients"),
    [
        # Half of the samples are broken after the first step; what was asked along with that verdict is counted.
        ("apgd", 6 * 2 + 3 * 10 + 3 * 12),
        ("apgd_targeted", 6 * 2 + 3 * 4 + 3 * 6),
        ("interval", 6 * 2 + 3 * 1 + 3 * 3 + 2 * 3 * 3),
        ("pgd", 6 * 2 + 3 * 2 + 3 * 4),
        ("wrm", 6 * 2 + 3 * 1 + 3 * 3),
        # In one step a little beyond the boundary: half are done, the others outside the ball.
        ("fab_targeted", 6 + 3 * 7 + 3 * 8),
        ("square", 0),
    ],
)
def test_broken_samples_drop_out(name, gradients):
    """Logits (bias, mean pixel): in a ball of .1 the images at .5 stay below .7, those at .65 pass it."""
    net = linear(4)
    net[1].weight.data = torch.tensor([[0.0], [1 / 16]]).expand(2, 16).clone()
    net[1].bias.data = torch.tensor([0.7, 0.0])
    x, y = torch.full((6, 1, 4, 4), 0.5), torch.zeros(6, dtype=torch.long)
    x[3:] = 0.65
    counted, report = Counted(net), GradientReport()
    options = {"restarts": 2, "generator": generator(), "report": report}
    options |= {
        "interval": {"step_size": 0.1},
        "fab_targeted": {"random_start": False},
        "pgd": {"step_size": 0.1, "random_start": False},
        "square": {"steps": 60},
        "wrm": {"objective": lambda logits, y: 1e3 * margin(logits, y)},
    }.get(name, {})
    x_adv = METHODS[name](net if name == "interval" else counted, x, y, Ball(0.1), **options)
    assert misclassified((net(x_adv),), y).tolist() == [False] * 3 + [True] * 3
    assert report.samples == gradients
    if name == "square":
        assert counted.seen[0] == 6
        assert counted.seen[-61:] == [3] * 61


class Kinked(nn.Module):
    """Row 0: no gradient. Row 1: NaN. Others: a plain sum."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factor = torch.ones_like(x.flatten(1))
        factor[0], factor[1:2] = 0.0, math.nan
        z = (x.flatten(1) * factor).sum(1)
        return torch.stack([torch.full_like(z, 50.0), z], 1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["apgd", "apgd_targeted", "wrm", "max_average"])
def test_useless_gradients_are_counted_and_harmless(name, norm):
    x, y, ball = images(0, 4, 1, 4, 4), torch.zeros(4, dtype=torch.long), Ball(0.3, norm)
    report = GradientReport()
    options = {"objective": lambda logits, *_: logits[-1][:, 1], "judge": never, "random_start": False}
    x_adv = METHODS[name](Kinked(), x, y, ball, steps=20, report=report, **options)
    assert (report.samples, report.zero, report.nonfinite) == (80, 20, 20)
    torch.testing.assert_close(x_adv[:2], x[:2], rtol=0, atol=1e-6)
    assert ball.contains(x_adv, x).all()
    assert ((x_adv - x).flatten(1).sum(1)[2:] > 0.1).all()


@functools.cache
def proven(ball: Ball) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = held_out(60).batch(slice(None))
    certified = certify(network(), x, y, ball=ball, method="crown").certified
    assert certified.sum() > 5
    return x[certified], y[certified]


@ALL
@pytest.mark.parametrize("ball", BALLS, ids=NORMS)
def test_no_certified_sample_is_broken(attack, ball):
    x, y = proven(ball)
    x_adv = attack(network(), x, y, ball, generator=generator(), restarts=2)
    with evaluating(network()), torch.no_grad():
        assert not misclassified((network()(x_adv),), y).any()


@pytest.mark.parametrize("name", ["apgd", "square", "wrm", "interval"])
def test_one_exit_of_several(name):
    """The first exit is attacked, though the bounds of "interval" read the last unless told."""
    net, x, y = TwoExits(), images(0, 12, 1, 4, 4), torch.arange(12) % 3
    options = {"exit": 0} if name == "interval" else {}
    x_adv = METHODS[name](
        net, x, y, Ball(0.2), objective=single(0, margin), judge=never, generator=generator(), **options
    )
    before, after = (margin((net(images)[0],), y) for images in (x, x_adv))
    assert (after >= before - 1e-6).all()
    assert after.mean() > before.mean() + 0.01


@ALL
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": -1}, "steps is -1"),
        ({"steps": 1.5}, "steps is 1.5"),
        ({"restarts": 0}, "restarts is 0"),
        ({"restarts": True}, "restarts is True"),
        ({"x": torch.full((2, 1, 4, 4), math.nan)}, "NaN"),
        ({"x": torch.full((2, 1, 4, 4), 3.0)}, "pixels range"),
        ({"y": torch.tensor([0])}, "labels"),
        ({"y": torch.tensor([0, 7])}, "label 1 is 7"),
        ({"ball": Ball(0.1, low=0.2, high=0.8)}, "leave the ball's range"),
    ],
)
def test_bad_input_is_one_line(attack, change, message):
    net = linear(4)
    net.config = {"classes": 2, "input_shape": [1, 4, 4]}
    given = {"x": torch.zeros(2, 1, 4, 4), "y": torch.tensor([0, 1]), "ball": Ball(0.1)} | change
    with pytest.raises(InputError, match=message) as error:
        attack(net, **given)
    assert "\n" not in str(error.value)


def test_options_of_single_methods():
    given = (linear(4), torch.zeros(2, 1, 4, 4), torch.tensor([0, 1]), Ball(0.1))
    for attack, options, message in (
        (apgd_targeted, {"targets": 0}, "targets is 0"),
        (square, {"share": 0.0}, "share is 0.0"),
        (interval_attack, {"moves": -1}, "moves is -1"),
        (interval_attack, {"step_size": -1.0}, "step_size is -1.0"),
    ):
        with pytest.raises(InputError, match=message):
            attack(*given, **options)


def test_steps_of_zero_return_the_start():
    net, x, y = linear(4), images(0, 3, 1, 4, 4), torch.zeros(3, dtype=torch.long)
    for attack in (apgd, apgd_targeted, wrm):
        assert torch.equal(attack(net, x, y, Ball(0.1), steps=0, random_start=False, judge=never), x)
    assert not torch.equal(apgd(net, x, y, Ball(0.1), steps=0, judge=never), x)
    assert pgd(net, x, y, Ball(0.1), steps=0, random_start=False).equal(x)
