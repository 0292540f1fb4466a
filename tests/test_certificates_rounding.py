"""The slack for rounding: what it must see, and what it must leave alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftsure import bounds
from swiftsure.ball import Ball
from swiftsure.certificates import FLOOR, METHODS, SAFETY, certify, rounding_slack
from swiftsure.errors import InputError
from trained import BALLS, held_out, network


def perturb(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    """Linear layers whose float32 results are changed, and whose float64 ones are exact."""
    exact = F.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        z = exact(x, weight, bias)
        return change(z) if z.dtype == torch.float32 else z

    monkeypatch.setattr(F, "linear", linear)


def wave(z: Tensor) -> Tensor:
    return z + 1e-3 * torch.linspace(-1, 1, z.shape[1])


def alternating(z: Tensor) -> Tensor:
    return wave(z) if len(z) == 7 else z


@pytest.mark.parametrize("change", [wave, alternating], ids=["always", "in batches of 7"])
@pytest.mark.parametrize("method", METHODS)
def test_a_coarse_float32_is_seen(
    monkeypatch: pytest.MonkeyPatch, method: str, change: Callable[[Tensor], Tensor]
) -> None:
    x, _ = held_out(8).batch(slice(None))
    quiet = rounding_slack(network(), x, BALLS[0], method)
    perturb(monkeypatch, change)
    assert FLOOR <= quiet < 1e-3 < SAFETY * 1e-3 <= rounding_slack(network(), x, BALLS[0], method)


@pytest.mark.parametrize("method", ["interval", "symbolic"])
def test_only_bounds_that_prove_count_and_beside_the_network(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    x, _ = held_out(8).batch(slice(None))
    real, seen = bounds.difference_bounds, []

    def coarse(bound: Any, graph: Any, region: Any, y: Tensor, *, upper: bool) -> Any:
        ((lower, above),) = real(bound, graph, region, y, upper=upper)
        seen.append(lower)
        # What proves nothing may be as coarse as it likes.
        if lower.dtype == torch.float32:
            lower = lower + (1e-3 * (lower > 0.1) - 0.05 * (lower < -0.1))
        return [(lower, above)]

    monkeypatch.setattr("swiftsure.certificates._rounding.difference_bounds", coarse)
    monkeypatch.setattr("swiftsure.certificates._rounding._network_rounding", lambda *_: 2e-3)
    assert rounding_slack(network(), x, Ball(0.12), method) == pytest.approx(SAFETY * 3e-3, rel=0.02)
    assert (seen[0] > 0.1).any()
    assert (seen[0] < -0.1).any()


def test_a_false_proof_in_float32_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds that prove nothing in float64 but something in float32 count, unlike those that prove nothing in both."""
    x, _ = held_out(4).batch(slice(None))
    ball = Ball(0.9)
    monkeypatch.setattr(
        "swiftsure.certificates._rounding._bounds",
        lambda net, x, y, ball, method: [
            (torch.full((len(x), 10), 0.5 if x.dtype == torch.float32 else -0.5).to(x),)
        ],
    )
    assert rounding_slack(network(), x, ball, "interval") >= SAFETY


def test_cancellation_in_a_layer_raises_it() -> None:
    """Two units of size 1e4 that cancel: the float32 network is right to a few thousandths only."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.rand(4, 1, 4, 4)
    calm = rounding_slack(net, x, Ball(1e-4))
    loud = copy.deepcopy(net)
    with torch.no_grad():
        loud[1].bias += 1e4
        loud[3].bias -= 1e4 * loud[3].weight.sum(1)
    assert calm == FLOOR
    assert rounding_slack(loud, x, Ball(1e-4)) > 1e-3
    assert certify(loud, x, ball=Ball(1e-4)).delta == rounding_slack(loud, x, Ball(1e-4))


def test_the_floor_holds_where_nothing_rounds() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    for module in net.parameters():
        nn.init.zeros_(module)
    x = torch.zeros(4, 1, 4, 4)
    assert rounding_slack(net, x, Ball(0.1)) == FLOOR
    assert rounding_slack(net, x[:0], Ball(0.1)) == FLOOR
    assert rounding_slack(net.double(), x.double(), Ball(0.1)) == FLOOR


def test_what_is_not_finite_does_not_hide_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = held_out(8).batch(slice(None))
    broken = copy.deepcopy(network())
    with torch.no_grad():
        broken[-1].bias[3] = torch.nan
    assert rounding_slack(broken, x, BALLS[0]) == FLOOR

    def first_broken(z: Tensor) -> Tensor:
        z = wave(z)
        z[0] = torch.nan
        return z

    perturb(monkeypatch, first_broken)
    assert SAFETY * 1e-3 <= rounding_slack(network(), x, BALLS[0], "interval") < 1


def test_measuring_changes_nothing_and_repeats() -> None:
    net = network()
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x, _ = held_out(8).batch(slice(None))
    first, state = rounding_slack(net, x, BALLS[0]), torch.get_rng_state()
    assert rounding_slack(net, x, BALLS[0]) == first
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in net.modules())
    for name, value in net.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


def test_an_unknown_method_is_one_line() -> None:
    with pytest.raises(InputError, match="'milp'"):
        rounding_slack(network(), torch.zeros(0, 1, 8, 8), BALLS[0], "milp")
