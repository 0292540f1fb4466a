"""fgsm and pgd: analytic optima of linear networks, what they leave untouched, and what they never do."""

import math
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from attacked import NORMS, Counted, TwoExits, conv_net, generator, images, linear, optimum
from swiftsure.attacks import (
    GradientReport,
    Replayed,
    average,
    cross_entropy,
    fgsm,
    input_gradient,
    margin,
    max_average,
    misclassified,
    never,
    pgd,
    single,
)
from swiftsure.ball import Ball
from swiftsure.errors import InputError
from swiftsure.modes import evaluating


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [0.02, 0.2, 0.6])
@pytest.mark.parametrize("clipped", [False, True])
def test_linear_optimum(norm, size, clipped):
    """size is a share of the norm of an image of ones."""
    side = 14
    net = linear(side)
    w = (net[1].weight[1] - net[1].weight[0]).detach()
    eps = size * {"inf": 1, "2": side, "1": side**2}[norm]
    x = images(3, 8, 1, side, side)
    ball = Ball(eps, norm) if clipped else Ball(eps, norm, low=-1e4, high=1e4)
    y = torch.zeros(8, dtype=torch.long)
    best = optimum(w, x, ball)
    if not clipped:
        dual = {"inf": w.abs().sum(), "2": w.norm(), "1": w.abs().max()}[norm]
        torch.testing.assert_close(best, torch.full((8,), eps * dual.item()).double(), rtol=1e-5, atol=0)
    for x_adv, tolerance in (
        (fgsm(net, x, y, ball), 1e-3),
        (pgd(net, x, y, ball, objective=margin, judge=never, generator=generator()), 0.01),
        (pgd(net, x, y, ball, judge=never, random_start=False), 0.01),
    ):
        gain = ((x_adv - x).flatten(1) @ w).double()
        assert (gain >= (1 - tolerance) * best).all()
        assert (gain <= (1 + 1e-4) * best).all()


