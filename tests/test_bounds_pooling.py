"""Max pooling against random points of its boxes: what its relaxation rests on."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swiftsure.bounds import operations as ops

POOLS = {
    "2x2": {"kernel": 2, "stride": None, "padding": 0, "dilation": 1},
    "3x3 overlapping, padded": {"kernel": 3, "stride": 2, "padding": 1, "dilation": 1},
    "3x2": {"kernel": (3, 2), "stride": (1, 2), "padding": (1, 0), "dilation": 1},
    "dilated": {"kernel": 2, "stride": 1, "padding": 1, "dilation": 2},
    "whole map": {"kernel": (5, 6), "stride": None, "padding": 0, "dilation": 1},
}
pools = pytest.mark.parametrize("kind", POOLS)


def pool(kind: str, ceil: bool = False) -> tuple[ops.MaxPool2d, Callable[[Tensor], Tensor]]:
    options = POOLS[kind]

    def truth(z: Tensor) -> Tensor:
        return F.max_pool2d(
            z, options["kernel"], options["stride"], options["padding"], options["dilation"], ceil
        )

    shape = tuple(truth(torch.zeros(1, 2, 5, 6)).shape[1:])
    return ops.max_pool(**options, input_shape=(2, 5, 6), output_shape=shape), truth


def boxes(seed: int, ties: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lower = torch.randn(3, 2, 5, 6, generator=generator, dtype=torch.float64)
    upper = lower + torch.rand(lower.shape, generator=generator, dtype=torch.float64) * 1.5
    # After a ReLU many lower bounds are 0 at once, and some units are 0 for certain.
    return (lower.relu(), upper.relu()) if ties else (lower, upper)


@pools
@pytest.mark.parametrize("ceil", [False, True])
def test_max_pooling_is_torchs(kind: str, ceil: bool) -> None:
    operation, truth = pool(kind, ceil)
    lower, upper = boxes(0)
    assert torch.equal(operation.value(lower), truth(lower))
    assert all(
        torch.equal(a, truth(b)) for a, b in zip(operation.range(lower, upper), (lower, upper), strict=True)
    )


@pools
@pytest.mark.parametrize("ties", [False, True])
def test_the_chosen_input_bounds_the_largest(kind: str, ties: bool) -> None:
    operation, truth = pool(kind, ceil=True)
    exact = 0
    for seed in range(5):
        lower, upper = boxes(seed, ties)
        best, excess, highest = operation.choose(lower, upper)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(30):
            share = torch.rand(lower.shape, generator=generator, dtype=torch.float64)
            z = lower + (upper - lower) * share.round() if seed % 2 else lower + (upper - lower) * share
            largest = truth(z)
            chosen = z.flatten(2).gather(2, best.flatten(2)).view_as(largest)
            assert (largest >= chosen).all()
            assert (largest <= chosen + excess + 1e-12).all()
            assert (largest <= highest + 1e-12).all()
            assert torch.equal(largest[excess == 0], chosen[excess == 0])
        exact += int((excess == 0).sum())
        assert torch.equal(highest, truth(upper))
    assert exact > 0


@pools
@pytest.mark.parametrize("ties", [False, True])
def test_only_contenders_matter(kind: str, ties: bool) -> None:
    """Tighter bounds of any other input change nothing: so only contenders need bounding."""
    operation, _ = pool(kind, ceil=True)
    left_out = 0
    for seed in range(5):
        lower, upper = boxes(seed, ties)
        contenders = operation.contenders(lower, upper)
        share = torch.rand(lower.shape, generator=torch.Generator().manual_seed(seed)).double()
        point = lower + (upper - lower) * share
        low, high = lower.where(contenders, point), upper.where(contenders, point)
        before, after = operation.choose(lower, upper), operation.choose(low, high)
        decided = before[1] == 0
        assert torch.equal(before[1], after[1])
        assert torch.equal(before[0][~decided], after[0][~decided])
        assert torch.equal(before[2][~decided], after[2][~decided])
        left_out += int((~contenders).sum())
    assert left_out > 0


def test_what_is_unknown_contends() -> None:
    operation, _ = pool("2x2")
    lower, upper = boxes(0)
    upper[0, 0, 0, 0] = math.nan
    assert operation.contenders(lower, upper)[0, 0, 0, 0]
    lower[1, 1, 2, 2] = math.nan
    assert operation.contenders(lower, upper)[1, 1, 2:4, 2:4].all()
