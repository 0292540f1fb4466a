"""What training for a proof of answer and cost rests on: the leaving term, and thresholds within a certified budget."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import small_run
from swiftsure import calibration, data, run_exits
from swiftsure.certificates import FLOOR, certify, within_certified_macs
from swiftsure.errors import InputError
from swiftsure.exits import Policy
from swiftsure.training.leaving import Leaving, leaving_loss
from trained import BALLS, held_out
from trained_exits import exits

BALL = BALLS[0]
PROVEN = (1.0, 1.0, 1.0)
COUNT = 36


def entropy_of(margin: float) -> float:
    """Of two classes whose logits differ by that much."""
    p = 1 / (1 + math.exp(-margin))
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


@pytest.mark.parametrize("rule", ["entropy", "confidence"])
def test_the_leaving_term_pulls_what_is_proven_and_pushes_what_is_not(rule: str) -> None:
    # Margins of the label: from 1 to 2, which proves it, and from -1 to 2, which does not. The last exit has no term.
    lower = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], requires_grad=True)
    upper = torch.tensor([[0.0, 2.0], [2.0, 0.0]], requires_grad=True)
    last = torch.full((2, 2), torch.nan)
    threshold = 0.5 if rule == "entropy" else 0.8
    value = leaving_loss(
        [(lower, upper), (last, last)], torch.tensor([0, 1]), Leaving(1.0, rule, [threshold])
    )
    if rule == "entropy":
        expected = (entropy_of(1.0) - threshold) + (threshold - entropy_of(2.0))
    else:
        expected = (threshold - 1 / (1 + math.exp(-1.0))) + (1 / (1 + math.exp(-2.0)) - threshold)
    assert value.item() == pytest.approx(expected / 2, abs=1e-6)
    to_lower, to_upper = torch.autograd.grad(value, (lower, upper))
    # Surer where proven, by the margin's lower end; less sure where not, by its upper end.
    assert to_lower[0, 1] < 0 and to_upper[0, 1] == 0
    assert to_upper[1, 0] > 0 and to_lower[1, 0] == 0


@pytest.mark.parametrize("rule", ["entropy", "confidence"])
def test_thresholds_within_a_budget_promise_what_is_certified(rule: str) -> None:
    net, images = exits("attached", PROVEN, 150), held_out(COUNT)
    x, y = images.batch(slice(None))
    costs = net.macs(images.shape)
    closed = Policy(rule, [0.0, 0.0] if rule == "entropy" else [1.0, 1.0])
    least = certify(net, x, y, BALL, closed, "interval", delta=FLOOR).certified.double().mean().item()
    before = 0.0
    for budget in (costs[0] * 1.2, sum(costs) / 3, costs[-1]):
        promise = within_certified_macs(net, images, BALL, budget, rule, ("interval",))
        proof = certify(net, x, y, BALL, promise.policy, "interval", delta=FLOOR)
        assert promise.macs <= budget
        assert proof.certified.double().mean().item() == pytest.approx(promise.verified)
        # Images that are misclassified are bounded about the label when thresholds are fitted, no better than that.
        assert proof.max_macs.double().mean().item() <= promise.macs + 1e-6
        assert promise.verified >= before
        before = promise.verified
        for macs in costs:
            assert proof.certified_slowdown(macs) == (proof.max_macs <= macs).double().mean().item()
        assert proof.certified_slowdown(costs[-1]) == 1.0
        assert proof.certified_slowdown(costs[0] - 1) == 0.0
    assert before >= least
    with pytest.raises(InputError, match="below the"):
        within_certified_macs(net, images, BALL, costs[0] - 1, rule, ("interval",))


def test_a_certified_budget_is_fitted_to_held_out_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = small_run.train(tmp_path / "run", "exits.at={2: pooled}")
    seen = []
    fit = run_exits.within_certified_macs

    def watched(net, images, *rest):  # type: ignore[no-untyped-def]
        seen.append(images.sha256())
        return fit(net, images, *rest)

    monkeypatch.setattr(run_exits, "within_certified_macs", watched)
    found = calibration.calibrate_run(folder, certified_macs=1e9, device="cpu")
    assert seen == [data.load("digits").calibration.sha256()]
    assert found.n == len(data.load("digits").calibration)


def test_one_exit_has_nothing_to_leave_by() -> None:
    bounds = (torch.rand(3, 4), torch.rand(3, 4) + 1)
    assert leaving_loss([bounds], torch.tensor([0, 1, 2]), Leaving(1.0, "entropy", [])) == 0
