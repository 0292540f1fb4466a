"""Every technique of backward substitution against the dense float64 reference."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, reject, settings
from torch import Tensor, nn

import networks
import reference as forward
import reference_crown as reference
from swiftsure import bounds, models
from swiftsure.ball import Ball
from swiftsure.bounds import relaxation
from test_bounds_reference import KINDS, Outputs

METHODS = ("interval", *reference.METHODS)
BALLS = {"inf": Ball(0.05), "2": Ball(0.4, "2"), "1": Ball(0.4, "1")}


# The reference itself

BY_HAND = {"interval": (0.0, 2.0), "symbolic": (-2 / 3, 2.0), "crown-ibp": (-1.0, 2.0), "crown": (-1.0, 2.0)}
"""relu over [-1, 2]: no technique is tighter everywhere, and an order holds only once outputs are intersected."""


@pytest.mark.parametrize("method", METHODS)
def test_one_relu_by_hand(method: str) -> None:
    net = nn.Sequential(models.Normalize([1 / 3], [1 / 3]), nn.Flatten(), nn.ReLU())
    x = torch.full((1, 1, 1, 1), 0.5)
    [pair] = reference.output_bounds(net, x, Ball(0.5), method)
    assert [end.item() for end in pair] == pytest.approx(BY_HAND[method], abs=1e-6)
    assert [end.item() for end in bounds.output_bounds(net, x, Ball(0.5), method)] == pytest.approx(
        BY_HAND[method], abs=1e-6
    )


def test_alpha_crown_finds_the_best_line_below_one_relu() -> None:
    net = nn.Sequential(models.Normalize([1 / 3], [1 / 3]), nn.Flatten(), nn.ReLU())
    pair = bounds.output_bounds(net, torch.full((1, 1, 1, 1), 0.5), Ball(0.5), "alpha-crown")
    assert [end.item() for end in pair] == pytest.approx((0.0, 2.0), abs=1e-6)


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(networks.cases(plain=True))
def test_symbols_carried_forward_equal_substitution(case: networks.Case) -> None:
    """MixTrain's form, with the same slopes and the same l, u, is what comes out of going backward."""
    found = reference.margins(case.net, case.x, case.y, case.ball, "symbolic")
    wanted = forward.margins(case.net, case.x, case.y, case.ball, "symbolic")
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


# The engine


@settings(max_examples=80, deadline=None, database=None, derandomize=True)
@given(networks.cases())
def test_random_nets_equal_the_reference(case: networks.Case) -> None:
    case = case.double()
    for method in METHODS:
        try:
            wanted = reference.output_bounds(case.net, case.x, case.ball, method)
            wanted_margins = reference.margins(case.net, case.x, case.y, case.ball, method)
        except reference.Tied:
            reject()
        found = networks.outputs(bounds.output_bounds(case.net, case.x, case.ball, method), pairs=True)
        for pair, wanted_pair in zip(found, wanted, strict=True):
            for end, wanted_end in zip(pair, wanted_pair, strict=True):
                assert apart(end, wanted_end) < 1e-7, method
        margins = networks.outputs(bounds.margins(case.net, case.x, case.y, case.ball, method))
        for margin, wanted_margin in zip(margins, wanted_margins, strict=True):
            assert apart(margin, wanted_margin) < 1e-7, method


