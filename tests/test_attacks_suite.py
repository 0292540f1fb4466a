"""run_suite: flags, union, the worst image, and what every success must pass."""

import pytest
import torch
from torch import nn

from swiftsure.attacks import SUITES, misclassified, run_suite, single, suite
from swiftsure.ball import Ball
from swiftsure.errors import InputError


@pytest.fixture
def task():
    """A network on 4x4 images labelled by its own answers, but for two samples that it gets wrong."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 20), nn.ReLU(), nn.Dropout(0.5), nn.Linear(20, 3))
    net.eval()
    x = torch.rand(23, 1, 4, 4)
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
    assert result.gradients["pgd40"].samples == 21 * 40
    assert seen[:3] == [("fgsm", 10, 23), ("fgsm", 20, 23), ("fgsm", 23, 23)]
    assert net.training
    assert net[3].training


def test_repeatable_and_independent_of_the_other_attacks(task):
    net, x, y = task
    first, second = (run_suite(net, x, y, Ball(0.08), "standard", seed=3, batch=12) for _ in range(2))
    assert torch.equal(first.worst, second.worst)
    assert all(torch.equal(first.broken[name], second.broken[name]) for name in first.broken)
    assert not torch.equal(first.worst, run_suite(net, x, y, Ball(0.08), "standard", seed=4, batch=12).worst)
    quick = run_suite(net, x, y, Ball(0.08), batch=12)
    assert torch.equal(first.broken["fgsm"], quick.broken["fgsm"])


def test_names_are_stable():
    assert {name: list(attacks) for name, attacks in SUITES.items()} == {
        "quick": ["fgsm", "pgd40"],
        "standard": ["fgsm", "pgd40", "apgd_ce", "apgd_t", "square1000"],
        "full": [
            "fgsm", "pgd40", "apgd_ce", "apgd_t", "square1000", "pgd200x10", "pgd200x10_margin",
            "apgd_cex5", "apgd_dlrx5", "apgd_marginx5", "interval40x5", "square5000",
        ],
    }  # fmt: skip


def test_an_attack_that_leaves_the_ball_is_a_defect(task, monkeypatch):
    net, x, y = task
    monkeypatch.setitem(suite.SUITES, "quick", {"cheat": lambda net, x, y, ball, **_: x + 0.2})
    with pytest.raises(AssertionError, match="left the ball"):
        run_suite(net, x, y, Ball(0.1), "quick")


def test_a_success_is_what_a_fresh_pass_says(task, monkeypatch):
    """An attack that returns x has broken nothing, whatever it may think of itself."""
    net, x, y = task
    monkeypatch.setitem(suite.SUITES, "quick", {"idle": lambda net, x, y, ball, **_: x})
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
    monkeypatch.setitem(
        SUITES, "quick", {"interval": suite.interval_attack, "pgd40": SUITES["quick"]["pgd40"]}
    )

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
