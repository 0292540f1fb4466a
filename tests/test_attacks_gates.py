"""Attacks on what is deployed: the exit that answers, gates forced, transfer, and the cost."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from attacked import generator, images
from defences import BALL, Rounded, masked
from swiftsure.attacks import (
    SLOWDOWNS,
    apgd,
    attacks_for,
    cross_entropy,
    deployed,
    force_gates,
    gate_forcing,
    margin,
    run_slowdown,
    run_suite,
    square,
    targeted_margin,
)
from swiftsure.attacks.forms import transferred
from swiftsure.attacks.gates import _firing_odds, log_odds, silence
from swiftsure.ball import Ball
from swiftsure.errors import InputError
from swiftsure.exits import MultiExit, Policy, policies
from trained import held_out, network

RULES = [("entropy", [0.9, 0.7]), ("confidence", [0.5, 0.6])]


def drawn(count: int = 300, exits: int = 3, classes: int = 5) -> tuple[torch.Tensor, ...]:
    return tuple(
        (torch.randn(count, classes, generator=generator(seed)) * 2).requires_grad_() for seed in range(exits)
    )


def linear_exits(rule: str = "entropy", thresholds: tuple[float, ...] = (0.8, 0.5)) -> MultiExit:
    torch.manual_seed(2)
    heads = [nn.Sequential(nn.Flatten(), nn.Linear(16, 3)) for _ in range(3)]
    return MultiExit([nn.Identity() for _ in range(3)], heads, Policy(rule, thresholds)).eval()


@pytest.mark.parametrize(("rule", "thresholds"), RULES)
def test_deployed_is_the_loss_of_the_exit_that_answers(rule, thresholds):
    policy, logits, y = Policy(rule, thresholds), drawn(), torch.arange(300) % 5
    exit = policy.exit_of(logits)
    assert exit.bincount(minlength=3).min() > 20
    each = torch.stack([cross_entropy((z,), y) for z in logits])
    value = deployed(policy)(logits, y)
    torch.testing.assert_close(value, each[exit, torch.arange(300)])
    for number, grad in enumerate(torch.autograd.grad(value.sum(), logits)):
        assert torch.equal((grad != 0).any(1), exit == number)
    target = (y + 1) % 5
    each = torch.stack([targeted_margin((z,), y, target) for z in logits])
    torch.testing.assert_close(
        deployed(policy, targeted_margin)(logits, y, target), each[exit, torch.arange(300)]
    )
    with pytest.raises(InputError, match="2 thresholds for 2 exits"):
        deployed(policy)(logits[:2], y)


@pytest.mark.parametrize("scale", [0.01, 1.0, 40.0, 1e4])
def test_log_odds(scale):
    z = (torch.randn(50, 4, generator=generator()) * scale).requires_grad_()
    exact = z.detach().double()
    others = torch.stack([exact[:, [k for k in range(4) if k != c]].logsumexp(1) for c in range(4)], 1)
    torch.testing.assert_close(
        log_odds(z).double(), exact - others, rtol=1e-4, atol=1e-4 * max(1, scale / 100)
    )
    (grad,) = torch.autograd.grad(log_odds(z).sum(), z)
    assert grad.isfinite().all()


@pytest.mark.parametrize(("rule", "thresholds"), RULES)
def test_silence_has_the_sign_of_the_rule(rule, thresholds):
    policy, (z, *_) = Policy(rule, thresholds), drawn()
    assert torch.equal(silence(policy, 0, z) > 0, ~policy.fires(0, z))
    closed = Policy(rule, [0.0 if rule == "entropy" else 1.0])
    assert (silence(closed, 0, z) == math.inf).all()


@pytest.mark.parametrize(
    ("rule", "thresholds"), [*RULES, ("entropy", [1e-6, 3.0]), ("confidence", [0.999, 0.0])]
)
def test_gate_forcing_is_positive_only_where_the_exit_answers_wrongly(rule, thresholds):
    """With no slack the sum is 0 at most, and 0 says: all earlier ones are silent, this one fires, and is wrong."""
    policy, y = Policy(rule, thresholds), torch.arange(4000) % 5
    logits = tuple(z * factor for z, factor in zip(drawn(4000), (1, 2, 1), strict=True))
    exit, wrong = policy.exit_of(logits), policy.misclassified(logits, y)
    for number in range(3):
        value = gate_forcing(policy, number, slack=0)(logits, y)
        assert (value <= 0).all()
        forced = value == 0
        assert (exit[forced] == number).all()
        assert wrong[forced].all()
        if rule == "entropy" and thresholds[0] == 0.9:
            # It asks for no more than it must, but for the way in which the other classes share the rest.
            assert forced.sum() > 0.7 * ((exit == number) & wrong).sum() > 20


@pytest.mark.parametrize("classes", [2, 3, 10, 200])
@pytest.mark.parametrize("threshold", [1e-5, 0.1, 0.5, 2.0])
def test_odds_from_which_an_exit_fires(classes, threshold):
    policy = Policy("entropy", [threshold])
    odds = _firing_odds(policy, 0, classes)
    assert odds >= 0
    shared = torch.zeros(1, classes, dtype=torch.float64)
    shared[0, 0] = odds + math.log(max(classes - 1, 1)) + 1e-6
    assert policy.fires(0, shared)
    if odds > 0:
        shared[0, 0] -= 1e-3
        assert not policy.fires(0, shared)


def test_only_forced_gates_show_a_masked_head():
    """Attacks on the sound exit, on the mean, on the weak exit alone and on what answers now all miss it."""
    net, (x, y) = masked(), held_out(40).batch(slice(None))
    policy = net.policy
    attacks = attacks_for("standard", 2, 1, policy)
    assert net.adaptive(x).exit.sum() == 40
    chosen = {
        name: attacks[name]
        for name in (
            "pgd40",
            "pgd40_exit1",
            "pgd40_average",
            "pgd40_max_average",
            "apgd_deployed",
            "apgd_gates",
        )
    }
    found = run_suite(net, x, y, BALL, judge=policy.misclassified, answer=net.adaptive, attacks=chosen)
    gates = found.accuracy["apgd_gates"]
    others = [value for name, value in found.accuracy.items() if name not in ("apgd_gates", "union")]
    assert gates == 0
    assert min(others) > 0.3
    # The images leave where they were sent to.
    assert (net.adaptive(found.worst).exit == 0).sum() > 25


@pytest.mark.parametrize("rule", ["entropy", "confidence"])
def test_forced_gates_are_inside_and_repeatable(rule):
    net = linear_exits(rule, (0.6, 0.6))
    x, y = images(0, 30, 1, 4, 4), torch.arange(30) % 3
    options = {"policy": net.policy, "steps": 20}
    first, again = (force_gates(net, x, y, Ball(0.2), generator=generator(), **options) for _ in range(2))
    assert torch.equal(first, again)
    assert Ball(0.2).contains(first, x).all()
    before, after = (net.policy.misclassified(net(z), y) for z in (x, first))
    assert after.sum() > before.sum() + 5
    # A sample that is wrong as it is stays so: its start may be random, its image is not given up.
    assert after[before].all()
    assert force_gates(net, x[:0], y[:0], Ball(0.2), **options).shape == x[:0].shape
    steps = force_gates(
        net, x, y, Ball(0.2), policy=net.policy, attack=square, steps=50, generator=generator()
    )
    assert Ball(0.2).contains(steps, x).all()


def test_transfer_asks_the_other_network_alone():
    x, y = held_out(40).batch(slice(None))
    source = network(0).eval()

    class Never(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("the network was asked")

    x_adv = transferred(Never(), x, y, BALL, source=source, steps=20, generator=generator())
    assert BALL.contains(x_adv, x).all()
    # It goes on where an attack would rest: the source is wrong by far.
    plain = apgd(source, x, y, BALL, steps=20, generator=generator())
    with torch.no_grad():
        assert margin((source(x_adv),), y).mean() > margin((source(plain),), y).mean() + 0.5
    attacks = attacks_for("quick", 1, 1, None, {"twin": source})
    assert list(attacks) == ["fgsm", "pgd40", "transfer_twin"]
    other = network(0, seed=3).eval()
    found = run_suite(other, x, y, BALL, attacks={"transfer": attacks["transfer_twin"]})
    assert found.broken["transfer"].sum() > found.misclassified.sum() + 5
    assert found.gradients["transfer"].samples == 0


@pytest.mark.parametrize("rule", ["entropy", "confidence"])
def test_slowdown_is_judged_by_what_it_forces(rule):
    net, seen = linear_exits(rule), []
    x, y, ball = images(0, 60, 1, 4, 4), torch.arange(60) % 3, Ball(0.15)
    net.policy = Policy(rule, [policies.RULES[rule].score(z.detach()).median().item() for z in net(x)[:2]])
    found = run_slowdown(net, x, y, ball, batch=25, steps=30, progress=lambda *step: seen.append(step))
    assert tuple(found.slowed) == tuple(found.seconds) == SLOWDOWNS
    assert seen[:3] == [("deepsloth", 25, 60), ("deepsloth", 50, 60), ("deepsloth", 60, 60)]
    clean, dearest = net.adaptive(x), found.dearest
    assert torch.equal(found.clean.macs, clean.macs)
    costs = torch.stack([clean.macs, *(answer.macs for answer in found.slowed.values())])
    assert torch.equal(dearest.macs, costs.amax(0))
    assert dearest.macs.double().mean() > clean.macs.double().mean() + 5
    assert ball.contains(found.images, x).all()
    again = net.adaptive(found.images)
    for name in ("label", "exit", "macs"):
        assert torch.equal(getattr(again, name), getattr(dearest, name))
    # Nothing was dearer: the image itself.
    same = clean.macs == dearest.macs
    assert torch.equal(found.images[same], x[same])


def test_an_exit_without_gradients_is_slowed_down_by_queries_and_said():
    net, (x, y) = network(0).eval(), held_out(100).batch(slice(None))
    entropies = policies.entropy(net(x).detach())
    policy = Policy("entropy", [entropies.quantile(0.9).item()])
    plain, hidden = (
        MultiExit([nn.Identity(), nn.Identity()], [first, net], policy).eval()
        for first in (net, Rounded(net))
    )
    seen = run_slowdown(plain, x, y, BALL)
    assert seen.guard.verdict == "reliable"
    assert seen.dearest.exit.double().mean() > 0.8
    found = run_slowdown(hidden, x, y, BALL)
    by_gradients = [found.slowed[name].exit.double().mean() for name in SLOWDOWNS[:3]]
    assert max(by_gradients) < 0.3
    assert found.dearest.exit.double().mean() > 0.8
    assert found.guard.verdict == "suspicious"
    assert found.guard.reason.startswith("square1000 makes ")


def test_bad_input():
    net, x, y = linear_exits(), images(0, 4, 1, 4, 4), torch.arange(4) % 3
    with pytest.raises(InputError, match="1 thresholds for 3 exits"):
        run_slowdown(net, x, y, Ball(0.1), Policy("entropy", [0.5]))
    with pytest.raises(InputError, match="no sample"):
        run_slowdown(net, x[:0], y[:0], Ball(0.1))
    net.policy = None
    with pytest.raises(InputError, match="has no thresholds"):
        run_slowdown(net, x, y, Ball(0.1))
    with pytest.raises(InputError, match="1 thresholds for 3 exits"):
        force_gates(net, x, y, Ball(0.1), policy=Policy("entropy", [0.5]))


@pytest.mark.parametrize("rule", ["entropy", "confidence"])
@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes(classes, rule):
    """A ball that holds every image: all attacks on what is deployed break every sample that can be broken."""
    torch.manual_seed(4)
    heads = [nn.Sequential(nn.Flatten(), nn.Linear(16, classes)) for _ in range(2)]
    for head in heads:
        head[1].weight.data *= 20
    net = MultiExit(
        [nn.Identity(), nn.Identity()], heads, Policy(rule, [0.3 if rule == "entropy" else 0.9])
    ).eval()
    x = images(0, 12, 1, 4, 4) * 0.2 + 0.4
    y, policy = net.adaptive(x).label, net.policy
    attacks = attacks_for("standard", 2, 1, policy)
    chosen = {name: attacks[name] for name in ("apgd_deployed", "apgd_t_deployed", "apgd_gates")}
    chosen["square"] = partial(attacks["square5000_deployed"], steps=300)
    found = run_suite(net, x, y, Ball(1.0), judge=policy.misclassified, answer=net.adaptive, attacks=chosen)
    assert all(flags.all() for flags in found.broken.values())
    assert run_slowdown(net, x, y, Ball(1.0), steps=40).dearest.exit.all()
