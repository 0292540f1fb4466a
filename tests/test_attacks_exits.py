"""Attacks on single exits and max-average: what is saved, and that saving it changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swiftsure.attacks import (
    _exits,
    apgd,
    at_exit,
    cross_entropy,
    fgsm,
    max_average,
    misclassified,
    never,
    pgd,
    single,
    square,
)
from swiftsure.attacks._exits import all_exits
from swiftsure.attacks._own_exits import OwnExits, UpTo
from swiftsure.ball import Ball
from swiftsure.errors import InputError
from swiftsure.exits import MultiExit

BALL = Ball(0.1)


class Counting(nn.Module):
    """Notes how many rows each call of a stage had."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        return self.stage(x)


class Plain(nn.Module):
    """The same network, but for all that an attack can know of it: it returns a tuple of logits."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.net(x)


def network() -> MultiExit:
    torch.manual_seed(3)
    stages = [
        Counting(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())),
        Counting(nn.Sequential(nn.Conv2d(4, 6, 3), nn.Tanh())),
        Counting(nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU())),
    ]
    sides = [4 * 36, 6 * 16, 8 * 4]
    heads = [nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(size, 5)) for size in sides]
    net = MultiExit(stages, heads)
    # Without it, attacks would pass one image to learn how many classes there are.
    net.config = {"classes": 5}
    return net


@pytest.fixture
def net() -> MultiExit:
    return network()


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    torch.manual_seed(4)
    return torch.rand(12, 1, 8, 8), torch.randint(5, (12,))


@pytest.fixture
def _copies_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done on a GPU with small batches."""
    monkeypatch.setitem(_exits._ROWS, "cpu", 1024)


def drawn() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def rows(net: MultiExit) -> list[list[int]]:
    return [stage.rows for stage in net.stages if isinstance(stage, Counting)]


@pytest.mark.parametrize("exit", [0, 1, 2, -1])
def test_an_attack_on_one_exit_runs_nothing_behind_it(
    net: MultiExit, images: tuple[Tensor, Tensor], exit: int
) -> None:
    x, y = images
    found = at_exit(net, x, y, BALL, exit=exit, steps=4, generator=drawn())
    reached = exit % 3
    assert [len(calls) for calls in rows(net)] == [4] * (reached + 1) + [0] * (2 - reached)
    whole = pgd(net, x, y, BALL, objective=single(exit), judge=never, steps=4, generator=drawn())
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-6)
    assert torch.equal(at_exit(Plain(net), x, y, BALL, exit=exit, steps=4, generator=drawn()), whole)


def test_a_judge_goes_by_the_exit_that_is_attacked(net: MultiExit, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    options: dict[str, Any] = {"steps": 2, "restarts": 3, "judge": misclassified}
    found = at_exit(net, x, y, BALL, exit=0, generator=drawn(), **options)
    assert torch.equal(found, at_exit(Plain(net), x, y, BALL, exit=0, generator=drawn(), **options))


@pytest.mark.parametrize("options", [{"steps": 5}, {"steps": 3, "restarts": 2}])
def test_max_average_is_the_same_cut_short(
    net: MultiExit, images: tuple[Tensor, Tensor], options: dict[str, Any]
) -> None:
    x, y = images
    naive = max_average(Plain(net), x, y, BALL, generator=drawn(), **options)
    torch.testing.assert_close(
        max_average(net, x, y, BALL, generator=drawn(), **options), naive, rtol=0, atol=1e-6
    )


@pytest.mark.usefixtures("_copies_on_cpu")
@pytest.mark.parametrize("random_start", [True, False])
def test_max_average_is_the_same_on_copies(
    net: MultiExit, images: tuple[Tensor, Tensor], random_start: bool
) -> None:
    x, y = images
    options: dict[str, Any] = {"steps": 5, "random_start": random_start}
    found = max_average(net, x, y, BALL, generator=drawn(), **options)
    # Each step runs a stage once, for the copies that go that far; then the K images are looked at.
    assert rows(net) == [[12 * (3 - place)] * 5 + [12] * 3 for place in range(3)]
    naive = max_average(Plain(net), x, y, BALL, generator=drawn(), **options)
    torch.testing.assert_close(found, naive, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("_copies_on_cpu")
def test_every_inner_attack_still_works(net: MultiExit, images: tuple[Tensor, Tensor]) -> None:
    """Only one run of pgd is made for all exits at once; whatever else is asked for goes exit by exit."""
    x, y = images

    def one_step(net: nn.Module, x: Tensor, y: Tensor, ball: Ball, *, objective: Any, judge: Any) -> Tensor:
        return fgsm(net, x, y, ball, objective=objective)

    attacks: list[tuple[Callable[..., Tensor], dict[str, Any]]] = [
        (square, {"steps": 20}),
        (apgd, {"steps": 6}),
        (pgd, {"steps": 2, "restarts": 3}),
    ]
    for attack, options in attacks:
        made = [
            max_average(which, x, y, BALL, attack=attack, generator=drawn(), **options)
            for which in (net, Plain(net))
        ]
        torch.testing.assert_close(made[0], made[1], rtol=0, atol=1e-6)
    made = [max_average(which, x, y, BALL, attack=one_step) for which in (net, Plain(net))]
    torch.testing.assert_close(made[0], made[1], rtol=0, atol=1e-6)


def test_copies_are_all_or_none(net: MultiExit, images: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(InputError, match="18 rows; allowed: 3 copies of 12 images"):
        OwnExits(net, 12)(images[0].repeat(2, 1, 1, 1)[:18])


def test_parts_share_modules_and_leave_modes_alone(net: MultiExit, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    net.train()
    net.heads[1].eval()
    modes = [module.training for module in net.modules()]
    max_average(net, x, y, BALL, steps=1)
    all_exits(net, x, y, BALL, steps=1)
    assert [module.training for module in net.modules()] == modes
    assert all(parameter.grad is None for parameter in net.parameters())
    own = {id(parameter) for parameter in net.parameters()}
    for part in (UpTo(net, 0), OwnExits(net, 4)):
        assert {id(parameter) for parameter in part.parameters()} == own


def test_heads_and_stages_that_work_in_place(images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    torch.manual_seed(5)
    stages = [
        nn.Sequential(nn.Flatten(), nn.Linear(64, 9)),
        nn.Sequential(nn.ReLU(inplace=True), nn.Linear(9, 9)),
    ]
    heads = [nn.Sequential(nn.ReLU(inplace=True), nn.Linear(9, 5)), nn.Linear(9, 5)]
    net = MultiExit(stages, heads, copies=(True, False)).eval()
    found = all_exits(net, x, y, BALL, steps=3, random_start=False)
    assert found is not None
    for number in range(2):
        z = UpTo(net, number)(x)
        torch.testing.assert_close(OwnExits(net, 12)(x.repeat(2, 1, 1, 1))[12 * number :][:12], z)
        assert torch.equal(z, net(x)[number])
        aim = single(number, cross_entropy)
        alone = pgd(net, x, y, BALL, objective=aim, judge=never, steps=3, random_start=False)
        torch.testing.assert_close(found[number], alone, rtol=0, atol=1e-6)