@given(
    st.integers(0, 10**6),
    st.sampled_from(NORMS),
    st.one_of(st.floats(0, 1e-3), st.floats(1e-3, 20)),
    st.integers(1, 4),
    st.sampled_from([None, 1e-3, 5.0]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_always_inside(seed, norm, eps, steps, step_size, random_start):
    net, ball = conv_net(seed=seed), Ball(eps, norm)
    x, y = images(seed, 5, 1, 8, 8), torch.randint(0, 3, (5,), generator=generator(seed))
    options = {"steps": steps, "step_size": step_size, "random_start": random_start, "restarts": 1 + seed % 2}
    for x_adv in (fgsm(net, x, y, ball), pgd(net, x, y, ball, generator=generator(seed), **options)):
        assert ball.contains(x_adv, x).all()
        assert x_adv.shape == x.shape
        assert x_adv.dtype == x.dtype
        assert not x_adv.requires_grad


@pytest.mark.parametrize("norm", NORMS)
def test_deterministic_by_generator(norm):
    net, x, y, ball = conv_net(), images(0, 6, 1, 8, 8), torch.arange(6) % 3, Ball(0.3, norm)
    options = {"steps": 3, "restarts": 3, "step_size": 0.02}
    torch.manual_seed(0)
    first = pgd(net, x, y, ball, **options, generator=generator(7))
    torch.manual_seed(1)
    assert torch.equal(first, pgd(net, x, y, ball, **options, generator=generator(7)))
    assert not torch.equal(first, pgd(net, x, y, ball, **options, generator=generator(8)))


def test_leaves_the_network_as_found():
    net, x, y, ball = conv_net(), images(0, 6, 1, 8, 8), torch.arange(6) % 3, Ball(0.1)
    F.cross_entropy(net(x), y).backward()
    modes = [module.training for module in net.modules()]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    grads = [parameter.grad.clone() for parameter in net.parameters()]
    assert any(modes)
    assert not all(modes)
    pgd(net, x, y, ball, steps=2, restarts=2)
    fgsm(net, x, y, ball)
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(torch.equal(p.grad, grad) for p, grad in zip(net.parameters(), grads, strict=True))
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_modes_come_back_after_an_exception():
    net = conv_net()
    modes = [module.training for module in net.modules()]

    def broken(logits, y):
        assert not any(module.training for module in net.modules())
        raise ArithmeticError

    for attack in (fgsm, pgd):
        with pytest.raises(ArithmeticError):
            attack(net, images(0, 2, 1, 8, 8), torch.zeros(2, dtype=torch.long), Ball(0.1), objective=broken)
        assert [module.training for module in net.modules()] == modes


def test_evaluating_does_not_call_a_networks_own_train():
    class Stubborn(nn.Linear):
        def train(self, mode: bool = True) -> nn.Module:
            raise AssertionError("train() was called")

    net = nn.Sequential(Stubborn(2, 2))
    with evaluating(net):
        assert not net[0].training
    assert net[0].training


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(context):
    net, ball = conv_net(), Ball(0.1)
    x, y = images(0, 6, 1, 8, 8), torch.arange(6) % 3
    wanted = pgd(net, x, y, ball, steps=3, generator=generator())
    with context():
        got = pgd(net, x.clone(), y.clone(), ball, steps=3, generator=generator())
        assert not torch.is_grad_enabled()
        torch.testing.assert_close(fgsm(net, x.clone(), y, ball), fgsm(net, x, y, ball))
    assert torch.equal(got, wanted)


def test_broken_samples_drop_out():
    """Logits (bias, mean pixel): in a ball of .1 the images at .5 stay below .7, those at .65 pass it."""
    net = linear(4)
    net[1].weight.data = torch.tensor([[0.0], [1 / 16]]).expand(2, 16).clone()
    net[1].bias.data = torch.tensor([0.7, 0.0])
    x, y = torch.full((6, 1, 4, 4), 0.5), torch.zeros(6, dtype=torch.long)
    x[3:] = 0.65
    counted = Counted(net)
    options = {"steps": 4, "step_size": 0.04, "random_start": False, "generator": generator()}
    x_adv = pgd(counted, x, y, Ball(0.1), restarts=3, **options)
    assert misclassified((net(x_adv),), y).tolist() == [False] * 3 + [True] * 3
    # Four gradient steps and one verdict per restart; half of the samples are done after two steps of the first.
    assert counted.seen == [6] * 3 + [3] * 12
    torch.testing.assert_close(
        x_adv[3:], torch.full_like(x[3:], 0.73), msg="the first broken point, not a later one"
    )
    torch.testing.assert_close(x_adv[:3], torch.full_like(x[3:], 0.6))
    # The judge `never` runs all to the end.
    counted.seen.clear()
    x_adv = pgd(counted, x, y, Ball(0.1), judge=never, **options)
    assert counted.seen == [6] * 4
    torch.testing.assert_close(x_adv[3:], torch.full_like(x[3:], 0.75))


def test_restarts_keep_the_worst():
    """Uneven slopes: where a run ends depends on its start, so a maximum over runs can be told from a last run."""

    class Wavy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            z = (torch.sin(40 * x) * torch.linspace(0.5, 1, 16).view(4, 4)).flatten(1).sum(1)
            return torch.stack([torch.full_like(z, 100.0), z], 1)

    net, ball = Wavy(), Ball(0.4)
    x, y = images(0, 8, 1, 4, 4), torch.zeros(8, dtype=torch.long)
    shared = generator(5)
    runs = [
        pgd(net, x, y, ball, objective=margin, steps=5, step_size=0.01, generator=shared) for _ in range(4)
    ]
    losses = torch.stack([margin((net(run),), y) for run in runs])
    kept = pgd(net, x, y, ball, objective=margin, steps=5, step_size=0.01, restarts=4, generator=generator(5))
    torch.testing.assert_close(margin((net(kept),), y), losses.amax(0))
    assert (losses.argmax(0) < 3).any()


def test_a_broken_sample_beats_a_larger_loss():
    """The objective pulls away from what the judge looks for; the one broken start must be kept all the same."""

    class Value(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([x.flatten(1).sum(1), torch.full((len(x),), 0.5)], 1)

    x, y = torch.full((40, 1, 1, 1), 0.5), torch.zeros(40, dtype=torch.long)
    options = {"objective": lambda logits, y: logits[-1][:, 0], "steps": 0}
    once = misclassified((Value()(pgd(Value(), x, y, Ball(0.1), generator=generator(), **options)),), y)
    many = pgd(Value(), x, y, Ball(0.1), generator=generator(), restarts=12, **options)
    assert 5 < once.sum() < 35
    assert misclassified((Value()(many),), y).all()


def test_first_start():
    net, x, y = linear(4), images(0, 3, 1, 4, 4), torch.zeros(3, dtype=torch.long)
    assert torch.equal(pgd(net, x, y, Ball(0.1), steps=0, random_start=False), x)
    assert not torch.equal(pgd(net, x, y, Ball(0.1), steps=0), x)
    right = net(x).argmax(1)
    later = pgd(net, x, right, Ball(0.1), steps=0, random_start=False, restarts=9, generator=generator())
    assert not torch.equal(later, x)
    assert torch.equal(pgd(net, x, y, Ball(0)), x)
    assert torch.equal(fgsm(net, x, y, Ball(0, "1")), x)
    assert pgd(net, x[:0], y[:0], Ball(0.1)).shape == (0, 1, 4, 4)


class Kinked(nn.Module):
    """Row 0: no gradient. Row 1: NaN. Row 2: NaN in its first pixel. Others: a plain sum."""

    config: ClassVar = {"classes": 2}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(1)
        factor = torch.ones_like(flat)
        factor[0], factor[1], factor[2, 0] = 0.0, math.nan, math.nan
        z = (flat * factor).sum(1)
        return torch.stack([torch.zeros_like(z), z], 1)


@pytest.mark.parametrize("norm", NORMS)
def test_useless_gradients_are_counted_and_harmless(norm):
    x, y, ball = images(0, 5, 1, 4, 4), torch.zeros(5, dtype=torch.long), Ball(0.3, norm)

    def first_pixel_nan(logits, y):
        return logits[-1][:, 1]

    report = GradientReport()
    x_adv = pgd(
        Kinked(), x, y, ball,
        objective=first_pixel_nan, judge=never, steps=4, random_start=False, report=report,
    )  # fmt: skip
    assert (report.samples, report.zero, report.nonfinite) == (20, 4, 8)
    assert (report.zero_share, report.nonfinite_share) == (0.2, 0.4)
    torch.testing.assert_close(x_adv[:2], x[:2], rtol=0, atol=1e-6)
    assert ball.contains(x_adv, x).all()
    assert (x_adv - x)[2].abs().sum() > 0.2
    fgsm(Kinked(), x, y, ball, objective=first_pixel_nan, report=report)
    assert (report.samples, report.zero, report.nonfinite) == (25, 5, 10)
    assert GradientReport().zero_share == 0


def test_a_network_without_gradients_is_counted_not_crashed():
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.one_hot((x.flatten(1).sum(1) > 8).long(), 2) * self.weight

    for net in (Gate(), Gate().requires_grad_(False)):
        report = GradientReport()
        x, y = images(0, 3, 1, 4, 4), torch.zeros(3, dtype=torch.long)
        x_adv = pgd(net, x, y, Ball(0.1), judge=never, steps=2, report=report)
        assert report.zero == report.samples == 6
        assert x_adv.isfinite().all()


@pytest.mark.parametrize("classes", [2, 3])
def test_objectives_by_hand(classes):
    z = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0]])[:, :classes]
    y = torch.tensor([0, 0])
    torch.testing.assert_close(cross_entropy((z * 9, z), y), -z.log_softmax(1)[:, 0])
    wanted = torch.tensor([-3.0, 3.0] if classes == 2 else [-1.5, 3.0])
    torch.testing.assert_close(margin((z,), y), wanted)
    assert misclassified((z,), y).tolist() == [False, True]
    assert misclassified((z * math.nan,), y).all()
    other = z.flip(1)
    torch.testing.assert_close(single(0, margin)((z, other), y), margin((z,), y))
    torch.testing.assert_close(average(margin)((z, other), y), (margin((z,), y) + margin((other,), y)) / 2)
    torch.testing.assert_close(average()((z,), y), cross_entropy((z,), y))


