"""Bounds in whatever mode of torch they are asked for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from swiftsure import bounds
from swiftsure.ball import Ball
from swiftsure.errors import InputError

METHODS = tuple(bounds.TECHNIQUES)
BALL = Ball(0.05)


def net() -> nn.Sequential:
    """With operations whose rows go back through torch's own gradients."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(3, 2, 2, 2),
        nn.BatchNorm2d(2),
        nn.AdaptiveAvgPool2d(3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(18, 4),
    ).eval()


X, Y = torch.rand(3, 1, 5, 5, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 3, 1])


def assert_as_ever(network: nn.Module, method: str) -> None:
    with torch.no_grad():
        wanted = bounds.margins(net(), X.clone(), Y, BALL, method)
        ends = bounds.output_bounds(net(), X.clone(), BALL, method)
    found = [bounds.margins(network, X, Y, BALL, method), *bounds.output_bounds(network, X, BALL, method)]
    for part, expected in zip(found, (wanted, *ends), strict=True):
        torch.testing.assert_close(part.detach(), expected)


@pytest.mark.parametrize("method", METHODS)
def test_no_type_of_autocast_is_that_of_bounds(method: str) -> None:
    """Eight bits would put bounds a hundredth off, on either side."""
    network = net()
    with torch.autocast("cpu", torch.bfloat16):
        assert network(X).dtype == torch.bfloat16
        assert_as_ever(network, method)


@pytest.mark.parametrize("method", METHODS)
def test_a_network_may_be_made_in_inference_mode(method: str) -> None:
    with torch.inference_mode():
        network = copy.deepcopy(net())
        assert network[0].weight.is_inference()
        assert_as_ever(network, method)
    with torch.no_grad():
        assert_as_ever(network, method)


def test_types_coarser_than_float32_are_refused() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(InputError, match=r"float16.*float32 and float64"):
            bounds.margins(net().to(dtype), X.to(dtype), Y, BALL)
        with pytest.raises(InputError, match=r"float16.*float32 and float64"):
            bounds.output_bounds(net().to(dtype), X.to(dtype), BALL)
