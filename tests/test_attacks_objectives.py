"""Objectives: the losses of AutoAttack, forms over exits, and slowdown."""

import math

import pytest
import torch
from torch import nn

from attacked import TwoExits, generator, images, linear
from swiftsure.attacks import (
    GradientReport,
    above_thresholds,
    apgd,
    average,
    cross_entropy,
    deepsloth,
    delayed,
    dlr,
    margin,
    max_average,
    misclassified,
    never,
    one_by_one,
    pgd,
    random_mix,
    single,
    targeted_dlr,
    targeted_margin,
    weighted,
)
from swiftsure.attacks.gates import log_entropy
from swiftsure.ball import Ball
from swiftsure.errors import InputError
from swiftsure.exits import Policy

Z = torch.tensor([[2.0, -1.0, 0.5, 1.0, -3.0], [0.0, 3.0, 1.0, 2.0, 2.5]])
Y = torch.tensor([0, 0])


def test_dlr_by_hand():
    """Row 1: z sorted is 2, 1, .5, -1; row 2: 3, 2.5, 2, 1."""
    torch.testing.assert_close(dlr((Z,), Y), torch.tensor([-1 / 1.5, 3.0]))
    target = torch.tensor([3, 4])
    torch.testing.assert_close(targeted_margin((Z,), Y, target), torch.tensor([-1.0, 2.5]))
    torch.testing.assert_close(targeted_dlr((Z,), Y, target), torch.tensor([-1 / 2.25, 2.5 / 1.5]))


@pytest.mark.parametrize("classes", [2, 3, 4, 5])
def test_losses_of_few_classes(classes):
    z = Z[:, :classes].clone().requires_grad_()
    target = torch.tensor([1, 1])
    if classes == 2:
        torch.testing.assert_close(dlr((z,), Y), margin((z,), Y))
    else:
        torch.testing.assert_close(dlr((7 * z + 3,), Y), dlr((z,), Y))
    if classes < 4:
        torch.testing.assert_close(targeted_dlr((z,), Y, target), targeted_margin((z,), Y, target))
    else:
        torch.testing.assert_close(targeted_dlr((7 * z + 3,), Y, target), targeted_dlr((z,), Y, target))
    for loss in (dlr((z,), Y), targeted_dlr((z,), Y, target)):
        (grad,) = torch.autograd.grad(loss.sum(), z)
        assert grad.isfinite().all()
        assert (
            grad[0] != 0
        ).any()  # of three classes, the second row's true one is last: nothing is left to do


@pytest.mark.parametrize("value", [0.0, 1e-30, -5.0, 1e8])
def test_dlr_of_equal_logits_is_a_number(value):
    z = torch.full((2, 4), value, requires_grad=True)
    for loss in (dlr((z,), Y), targeted_dlr((z,), Y, torch.tensor([1, 2]))):
        assert (loss == 0).all()
        (grad,) = torch.autograd.grad(loss.sum(), z)
        assert grad.isfinite().all()