def test_exits_are_attacked_one_by_one_or_together():
    net, x, y, ball = TwoExits(), images(0, 12, 1, 4, 4), torch.arange(12) % 3, Ball(0.2)
    aims = {"main": cross_entropy, "first": single(0), "last": single(-1), "average": average()}
    found = {
        aim: pgd(net, x, y, ball, objective=loss, judge=never, generator=generator())
        for aim, loss in aims.items()
    }
    loss = {aim: [single(i)(net(x_adv), y).sum().item() for i in (0, 1)] for aim, x_adv in found.items()}
    assert torch.equal(found["main"], found["last"])
    assert loss["first"][0] > loss["average"][0] > loss["main"][0]
    assert loss["main"][1] > loss["average"][1] > loss["first"][1]
    kept = pgd(net, x, y, ball, objective=single(0), judge=single(0, misclassified), restarts=2)
    assert ball.contains(kept, x).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": -1}, "steps is -1"),
        ({"steps": 1.5}, "steps is 1.5"),
        ({"restarts": 0}, "restarts is 0"),
        ({"step_size": 0.0}, "step_size is 0.0"),
        ({"step_size": math.nan}, "step_size is nan"),
        ({"x": torch.full((2, 1, 4, 4), math.nan)}, "NaN"),
        ({"x": torch.full((2, 1, 4, 4), 3.0)}, "pixels range"),
        ({"y": torch.tensor([0])}, "labels"),
        ({"y": torch.tensor([0, 7])}, "label 1 is 7"),
        ({"ball": Ball(0.1, low=0.2, high=0.8)}, "leave the ball's range"),
    ],
)
def test_bad_input_is_one_line(change, message):
    net = linear(4)
    net.config = {"classes": 2, "input_shape": [1, 4, 4]}
    given = {"x": torch.zeros(2, 1, 4, 4), "y": torch.tensor([0, 1]), "ball": Ball(0.1)} | change
    with pytest.raises(InputError, match=message) as error:
        pgd(net, **given)
    assert "\n" not in str(error.value)


