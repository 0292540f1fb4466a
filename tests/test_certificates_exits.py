"""Certificates of networks with exits against attack: no answer changes, and no image costs more than is proven."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from swiftsure.attacks import SLOWDOWNS, average, force_gates, margin, max_average, pgd, run_slowdown
from swiftsure.attacks.gates import deployed
from swiftsure.ball import Ball
from swiftsure.certificates import FLOOR, METHODS, Certificate, _proof, _walk, certify
from swiftsure.exits import MultiExit, Policy
from swiftsure.exits.multi_exit import Answer
from trained import BALLS, held_out
from trained_exits import exits
from unsound_walks import (
    only_the_last_exit,
    rival_without_the_label,
    up_to_where_the_image_leaves,
    where_the_image_leaves,
)

COUNT = 36
ALL, SIDES = (1.0, 1.0, 1.0), (0.0, 0.0, 1.0)


@dataclass(frozen=True)
class Problem:
    """A network, a ball and a policy; labels are the true ones, also where the network errs."""

    name: str
    ball: Ball
    rule: str
    thresholds: tuple[float, ...]
    kind: str = "attached"
    proven: tuple[float, ...] = ALL
    methods: tuple[str, ...] = ("interval", "crown-ibp", "auto")
    steps: int = 150

    @property
    def net(self) -> MultiExit:
        return exits(self.kind, self.proven, self.steps)

    @property
    def policy(self) -> Policy:
        return Policy(self.rule, self.thresholds)

    @property
    def images(self) -> tuple[Tensor, Tensor]:
        return held_out(COUNT).batch(slice(None))

    def certificates(self, methods: Sequence[str] = ()) -> list[Certificate]:
        x, y = self.images
        return [
            certify(self.net, x, y, self.ball, self.policy, method, delta=FLOOR)
            for method in methods or self.methods
        ]


LINF, L2, L1 = BALLS
PROBLEMS = (
    Problem("all proven, low", LINF, "entropy", (0.1, 0.1), methods=METHODS),
    Problem("all proven, high", LINF, "entropy", (0.8, 0.8)),
    Problem("all proven, closed", LINF, "entropy", (0.0, 0.0)),
    Problem("all proven, L2", L2, "entropy", (0.5, 0.3)),
    Problem("all proven, L1", L1, "confidence", (0.9, 0.8), methods=("interval", "symbolic", "crown")),
    Problem("weak sides", LINF, "entropy", (0.1, 0.3), proven=SIDES, methods=METHODS),
    Problem("weak sides, high", LINF, "entropy", (0.8, 0.8), proven=SIDES),
    Problem("weak sides, confidence", LINF, "confidence", (0.95, 0.5), proven=SIDES),
    Problem("four exits", LINF, "entropy", (0.1, 0.5, 0.8), "stages", (0.5,) * 4),
    Problem("four exits, L2, one closed", L2, "confidence", (0.99, 1.0, 0.6), "stages", (0.5,) * 4),
    Problem("plain training", Ball(0.01), "entropy", (0.3, 0.2, 0.1), "stages", ()),
    Problem("one exit", LINF, "entropy", (), "single", (1.0,)),
)


def attacked(problem: Problem) -> Iterator[Tensor]:
    """Images of the ball that aim at the answer, at each gate, at all exits, and at the cost; and random ones."""
    net, policy, ball = problem.net, problem.policy, problem.ball
    x, y = problem.images
    generator = torch.Generator().manual_seed(0)
    options = {"steps": 12, "restarts": 2, "generator": generator}
    for of in (deployed(policy), deployed(policy, margin), average(), average(margin)):
        yield pgd(net, x, y, ball, objective=of, judge=policy.misclassified, **options)
    if policy.exits > 1:
        yield force_gates(net, x, y, ball, policy=policy, **options)
        yield max_average(net, x, y, ball, **options)
        slowed = run_slowdown(net, x, y, ball, policy, steps=20)
        assert set(slowed.slowed) == set(SLOWDOWNS)
        yield slowed.images
    for _ in range(5):
        yield ball.sample(x, generator)
        yield ball.maximiser(x, torch.randn(x.shape, generator=generator))


@functools.cache
def answers(problem: Problem) -> list[Answer]:
    """What the network, run as it is deployed, says of the images and of what attacks made of them."""
    images = (problem.images[0], *attacked(problem))
    return [problem.net.adaptive(image, problem.policy) for image in images]


@dataclass
class Broken:
    """Which promises of some certificates do not hold: (B,) bool each."""

    label: Tensor
    cost: Tensor
    exit: Tensor


def broken(problem: Problem, certificates: list[Certificate]) -> Broken:
    """Against all attacks, what several certificates promise together."""
    y = problem.images[1]
    certified = torch.stack([found.certified for found in certificates]).any(0)
    last = torch.stack([found.max_exit for found in certificates]).amin(0)
    macs = torch.stack([found.max_macs for found in certificates]).amin(0)
    required = torch.stack([found.required for found in certificates]).all(0)
    label, cost, exit = (torch.zeros_like(certified) for _ in range(3))
    for answer in answers(problem):
        label |= certified & (answer.label != y)
        # What is not certified has a proven cost all the same.
        cost |= (answer.exit > last) | (answer.macs > macs)
        exit |= ~required.gather(1, answer.exit[:, None])[:, 0]
    return Broken(label, cost, exit)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_no_attack_breaks_a_promise(problem: Problem) -> None:
    certificates = problem.certificates()
    found = broken(problem, certificates)
    assert not found.label.any()
    assert not found.cost.any()
    assert not found.exit.any()
    for certificate in certificates:
        last = certificate.required.int().flip(1).argmax(1)
        assert torch.equal(last, problem.policy.exits - 1 - certificate.max_exit)


def test_the_battery_has_something_to_break() -> None:
    """Labels that are proven and that are not, costs that are proven and that attacks raise, and labels they take."""
    certified, taken, early, late = 0, 0, 0, 0
    for problem in PROBLEMS:
        (found,) = problem.certificates(["interval"])
        clean, *others = answers(problem)
        certified += int(found.certified.sum())
        early += int((found.max_exit < problem.policy.exits - 1).sum())
        taken += int(torch.stack([answer.label != clean.label for answer in others]).any(0).sum())
        late += int(torch.stack([answer.exit > clean.exit for answer in others]).any(0).sum())
    assert certified > 100 and taken > 50 and early > 20 and late > 50


MISTAKES = {"label": (only_the_last_exit, rival_without_the_label), "cost": (where_the_image_leaves,)}
MISTAKES["exit"] = (up_to_where_the_image_leaves,)


@pytest.mark.parametrize(
    ("promise", "mistake"), [(promise, mistake) for promise, many in MISTAKES.items() for mistake in many]
)
def test_planted_mistakes_are_caught(
    promise: str, mistake: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = next(problem for problem in PROBLEMS if problem.name == "weak sides, high")
    for name in ("interval", "crown-ibp"):
        assert not getattr(broken(problem, problem.certificates([name])), promise).any()
    if mistake is rival_without_the_label:
        monkeypatch.setattr(_walk, "rival_boxes", mistake)
    else:
        monkeypatch.setattr(_proof, "walk", mistake)
    assert getattr(broken(problem, problem.certificates(["crown-ibp"])), promise).any()
