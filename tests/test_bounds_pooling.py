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
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("ties", [False, True])
def test_the_largest_lies_between_two_relus_of_the_chosen_input(
    kind: str, ties: bool, parallel: bool
) -> None:
    operation, truth = pool(kind, ceil=True)
    exact = 0
    for seed in range(5):
        lower, upper = boxes(seed, ties)
        best, low, high, floor, ceiling = operation.choose(lower, upper, parallel=parallel)
        assert torch.equal(low, at(lower, best)) and torch.equal(high, at(upper, best))
        assert torch.equal(floor, truth(lower))
        decided = ceiling <= low
        generator = torch.Generator().manual_seed(seed)
        for _ in range(30):
            share = torch.rand(lower.shape, generator=generator, dtype=torch.float64)
            z = lower + (upper - lower) * share.round() if seed % 2 else lower + (upper - lower) * share
            largest, chosen = truth(z), at(z, best)
            assert (largest >= chosen.maximum(floor)).all()
            assert (largest <= chosen.maximum(ceiling)).all()
            assert torch.equal(largest[decided], chosen[decided])
        exact += int(decided.sum())
    assert exact > 0


def at(z: Tensor, best: Tensor) -> Tensor:
    return z.flatten(2).gather(2, best.flatten(2)).view(best.shape)


def area(low: float, high: float, floor: float, ceiling: float, parallel: bool) -> float:
    """What lines around max(z, floor) and max(z, ceiling) leave between them at mid-interval, at least."""
    if ceiling <= low:
        return 0.0
    chord = (max(high, ceiling) - ceiling) / (high - low) if high > low else 0.0
    above = (max(low, ceiling) + max(high, ceiling)) / 2
    middle = (low + high) / 2
    if parallel:
        turn = min(max(floor, low), high)
        return above - (max(turn, floor) + chord * (middle - turn))
    return above - max(middle, floor)


@pools
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("ties", [False, True])
def test_no_other_input_leaves_less_between_the_lines(kind: str, ties: bool, parallel: bool) -> None:
    operation, _ = pool(kind, ceil=True)
    better_than_first = 0
    for seed in range(2):
        lower, upper = boxes(seed, ties)
        chosen = operation.choose(lower, upper, parallel=parallel)
        low, high = (operation.windows(end, -math.inf)[0, 0].T.tolist() for end in (lower, upper))
        found = zip(*(part[0, 0].flatten().tolist() for part in chosen[1:]), strict=True)
        for lows, highs, ends in zip(low, high, found, strict=True):
            floor, areas = max(lows), []
            for i, end in enumerate(highs):
                if end > -math.inf:
                    rivals = max([*highs[:i], *highs[i + 1 :]], default=-math.inf)
                    areas.append(area(lows[i], end, floor, rivals, parallel))
            assert area(*ends, parallel) == pytest.approx(min(areas), abs=1e-12)
            better_than_first += areas[0] > min(areas) + 1e-6
    assert better_than_first > 0


@pools
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("ties", [False, True])
def test_only_contenders_matter(kind: str, ties: bool, parallel: bool) -> None:
    """Tighter bounds of any other input change nothing: so only contenders need bounding."""
    operation, _ = pool(kind, ceil=True)
    left_out = 0
    for seed in range(5):
        lower, upper = boxes(seed, ties)
        contenders = operation.contenders(lower, upper)
        share = torch.rand(lower.shape, generator=torch.Generator().manual_seed(seed)).double()
        point = lower + (upper - lower) * share
        low, high = lower.where(contenders, point), upper.where(contenders, point)
        before, after = (operation.choose(*ends, parallel=parallel) for ends in ((lower, upper), (low, high)))
        decided = before[4] <= before[1]
        assert torch.equal(decided, after[4] <= after[1])
        for one, other in zip(before, after, strict=True):
            assert torch.equal(one[~decided], other[~decided])
        left_out += int((~contenders).sum())
    assert left_out > 0


def test_what_is_unknown_contends() -> None:
    operation, _ = pool("2x2")
    lower, upper = boxes(0)
    upper[0, 0, 0, 0] = math.nan
    assert operation.contenders(lower, upper)[0, 0, 0, 0]
    lower[1, 1, 2, 2] = math.nan
    assert operation.contenders(lower, upper)[1, 1, 2:4, 2:4].all()
