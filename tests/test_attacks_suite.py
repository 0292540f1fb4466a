"""run_suite: flags, union, the worst image, and what every success must pass."""

from functools import partial

import pytest
import torch
from torch import nn

from swiftsure.attacks import (
    SUITES,
    attacks_for,
    interval_attack,
    misclassified,
    pgd,
    run_suite,
    single,
    square,
)
from swiftsure.attacks._eight_bits import eight_bits
from swiftsure.ball import Ball
from swiftsure.errors import InputError
from swiftsure.exits import MultiExit, Policy, policies


@pytest.fixture
def task():
    """A network on 4x4 images labelled by its own answers, but for two samples that it gets wrong."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 20), nn.ReLU(), nn.Dropout(0.5), nn.Linear(20, 3))
    net.eval()
    x = (torch.rand(23, 1, 4, 4) * 255).round() / 255
    y = net(x).argmax(1)
    y[[2, 20]] = (y[[2, 20]] + 1) % 3
    return net.train(), x, y


def wrong(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    net.eval()
    with torch.no_grad():
        answer = net(x).argmax(1)
    net.train()
    return answer != y


@pytest.mark.parametrize("norm", ["inf", "2", "1"])
def test_flags_agree_with_the_network(task, norm):
    net, x, y = task
    ball, seen = Ball({"inf": 0.08, "2": 0.3, "1": 0.9}[norm], norm), []
    result = run_suite(net, x, y, ball, batch=10, progress=lambda *step: seen.append(step))
    assert result.n == 23
    assert list(result.broken) == list(result.seconds) == list(result.gradients) == ["fgsm", "pgd40"]
    assert result.misclassified.nonzero().flatten().tolist() == [2, 20]
    assert torch.equal(result.misclassified, wrong(net, x, y))
    assert all(flags[[2, 20]].all() for flags in result.broken.values())
    assert torch.equal(result.union, result.broken["fgsm"] | result.broken["pgd40"])
    assert 2 < result.union.sum() < 23
    # The picture of a sample shows the break, wherever there was one.
    assert torch.equal(wrong(net, result.worst, y), result.union)
    assert ball.contains(result.worst, x).all()
    assert torch.equal(result.worst[[2, 20]], x[[2, 20]])
    assert (result.worst != x).flatten(1).any(1).sum() == 21
    assert result.accuracy["union"] == pytest.approx(1 - result.union.sum().item() / 23)
    assert list(result.accuracy) == ["fgsm", "pgd40", "union"]
    # One for each step of a sample that still stands.
    standing = 21 - int(result.broken["pgd40"].sum() - 2)
    assert standing * 40 <= result.gradients["pgd40"].samples < 21 * 40
    assert seen[:3] == [("fgsm", 10, 23), ("fgsm", 20, 23), ("fgsm", 23, 23)]
    assert net.training
    assert net[3].training


def test_repeatable_and_independent_of_the_other_attacks(task, monkeypatch):
    net, x, y = task
    monkeypatch.setitem(SUITES["standard"], "square5000", partial(square, steps=100))
    first, second = (run_suite(net, x, y, Ball(0.08), "standard", seed=3, batch=12) for _ in range(2))
    assert torch.equal(first.worst, second.worst)
    assert all(torch.equal(first.broken[name], second.broken[name]) for name in first.broken)
    assert not torch.equal(first.worst, run_suite(net, x, y, Ball(0.08), "standard", seed=4, batch=12).worst)
    quick = run_suite(net, x, y, Ball(0.08), batch=12)
    assert torch.equal(first.broken["fgsm"], quick.broken["fgsm"])


def test_images_of_eight_bits(task, monkeypatch):
    """A success counts again once its pixels are what a file can hold; and rounding itself may be the success."""
    net, x, y = task
    ball = Ball(0.08)

    def between(net, x, y, ball, **_):
        """Half a step of 1/255 off the image that PGD finds, towards x: rounded, it is that image again."""
        x_adv = found.worst[[int((one == every).flatten(1).all(1).nonzero()) for one in x]]
        return x_adv + (x - x_adv).clamp(-0.4 / 255, 0.4 / 255)

    every, found = x, run_suite(net, x, y, ball)
    for name, flags in found.broken_8bit.items():
        assert (flags <= found.broken[name]).all()
    assert found.accuracy_8bit["union"] >= found.accuracy["union"]
    assert torch.equal(wrong(net, found.worst, y), found.union)
    assert found.macs == {}
    monkeypatch.setitem(SUITES, "quick", {"between": between, "idle": lambda net, x, y, ball, **_: x})
    again = run_suite(net, x, y, ball)
    grid, inside = eight_bits(between(net, x, y, ball), x, ball)
    assert inside.all()
    assert torch.equal(again.broken_8bit["between"], wrong(net, grid, y))
    assert torch.equal(again.broken["between"], wrong(net, grid, y) | wrong(net, between(net, x, y, ball), y))
    assert torch.equal(again.broken_8bit["idle"], again.misclassified)


@pytest.mark.parametrize("norm", ["inf", "2", "1"])
@pytest.mark.parametrize("size", [0.5 / 255, 1 / 255, 8 / 255, 0.1, 0.3])
def test_rounding_stays_inside(norm, size):
    """From 8-bit images there is always an 8-bit image in the ball, and for L-inf it is the nearest one there."""
    x = torch.randint(0, 256, (40, 3, 5, 5)).float() / 255
    ball = Ball(size * {"inf": 1, "2": 75**0.5, "1": 75}[norm], norm)
    x_adv = ball.maximiser(x, torch.randn(x.shape))
    for there in (x_adv, ball.sample(x), x):
        image, inside = eight_bits(there, x, ball)
        assert inside.all()
        assert ball.contains(image, x).all()
        assert torch.equal(image, (image * 255).round() / 255)
        if norm == "inf":
            steps = int(size * 255 + 1e-3) / 255
            assert (image - there).abs().max() <= max(0.5 / 255, size - steps) + 1e-6
    assert torch.equal(eight_bits(x, x, ball)[0], x)


def test_images_that_cannot_be_rounded_inside():
    """Of pixels between two steps, with a ball that reaches neither, there is no 8-bit image to count."""
    x = torch.full((2, 1, 2, 2), 100.52 / 255)
    x[1] = 100 / 255
    assert eight_bits(x, x, Ball(0.2 / 255))[1].tolist() == [False, True]
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    net[1].weight.data = torch.tensor([[1.0] * 4, [0.0] * 4])
    net[1].bias.data = torch.tensor([-4 * 100.7 / 255, 0.0])  # class 0 from a mean of 100.7 on
    y, rounding = torch.tensor([1, 1]), {"idle": lambda net, x, y, ball, **_: x}
    found = run_suite(net, x, y, Ball(0.2 / 255), attacks=rounding)
    assert found.broken["idle"].tolist() == found.broken_8bit["idle"].tolist() == [False, False]
    found = run_suite(net, x, y, Ball(0.6 / 255), attacks=rounding)
    assert found.broken["idle"].tolist() == found.broken_8bit["idle"].tolist() == [True, False]
    assert wrong(net, found.worst, y).tolist() == [True, False]


def test_the_deployed_answers_decide_and_are_counted(task):
    net, x, y = task
    weak = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    exits = MultiExit([nn.Identity(), nn.Identity()], [weak, net])
    with torch.no_grad():
        middle = policies.entropy(weak(x)).median().item()
    exits.policy = policy = Policy("entropy", [middle])
    found = run_suite(exits, x, y, Ball(0.08), judge=policy.misclassified, answer=exits.adaptive, batch=9)
    plain = run_suite(exits, x, y, Ball(0.08), judge=policy.misclassified, batch=9)
    assert torch.equal(found.union, plain.union)
    assert torch.equal(exits.adaptive(found.worst).label != y, found.union)
    assert list(found.macs) == list(attacks_for("quick", 2, 1, policy))
    costs = exits.macs((1, 4, 4))
    assert all(costs[0] < value < costs[1] for value in found.macs.values())
    # A network that has thresholds is attacked as it is deployed, unless it is said otherwise.
    usual = run_suite(exits, x, y, Ball(0.08), batch=9)
    assert torch.equal(usual.union, found.union)
    assert usual.macs == found.macs
    idle = run_suite(
        exits, x, y, Ball(0.08), answer=exits.adaptive, attacks={"idle": lambda n, x, *_, **__: x}
    )
    assert idle.macs["idle"] == exits.adaptive(x).macs.double().mean().item()


def test_the_last_exit_is_attacked_where_the_deployed_answer_is_wrong(task):
    """Else it would count as robust there without ever having been asked."""
    net, x, y = task

    class Constant(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tensor([9.0, 0.0, 0.0]).expand(len(x), 3)

    exits = MultiExit([nn.Identity(), nn.Identity()], [Constant(), net], Policy("entropy", [1.0]))
    attacks = {"pgd40": partial(pgd, steps=40)}
    found = run_suite(exits, x, y, Ball(0.08), attacks=attacks)
    assert torch.equal(found.misclassified, y != 0)
    alone = run_suite(net, x, y, Ball(0.08), attacks=attacks)
    assert found.broken_last["pgd40"][y != 0].sum() > found.misclassified_last[y != 0].sum() + 2
    assert abs(found.accuracy_last["pgd40"] - alone.accuracy["pgd40"]) < 0.1


def test_a_network_that_writes_into_its_images_is_refused_and_they_are_as_they_were(task):
    net, x, y = task

    class Greedy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x.sub_(0.5))

    before = x.clone()
    for attacks in ({"pgd": partial(pgd, steps=2)}, {"square": partial(square, steps=2)}):
        with pytest.raises(InputError, match="writes into the images"):
            run_suite(Greedy(), x, y, Ball(0.1), attacks=attacks)
    assert torch.equal(x, before)


def test_images_that_rounding_took_out_of_the_range(task):
    net, x, y = task
    x[0, 0, 0, 0] = 1 + 8e-7
    assert run_suite(net, x, y, Ball(0.1)).n == 23


def test_names_are_stable():
    assert {name: list(attacks) for name, attacks in SUITES.items()} == {
        "quick": ["fgsm", "pgd40"],
        "standard": ["fgsm", "pgd40", "apgd_ce", "apgd_t", "fab_t", "square5000"],
        "full": [
            "fgsm", "pgd40", "apgd_ce", "apgd_t", "fab_t", "square5000", "pgd200x10", "pgd200x10_margin",
            "apgd_cex5", "fab_tx3", "apgd_dlrx5", "apgd_marginx5", "interval40x5",
        ],
    }  # fmt: skip


def test_an_attack_that_leaves_the_ball_is_a_defect(task, monkeypatch):
    net, x, y = task
    monkeypatch.setitem(SUITES, "quick", {"cheat": lambda net, x, y, ball, **_: x + 0.2})
    with pytest.raises(AssertionError, match="left the ball"):
        run_suite(net, x, y, Ball(0.1), "quick")


def test_a_success_is_what_a_fresh_pass_says(task, monkeypatch):
    """An attack that returns x has broken nothing, whatever it may think of itself."""
    net, x, y = task
    monkeypatch.setitem(SUITES, "quick", {"idle": lambda net, x, y, ball, **_: x})
    result = run_suite(net, x, y, Ball(0.1), "quick")
    assert torch.equal(result.broken["idle"], result.misclassified)
    assert torch.equal(result.worst, x)


def test_several_exits_are_judged_by_the_last_unless_told(task):
    net, x, y = task

    class Opposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            z = self.net(x)
            return -z, z

    ball = Ball(0.08)
    assert torch.equal(run_suite(Opposed(), x, y, ball).union, run_suite(net, x, y, ball).union)
    assert run_suite(Opposed(), x, y, ball, judge=single(0, misclassified)).misclassified.sum() > 15


def test_an_attack_that_cannot_read_the_network_is_skipped_and_says_why(task, monkeypatch):
    net, x, y = task
    monkeypatch.setitem(SUITES, "quick", {"interval": interval_attack, "pgd40": SUITES["quick"]["pgd40"]})

    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x.flatten(1).sort(1).values.view_as(x)) + self.net(x)

    seen = []
    result = run_suite(Sorted(), x, y, Ball(0.08), progress=lambda *step: seen.append(step))
    assert list(result.broken) == list(result.seconds) == list(result.gradients) == ["pgd40"]
    assert list(result.skipped) == ["interval"]
    assert "sort" in result.skipped["interval"]
    assert list(result.accuracy) == ["pgd40", "union"]
    assert ("interval", 23, 23) in seen
    assert run_suite(net, x, y, Ball(0.08)).skipped == {}


@pytest.mark.parametrize(("norm", "eps"), [("inf", 1.0), ("2", 4.0), ("1", 16.0)])
def test_every_attack_breaks_what_it_can(task, norm, eps):
    """The ball holds every image, so that all samples are soon broken and none goes on for thousands of steps."""
    net, x, y = task
    result = run_suite(net, x[3:7], y[3:7], Ball(eps, norm), "full")
    assert result.skipped == {}
    assert list(result.broken) == list(SUITES["full"])
    weak = ("fgsm", "pgd40")
    assert all(flags.all() for name, flags in result.broken.items() if name not in weak)


def test_bad_input(task):
    net, x, y = task
    with pytest.raises(InputError, match="allowed: quick, standard, full"):
        run_suite(net, x, y, Ball(0.1), "thorough")
    with pytest.raises(InputError, match="batch is 0"):
        run_suite(net, x, y, Ball(0.1), batch=0)
    with pytest.raises(InputError, match="no sample"):
        run_suite(net, x[:0], y[:0], Ball(0.1))
    with pytest.raises(InputError, match="dtype float16; allowed for attacks: float32 and float64"):
        run_suite(net, x.half(), y, Ball(0.1))
    net.config = object()
    assert run_suite(net, x, y, Ball(0.1), attacks={}).n == 23
    exits = MultiExit([nn.Identity(), nn.Identity()], [net, net])
    with pytest.raises(InputError, match="2 exits and no thresholds"):
        run_suite(exits, x, y, Ball(0.1))
    assert run_suite(exits, x, y, Ball(0.1), judge=misclassified).macs == {}