def test_forms_over_exits():
    logits = (Z, Z.flip(1), 2 * Z)
    parts = torch.stack([cross_entropy((z,), Y) for z in logits])
    torch.testing.assert_close(average()(logits, Y), parts.mean(0))
    torch.testing.assert_close(single(1)(logits, Y), parts[1])
    torch.testing.assert_close(weighted([0.5, 0.0, -2.0])(logits, Y), 0.5 * parts[0] - 2 * parts[2])
    target = torch.tensor([1, 2])
    torch.testing.assert_close(
        single(0, targeted_margin)(logits, Y, target), targeted_margin((Z,), Y, target)
    )
    first, again, other = (random_mix(3, generator(seed), margin)(logits, Y) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    ones = random_mix(3, generator(2), lambda logits, y: torch.ones(2))(logits, Y)
    torch.testing.assert_close(ones, torch.ones(2))
    shares = torch.stack(
        [random_mix(2, generator(i), lambda z, y: z[0][:, 0])((Z, 0 * Z), Y)[0] / 2 for i in range(400)]
    )
    assert shares.min() < 0.05
    assert shares.max() > 0.95
    assert shares.mean() == pytest.approx(0.5, abs=0.05)
    with pytest.raises(InputError, match="2 weights of exits for 3 exits"):
        weighted([1.0, 1.0])(logits, Y)
    with pytest.raises(InputError, match="exits is 0"):
        random_mix(0)


def test_max_average_keeps_what_harms_all_exits_most():
    net, x, y, ball = TwoExits(), images(0, 12, 1, 4, 4), torch.arange(12) % 3, Ball(0.2)
    options = {"steps": 5, "random_start": False}
    singles = [pgd(net, x, y, ball, objective=single(i), judge=never, **options) for i in (0, 1)]
    sums = torch.stack([average()(net(x_adv), y) for x_adv in singles])
    wanted = torch.where((sums[1] > sums[0]).view(-1, 1, 1, 1), singles[1], singles[0])
    assert 0 < (sums[1] > sums[0]).sum() < 12
    assert torch.equal(max_average(net, x, y, ball, **options), wanted)
    # With a judge, what is broken comes first, whatever the sums.
    broken = [misclassified(net(x_adv), y) for x_adv in singles]
    found = max_average(net, x, y, ball, judge=misclassified, **options)
    assert torch.equal(misclassified(net(found), y), broken[0] | broken[1])
    # One exit: the inner attack itself.
    plain, right = linear(4, 3), torch.zeros(12, dtype=torch.long)
    assert torch.equal(
        max_average(plain, x, right, ball, attack=apgd, steps=5, random_start=False),
        apgd(plain, x, right, ball, judge=never, steps=5, random_start=False),
    )


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e3, 1e6])
def test_log_entropy(scale):
    z = (torch.randn(200, 6, generator=generator()) * scale).requires_grad_()
    p = z.detach().double().log_softmax(1)
    exact = -(p.exp() * p).sum(1)
    seen = exact > 1e-12  # below, float64 too has no digits left of ln p_top
    torch.testing.assert_close(log_entropy(z)[seen].double(), exact[seen].log(), rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(log_entropy(z).sum(), z)
    assert grad.isfinite().all()
    assert (grad != 0).any(1).all()
    assert grad.sum(1).abs().max() < 1e-3


def test_log_entropy_of_two_classes_far_apart():
    """H is about a e^-a at log-odds a."""
    a = torch.tensor([50.0, 500.0, 5e4])
    value = log_entropy(torch.stack([a, torch.zeros(3)], 1))
    torch.testing.assert_close(value, (a + 1).log() - a)


def test_slowdown_losses_by_hand():
    logits = (Z, 3 * Z, Z)
    uniform = torch.full((2, 5), 0.2)
    wanted = sum(torch.nn.functional.cross_entropy(z, uniform, reduction="none") for z in logits[:2])
    torch.testing.assert_close(deepsloth(logits, Y), -wanted)
    entropies = [torch.distributions.Categorical(logits=z).entropy() for z in logits]
    thresholds = [entropies[0][0].item() * 2, entropies[1].min().item() * 0.5]
    policy = Policy("entropy", thresholds)
    loss = above_thresholds(policy, slack=0.1)(logits, Y)
    # The second exit is silent by more than the slack; the first is at half its threshold on row 1.
    wanted = (entropies[0] / thresholds[0]).log().clamp_max(0.1) + 0.1
    torch.testing.assert_close(loss, wanted)
    assert delayed(policy)(logits, Y).tolist() == [False, bool(entropies[0][1] >= thresholds[0])]
    assert (deepsloth((Z,), Y) == 0).all()
    one, closed = Policy("entropy", []), Policy("entropy", [0.0, 0.0])
    for objective in (above_thresholds, one_by_one):
        assert (objective(one)((Z,), Y) == 0).all()
        # A threshold of 0 never fires, so there is nothing to push: all that can be had is had.
        z = tuple(one.clone().requires_grad_() for one in logits)
        total = objective(closed)(z, Y)
        assert not total.requires_grad
        assert (total[0] == total).all()
    assert delayed(one)((Z,), Y).all()
    assert delayed(closed)(logits, Y).all()


@pytest.mark.parametrize(
    ("rule", "thresholds"), [("entropy", [0.9, 0.7, 0.4]), ("confidence", [0.5, 0.6, 0.8])]
)
def test_one_by_one_grows_with_the_exit(rule, thresholds):
    """Whatever the logits: a sample that leaves later has the larger value, and a gradient at the exit it leaves by."""
    policy = Policy(rule, thresholds)
    logits = tuple(
        (torch.randn(400, 5, generator=generator(seed)) * 1.5).requires_grad_() for seed in range(4)
    )
    value, exit = one_by_one(policy, slack=1e-3)(logits, torch.zeros(400)), policy.exit_of(logits)
    assert exit.bincount(minlength=4).min() >= 10
    for number in range(3):
        assert value[exit == number].max() < value[exit == number + 1].min() + 4e-3
    grads = torch.autograd.grad(value.sum(), logits[:3])
    for number, grad in enumerate(grads):
        assert (grad[exit == number] != 0).any(1).all()
        assert (grad[exit < number] == 0).all()


@pytest.mark.parametrize(("scale", "threshold"), [(8.0, 1.0), (800.0, 1e-3)])
@pytest.mark.parametrize("kind", ["deepsloth", "above_thresholds", "one_by_one"])
def test_slowdown_silences_a_side_exit(kind, scale, threshold):
    """Also one that is so sure that its entropy, and so the entropy's gradient, is 0 in float32."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = TwoExits()

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            early, late = self.net(x)
            return scale * early, late

    net, x, y = Scaled(), images(0, 30, 1, 4, 4), torch.zeros(30, dtype=torch.long)
    policy = Policy("entropy", [threshold])
    objectives = {
        "deepsloth": deepsloth,
        "above_thresholds": above_thresholds(policy),
        "one_by_one": one_by_one(policy),
    }
    objective, judge, report = objectives[kind], delayed(policy), GradientReport()
    before = judge(net(x), y)
    x_adv = apgd(
        net, x, y, Ball(0.25), objective=objective, judge=judge, generator=generator(), report=report
    )
    after = judge(net(x_adv), y)
    assert before.sum() < 10
    assert after.sum() > before.sum() + 15
    # Blind only where there was nothing left to do.
    assert report.zero <= after.sum()
    assert report.nonfinite == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: above_thresholds(Policy("entropy", [0.5]), slack=0), "slack is 0"),
        (lambda: one_by_one(Policy("entropy", [0.5]), slack=math.nan), "slack is nan"),
        (lambda: above_thresholds(Policy("entropy", [0.5]))((Z, Z, Z), Y), "1 thresholds for 3 exits"),
        (lambda: one_by_one(Policy("entropy", [0.5]))((Z, Z, Z), Y), "1 thresholds for 3 exits"),
        (lambda: delayed(Policy("entropy", [0.5, 0.5]))((Z, Z), Y), "2 thresholds for 2 exits"),
    ],
)
def test_bad_thresholds(call, message):
    with pytest.raises(InputError, match=message):
        call()
