"""Certificates against attacks, against an exact answer, and against each other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftsure import bounds
from swiftsure.attacks import margin, pgd
from swiftsure.ball import Ball
from swiftsure.certificates import FLOOR, METHODS, Certificate, certify, verified_accuracy
from swiftsure.errors import InputError
from trained import BALLS, EPS, held_out, network


def random_net(seed: int) -> nn.Module:
    """Random weights, with a batch norm and a dropout that must both be read as in evaluation; in training mode."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, 2, 1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(48, 24),
        nn.ReLU(),
        nn.Linear(24, 4),
    )
    for parameter in net.parameters():
        nn.init.normal_(parameter, 0.0, 0.3, generator=generator)
    nn.init.uniform_(net[1].running_var, 0.3, 2.0, generator=generator)
    return net


def label(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(net).eval()(x).argmax(1)


def corners(x: Tensor, ball: Ball, generator: torch.Generator) -> Tensor:
    """The image of the ball that goes furthest along a random direction: a corner of the box for "inf"."""
    direction = torch.randn(x.shape, generator=generator)
    if ball.norm == "1":
        direction = direction * (direction.abs() > 2.5)
    return ball.maximiser(x, direction)


def broken(net: nn.Module, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """Which samples some attack takes the label from: PGD on two losses with restarts, and many corners."""
    generator = torch.Generator().manual_seed(0)
    images = [
        pgd(net, x, y, ball, steps=15, restarts=2, generator=generator),
        pgd(net, x, y, ball, steps=15, restarts=2, objective=margin, generator=generator),
        *(corners(x, ball, generator) for _ in range(40)),
    ]
    return torch.stack([label(net, image) != y for image in images]).any(0)


def problem(kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    x, y = held_out(60).batch(slice(None))
    if kind.startswith("random"):
        net = random_net(int(kind[-1]))
        with torch.no_grad():
            net[-1].bias -= copy.deepcopy(net).eval()(x).mean(0)
        return net, x, label(net, x)
    return network(0.5 if kind == "proven" else 0.0), x, y


PROBLEMS = [(kind, ball) for kind in ("proven", "plain", "random 1", "random 3") for ball in BALLS]


@pytest.mark.parametrize(("kind", "ball"), PROBLEMS, ids=lambda value: getattr(value, "norm", value))
def test_no_attack_breaks_a_certified_sample(kind: str, ball: Ball) -> None:
    net, x, y = problem(kind)
    if kind.startswith("random"):
        ball = ball.with_eps(ball.radius / 3)
    certificates = [certify(net, x, y, ball, method=method) for method in METHODS]
    certified = torch.stack([certificate.certified for certificate in certificates]).any(0)
    assert 8 <= certified.sum() < len(x)
    assert not broken(net, x[certified], y[certified], ball).any()


def test_the_attacks_would_break_a_wrong_certificate() -> None:
    """Claims for a quarter of the radius do not hold on all of it, and this battery sees that."""
    net, x, y = problem("plain")
    certified = certify(net, x, y, Ball(EPS / 4)).certified
    assert broken(net, x[certified], y[certified], Ball(4 * EPS)).any()


@pytest.mark.parametrize("method", METHODS)
def test_a_linear_network_is_decided_exactly(method: str) -> None:
    torch.manual_seed(0)
    net, ball = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double(), Ball(0.05)
    x = torch.rand(300, 1, 4, 4, dtype=torch.float64)
    y = label(net, x)
    weight = net[1].weight
    worst = []
    for j in range(3):
        slope = (weight[y] - weight[j]).detach().view_as(x)
        logits = net(ball.maximiser(x, -slope)).detach()
        worst.append((logits.gather(1, y[:, None])[:, 0] - logits[:, j]).where(y != j, torch.inf))
    exact = torch.stack(worst).amin(0)
    found = certify(net, x, y, ball, method=method)
    assert torch.equal(found.certified, exact > found.delta)
    assert found.certified.any()
    assert not found.certified.all()
    torch.testing.assert_close(found.margin, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("ball", BALLS, ids=lambda ball: ball.norm)
@pytest.mark.parametrize("kind", ["proven", "plain"])
def test_auto_proves_what_each_technique_proves(kind: str, ball: Ball) -> None:
    net, x, y = problem(kind)
    each = {method: certify(net, x, y, ball, method=method, delta=FLOOR) for method in METHODS}
    auto = each.pop("auto")
    for name, alone in each.items():
        assert (auto.certified | ~alone.certified).all(), name
        assert set(alone.method) <= {name, "none"}
        assert alone.by == {name: int(alone.certified.sum())}
    assert sum(auto.by.values()) == auto.certified.sum()
    for i, name in enumerate(auto.method):
        if name == "none":
            assert not auto.certified[i]
            # A sample that an attack breaks is not asked about again.
            margins = [float(alone.margin[i]) for alone in each.values()]
            assert max(margins[:2]) - 1e-3 <= float(auto.margin[i]) <= max(margins) + 1e-3
        elif name == "alpha-crown":
            # An ascent ends elsewhere in other batches.
            assert float(auto.margin[i]) > FLOOR
        else:
            torch.testing.assert_close(auto.margin[i], each[name].margin[i], rtol=1e-4, atol=1e-5)


def test_auto_asks_a_technique_only_for_what_cheaper_ones_and_an_attack_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = dict.fromkeys(bounds.TECHNIQUES, 0)
    names = {technique: name for name, technique in bounds.TECHNIQUES.items()}
    real = bounds.difference_bounds

    def counting(bound: Any, graph: Any, region: Any, y: Tensor, *, upper: bool = True) -> Any:
        asked[names[bound]] += len(y)
        return real(bound, graph, region, y, upper=upper)

    monkeypatch.setattr("swiftsure.certificates._proof.difference_bounds", counting)
    net, x, y = problem("proven")
    y = y.clone()
    y[:5] = (y[:5] + 1) % 10
    found = certify(net, x, y, BALLS[0], delta=FLOOR)
    right = int((label(net, x) == y).sum())
    assert right <= 55
    left = right
    broken = 0
    for name in bounds.TECHNIQUES:
        if name == "symbolic":
            # Between the cheap techniques and the dear ones, an attack takes out what cannot be proven.
            broken = left - asked[name]
            left = asked[name]
        assert asked[name] == left, name
        left -= found.by[name]
    assert 0 < broken <= right - found.certified.sum()
    assert not found.certified[:5].any()
    assert (found.margin[:5] == -torch.inf).all()


def test_fields_of_one_exit() -> None:
    net, x, y = problem("proven")
    found = certify(net, x, y, BALLS[0])
    assert isinstance(found, Certificate)
    assert found.certified.dtype == torch.bool
    assert (
        found.certified.shape == found.margin.shape == found.max_exit.shape == found.max_macs.shape == (60,)
    )
    assert len(found) == len(found.method) == 60
    assert torch.equal(found.certified, found.margin > found.delta)
    assert (found.max_exit == 0).all()
    assert (found.max_macs == 64 * 4 * 9 + 16 * 8 * 64 + 128 * 24 + 240).all()
    assert torch.equal(found.label, y)
    assert found.ball == BALLS[0]
    assert not found.margin.requires_grad
    with pytest.raises(AttributeError):
        found.delta = 0.0


def test_without_labels_the_deployed_ones_are_certified() -> None:
    net, x, y = problem("plain")
    found = certify(net, x, ball=BALLS[0], delta=FLOOR)
    answers = label(net, x)
    assert torch.equal(found.label, answers)
    right = answers == y
    assert not right.all()
    assert torch.equal(found.certified & right, certify(net, x, y, BALLS[0], delta=FLOOR).certified)


def test_verdicts_do_not_depend_on_the_batch() -> None:
    net, x, y = problem("proven")
    for method in METHODS:
        whole = certify(net, x, y, BALLS[0], method=method, delta=FLOOR)
        again = certify(net, x, y, BALLS[0], method=method, delta=FLOOR)
        assert torch.equal(whole.margin, again.margin)
        for size in (1, 7, 64):
            other = certify(net, x, y, BALLS[0], method=method, delta=FLOOR, batch=size)
            assert torch.equal(other.certified, whole.certified)
            assert other.method == whole.method
            torch.testing.assert_close(other.margin, whole.margin, rtol=1e-4, atol=1e-5)
        order = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:23]
        some = certify(net, x[order], y[order], BALLS[0], method=method, delta=FLOOR)
        assert torch.equal(some.certified, whole.certified[order])


def test_a_margin_must_exceed_the_slack() -> None:
    net, x, y = problem("proven")
    found = certify(net, x, y, BALLS[0], method="interval", delta=0.0)
    middle = found.margin[found.certified].median()
    strict = certify(net, x, y, BALLS[0], method="interval", delta=float(middle))
    assert torch.equal(strict.certified, found.margin > middle)
    assert 0 < strict.certified.sum() < found.certified.sum()
    assert strict.by["interval"] == strict.certified.sum()


def test_the_network_stays_as_it_is() -> None:
    net, x, y = random_net(1).train(), *held_out(20).batch(slice(None))
    net[3].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    first = certify(net, x, None, Ball(0.01))
    assert [module.training for module in net] == [True, True, True, False, True, True, True, True]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None and parameter.dtype == torch.float32 for parameter in net.parameters())
    second = certify(net.eval(), x, None, Ball(0.01))
    assert torch.equal(first.margin, second.margin)
    assert torch.is_grad_enabled()
    assert torch.equal(first.label, y) is False
    with pytest.raises(InputError):
        certify(net.train(), x, torch.full((20,), 4), Ball(0.01))
    assert net.training


def test_arithmetic_is_full_float32_whatever_the_caller_allows() -> None:
    net, x, y = problem("proven")
    seen = []
    watching = copy.deepcopy(net)

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        # Reading the network runs its hooks too, on stand-ins for values.
        if isinstance(output, Tensor):
            precision = torch.get_float32_matmul_precision(), torch.backends.cudnn.conv.fp32_precision
            seen.append((output.dtype, *precision))

    watching[1].register_forward_hook(look)
    plain = certify(net, x, y, BALLS[0])
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = certify(watching, x, y, BALLS[0])
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")
    assert {row for row in seen if row[0] == torch.float32} == {(torch.float32, "highest", "ieee")}
    assert {row[0] for row in seen} <= {torch.float32, torch.float64}
    assert torch.equal(found.margin, plain.margin)
    assert found.delta == plain.delta


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("layer", [1, 3, -1])
def test_what_is_not_a_number_never_certifies(value: float, layer: int) -> None:
    net, x, y = copy.deepcopy(problem("proven")[0]), *problem("proven")[1:]
    with torch.no_grad():
        net[layer].weight.view(-1)[0] = value
    for labels in (y, None):
        for method in METHODS:
            found = certify(net, x, labels, Ball(0.001), method=method)
            assert not found.certified.any() or layer == 3
            assert not found.margin.isnan().any()
            assert (found.margin[found.certified] < torch.inf).all()
            # A unit that is NaN for every image spoils them all; an infinite weight on a dead unit need not.
            if value != value:
                assert not found.certified.any()
                assert found.method == ["none"] * len(x)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bound_that_is_no_number_proves_nothing(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    net, x, y = problem("proven")

    def found_bounds(bound: Any, graph: Any, region: Any, y: Tensor, *, upper: bool = True) -> Any:
        lower = torch.ones(len(y), 10)
        lower[::2, 3] = value
        lower = lower.scatter(1, y[:, None], 0.0)
        return [(lower, lower)]

    monkeypatch.setattr("swiftsure.certificates._proof.difference_bounds", found_bounds)
    right = (label(net, x) == y).nonzero()[:, 0]
    found = certify(net, x, y, BALLS[0], method="interval", delta=FLOOR, batch=len(x))
    spoilt = (torch.arange(len(right)) % 2 == 0) & (y[right] != 3)
    assert torch.equal(found.certified[right], ~spoilt)
    assert (found.margin[right][spoilt] == -torch.inf).all()


def test_an_answer_that_is_no_number_is_never_certified(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, _ = problem("proven")
    net = copy.deepcopy(net)
    with torch.no_grad():
        net[-1].bias[2] = torch.nan
    ones = [(torch.ones(len(x), 10), torch.ones(len(x), 10))]
    monkeypatch.setattr("swiftsure.certificates._proof.difference_bounds", lambda *_, **__: ones)
    assert not certify(net, x, None, BALLS[0], delta=FLOOR).certified.any()


def test_verified_accuracy_is_the_certified_share() -> None:
    net, x, y = problem("proven")
    for method in METHODS:
        expected = certify(net, x, y, BALLS[0], method=method, delta=FLOOR).certified.double().mean()
        assert verified_accuracy(net, x, y, BALLS[0], method, batch=16) == expected
    assert verified_accuracy(net, x, y, BALLS[0], delta=1e9) == 0


def test_verified_accuracy_measures_no_slack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("swiftsure.certificates._certify.rounding_slack")
    net, x, y = problem("proven")
    assert verified_accuracy(net, x, y, BALLS[0]) > 0.3


def test_no_image_is_no_problem_but_no_accuracy_either() -> None:
    net, x, y = problem("proven")
    empty = certify(net, x[:0], y[:0], BALLS[0])
    assert len(empty) == 0
    assert empty.certified.shape == empty.margin.shape == (0,)
    assert empty.by == dict.fromkeys(bounds.TECHNIQUES, 0)
    with pytest.raises(InputError, match="at least one"):
        verified_accuracy(net, x[:0], y[:0], BALLS[0])


class Heads(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.body, self.heads = nn.Flatten(), nn.ModuleList(nn.Linear(64, 10) for _ in range(count))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        z = F.relu(self.body(x))
        return tuple(head(z) for head in self.heads)


def test_a_tuple_of_one_exit_is_one_exit() -> None:
    x = held_out(10).batch(slice(None))[0]
    net = Heads(1)
    plain = nn.Sequential(nn.Flatten(), nn.ReLU(), net.heads[0])
    assert torch.equal(certify(net, x, None, Ball(0.01)).margin, certify(plain, x, None, Ball(0.01)).margin)
    with pytest.raises(InputError, match="2 exits and no thresholds"):
        certify(Heads(2), x, None, Ball(0.01))


def test_bad_input_is_one_line() -> None:
    net, x, y = problem("proven")
    ball = BALLS[0]
    nan = x.clone()
    nan[3, 0, 0, 0] = torch.nan
    calls: dict[str, Callable[[], object]] = {
        "unknown method 'milp'.*interval, crown-ibp, symbolic, crown, alpha-crown, auto": lambda: certify(
            net, x, y, ball, method="milp"
        ),
        "ball is None": lambda: certify(net, x, y),
        "policy": lambda: certify(net, x, y, ball, policy="entropy"),
        "delta is -1": lambda: certify(net, x, y, ball, delta=-1.0),
        "delta is nan": lambda: certify(net, x, y, ball, delta=float("nan")),
        "batch is 0": lambda: certify(net, x, y, ball, batch=0),
        "image 3 has a NaN": lambda: certify(net, nan, y, ball),
        "label 0 is": lambda: certify(net, x, y + 10, ball),
        "59 labels": lambda: certify(net, x, y[:59], ball),
        "ball's range": lambda: certify(net, x, y, Ball(0.1, low=0.2, high=0.9)),
        "bfloat16": lambda: certify(copy.deepcopy(net).bfloat16(), x, y, ball),
        "one class": lambda: certify(nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), x, None, ball),
    }
    for pattern, call in calls.items():
        with pytest.raises(InputError, match=pattern) as caught:
            call()
        assert "\n" not in str(caught.value)