def apart(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, in units of the largest value."""
    return ((found - wanted).abs().max() / (1 + wanted.abs().max())).item()


class Dense(nn.Module):
    """Joined maps of different depth."""

    def __init__(self) -> None:
        super().__init__()
        self.grow = nn.ModuleList(nn.Conv2d(c, 2, 3, padding=1) for c in (2, 4))
        self.stem, self.down, self.last = nn.Conv2d(1, 2, 3, 2, 1), nn.AvgPool2d(2), nn.Linear(6 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.stem(x)]
        for layer in self.grow:
            maps.append(layer(F.relu(torch.cat(maps, 1))))
        return self.last(self.down(F.relu(torch.cat(maps, 1))).flatten(1))


def residual() -> nn.Module:
    block = models.ResidualBlock
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, 1, 1), nn.ReLU(), block(3, 3, down=True), block(3, 4, down=True), block(4, 4, down=False),
        nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip


def pooled(activation: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(
        models.Normalize([0.4], [0.3]), nn.Conv2d(1, 3, 3, padding=1), nn.MaxPool2d(3, 2, 1), activation(),
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), activation(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(36, 6), activation(), nn.Linear(6, 3),
    )  # fmt: skip


NETS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 4, 2, 1), nn.ReLU(),
        nn.Conv2d(4, 4, 3, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10), nn.ReLU(), nn.Linear(10, 3),
    ),
    "residual": residual,
    "joined": Dense,
    "pooled, leaky ReLU": lambda: pooled(lambda: nn.LeakyReLU(0.1)),
    "pooled, hardtanh": lambda: pooled(nn.Hardtanh),
    "pooled, sigmoid": lambda: pooled(nn.Sigmoid),
    "pooled, GELU": lambda: pooled(nn.GELU),
}  # fmt: skip


@functools.cache
def problem(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Maps of 12 x 12, so that rows are windows for some layers and whole maps for others."""
    net = networks.randomise(NETS[name](), torch.Generator().manual_seed(3), 0.8).eval()
    generator = torch.Generator().manual_seed(4)
    coarse = torch.rand(2, 1, 6, 6, generator=generator) * 1.4 - 0.3
    x = F.interpolate(coarse, size=12, mode="bilinear").clamp(0, 0.95)
    # No two patches are alike: the inputs of a pooling window do not tie.
    return net, x + 0.05 * torch.rand(x.shape, generator=generator), torch.tensor([2, 0])


@pytest.mark.parametrize(
    ("name", "ball"),
    [(name, "inf") for name in NETS]
    + [(name, norm) for name in ("plain", "joined", "pooled, GELU") for norm in "21"],
)
def test_margins_and_their_gradients_equal_the_reference(
    name: str, ball: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the loss of training, to every parameter: automatic through the dense float64 form."""
    single, x, y = problem(name)
    net = forward.in_double(single)
    parameters = list(net.parameters())
    for method in reference.METHODS:
        [wanted] = reference.margins(net, x, y, BALLS[ball], method)
        expected = torch.autograd.grad(F.cross_entropy(-wanted, y), parameters)
        # By whole fields throughout, and by single units throughout.
        for share in (0.0, 2.0):
            monkeypatch.setattr(relaxation, "DENSE_SHARE", share)
            assert apart(bounds.margins(single, x, y, BALLS[ball], method), wanted) < 1e-5, method
            found = bounds.margins(net, x.double(), y, BALLS[ball], method)
            assert apart(found, wanted) < 1e-7, method
            gradients = torch.autograd.grad(F.cross_entropy(-found, y), parameters)
            for mine, theirs in zip(gradients, expected, strict=True):
                assert apart(mine, theirs) < 1e-5, method


@pytest.mark.parametrize("norm", ["inf", "2", "1"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_of_every_form_equal_the_reference(kind: str, norm: str) -> None:
    torch.manual_seed(0)
    net, ball = Outputs(kind).double(), Ball(0.3, norm)
    x, y = torch.rand(3, 1, 4, 4).double(), torch.tensor([0, 1, 2])
    for method in reference.METHODS:
        wanted = reference.margins(net, x, y, ball, method)
        found = networks.outputs(bounds.margins(net, x, y, ball, method))
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    # Where nothing is trainable, an exit without activations depends on nothing that an ascent could move.
    alphas = networks.outputs(bounds.margins(net.requires_grad_(False), x, y, ball, "alpha-crown"))
    for crown, alpha in zip(found, alphas, strict=True):
        assert (alpha >= crown - 1e-12).all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("method", bounds.TECHNIQUES)
def test_bounds_are_the_same_in_every_mode_of_autograd(method: str, mode: Callable[[], Any]) -> None:
    net, x, y = problem("plain")
    wanted = bounds.margins(net, x, y, BALLS["inf"], method)
    with mode():
        found = bounds.margins(net, x, y, BALLS["inf"], method)
    torch.testing.assert_close(found.clone(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", bounds.TECHNIQUES)
def test_one_class_has_no_rivals(method: str) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 1))
    margins = bounds.margins(net, torch.rand(2, 1, 4, 4), torch.zeros(2, dtype=torch.long), Ball(0.1), method)
    assert margins.tolist() == [[0.0], [0.0]]