def test_gradients_may_be_taken_another_way():
    net, x, y, ball = TwoExits(), images(0, 8, 1, 4, 4), torch.arange(8) % 3, Ball(0.2)
    asked = []

    def backwards(net, x, y, objective):
        asked.append(len(x))
        return -input_gradient(net, x, y, objective)

    down = max_average(net, x, y, ball, steps=4, random_start=False, gradient=backwards)
    assert asked == [8] * 8
    plain, recorded = (
        max_average(net, x, y, ball, steps=4, random_start=False, **how)
        for how in ({}, {"gradient": Replayed()})
    )
    assert torch.equal(plain, recorded), "off the GPU nothing is recorded"
    losses = [average()(net(image), y) for image in (down, x, plain)]
    assert (losses[0] < losses[1]).all() and (losses[1] < losses[2]).all()


def test_no_parameter_gradient_is_computed():
    """A hook on the weight fires exactly when autograd computes its gradient."""
    net, fired = linear(4), []
    net[1].weight.register_hook(fired.append)
    pgd(net, images(0, 2, 1, 4, 4), torch.zeros(2, dtype=torch.long), Ball(0.1), steps=2)
    assert fired == []


def test_fgsm_has_the_signature_of_all():
    torch.manual_seed(0)
    net, x, y = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), torch.rand(20, 1, 4, 4), torch.arange(20) % 3
    with torch.no_grad():
        wrong = net(x).argmax(1) != y
    every = fgsm(net, x, y, Ball(0.1))
    x_adv = fgsm(net, x, y, Ball(0.1), judge=misclassified, steps=1, restarts=3, generator=generator(0))
    assert wrong.any()
    assert torch.equal(x_adv[wrong], x[wrong])
    assert torch.equal(x_adv[~wrong], every[~wrong])
    with pytest.raises(InputError, match="steps is 2; fgsm takes 1, pgd any number"):
        fgsm(net, x, y, Ball(0.1), steps=2)
    with pytest.raises(InputError, match="restarts is 0; allowed: an integer >= 1"):
        fgsm(net, x, y, Ball(0.1), restarts=0)


def test_networks_that_cannot_take_the_images_and_balls_that_are_none():
    net, y = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), torch.zeros(2, dtype=torch.long)
    with pytest.raises(
        InputError, match=r"the network cannot take images of shape \(1, 5, 5\) and dtype float32"
    ):
        pgd(net, torch.rand(2, 1, 5, 5), y, Ball(0.1))
    with pytest.raises(InputError, match="and dtype float64"):
        pgd(net, torch.rand(2, 1, 4, 4).double(), y, Ball(0.1))
    with pytest.raises(InputError, match=r"the ball is 0\.1; allowed: a swiftsure\.Ball"):
        pgd(net, torch.rand(2, 1, 4, 4), y, 0.1)
