"""Curves over thresholds: held-out thresholds, fixed attacks, cumulative costs, one point for one exit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import small_run
from swiftsure import run_exits, sweep
from swiftsure.errors import InputError
from swiftsure.exits import Policy, all_logits, equal_share, exit_macs, in_shares
from swiftsure.subject import open_subject

COSTS = [10, 25, 60]


def logits(samples: int = 80, exits: int = 3, classes: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(samples, classes, generator=generator) * (1 + exit) for exit in range(exits)]


@pytest.mark.parametrize("rule", ["entropy", "confidence"])
def test_thresholds_in_given_shares(rule: str) -> None:
    z = logits(100)
    for shares in ([1, 2, 1], [0, 1, 0], [1, 0, 0], [0, 0, 3], [0.5, 0.25, 0.25]):
        found = in_shares(z, shares, rule).exit_of(z).bincount(minlength=3)
        assert found.tolist() == pytest.approx([100 * share / sum(shares) for share in shares], abs=0.5)
    assert in_shares(z, [7, 7, 7], rule) == equal_share(z, rule)


@pytest.mark.parametrize(
    "shares", [[1, 1], [1, -1, 1], [0, 0, 0], [1, float("nan"), 1], [1, float("inf"), 1], [1, "2", 3]]
)
def test_shares_that_cannot_be(shares) -> None:
    with pytest.raises(InputError, match="3 numbers >= 0, not all 0"):
        in_shares(logits(), shares)


def test_the_family_goes_from_the_first_exit_to_the_last() -> None:
    z = logits(400)
    policies = sweep.policies_of(z)
    used = torch.tensor([sweep.shares(policy, z) for policy in policies])
    assert used[0].tolist() == [1, 0, 0]
    assert used[-1].tolist() == [0, 0, 1]
    assert equal_share(z) in policies
    cost = used.double() @ torch.tensor(COSTS, dtype=torch.float64)
    assert bool((cost.diff() > 0).all())
    # Geometric: each exit gets the same multiple of the one before it.
    assert used[9].tolist() == pytest.approx([0.227, 0.321, 0.453], abs=0.01)


def test_a_point_by_hand() -> None:
    sure, unsure = [9.0, 0.0], [0.1, 0.0]
    clean = [torch.tensor([sure, sure, unsure]), torch.tensor([sure, sure, sure])]
    y = torch.tensor([0, 1, 0])
    # Of the two samples that are attacked, the first is right under one attack only, by way of the last exit.
    attacked = {
        "a": [torch.tensor([unsure, unsure]), torch.tensor([[0.0, 9.0], [0.0, 9.0]])],
        "b": [torch.tensor([sure, sure]), torch.tensor([sure, sure])],
    }
    found = sweep.point(Policy("entropy", [0.5]), clean, attacked, y, [10, 30])
    assert found == {
        "thresholds": [0.5],
        "macs": pytest.approx((10 + 10 + 30) / 3),
        "accuracy": pytest.approx(2 / 3),
        "attacked_macs": pytest.approx((30 + 30 + 10 + 10) / 4),
        "attacked_accuracy": 0.0,
    }
    kinder = {"b": attacked["b"]}
    assert sweep.point(Policy("entropy", [0.5]), clean, kinder, y, [10, 30])["attacked_accuracy"] == 0.5


def test_the_curve_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_exits, "STEPS", 8)
    folder = small_run.train(
        tmp_path / "run", "loss.proven=false", "schedule.ramp=0", "optimizer.rate=0.01", "exits.count=3",
        "evaluate.limit=null", "ball.eps=0.1",
    )  # fmt: skip
    subject = open_subject(folder, limit=300, device="cpu")
    monkeypatch.setattr(sweep, "ATTACKED", 120)
    found = sweep.sweep(subject)
    assert found["attacks"] == [
        "pgd8_exit1",
        "pgd8_exit2",
        "pgd8_main",
        "pgd8_average",
    ]
    assert (found["n"], found["attacked_n"]) == (300, 120)
    costs = exit_macs(subject.net)
    points = found["points"]
    assert points[0]["macs"] == points[0]["attacked_macs"] == costs[0]
    assert points[-1]["macs"] == points[-1]["attacked_macs"] == costs[-1]
    # The ends are what single exits do, each attacked by its own loss among others.
    clean = all_logits(subject.net, subject.images)
    for place, exit in ((0, 0), (-1, 2)):
        right = (clean[exit].argmax(1) == subject.images.labels).double().mean().item()
        assert points[place]["accuracy"] == pytest.approx(right)
        assert points[place]["attacked_accuracy"] < right - 0.05
    # Thresholds are fitted to held-out images, and the deployed ones stand beside the curve.
    held_out = all_logits(subject.net, subject.held_out)
    assert [Policy("entropy", point["thresholds"]) for point in points] == sweep.policies_of(held_out)
    deployed = found["deployed"]
    answers = subject.answers()
    assert deployed["macs"] == pytest.approx(answers.macs.double().mean().item())
    assert deployed["accuracy"] == pytest.approx(
        (answers.label == subject.images.labels).double().mean().item()
    )
    assert set(deployed["exits"]) == {"clean", *found["attacks"]}
    assert all(sum(shares) == pytest.approx(1) for shares in deployed["exits"].values())
    assert sweep.sweep(subject) == found
    sweep.write(folder, found)
    assert json.loads((folder / "sweep.json").read_text()) == found


def test_one_exit_is_one_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_exits, "STEPS", 8)
    folder = small_run.train(tmp_path / "run", "schedule.epochs=2", "schedule.ramp=0")
    subject = open_subject(folder, limit=50, device="cpu")
    found = sweep.sweep(subject)
    (point,) = found["points"]
    assert found["attacks"] == ["pgd8"]
    assert point == {name: found["deployed"][name] for name in point}
    assert point["macs"] == point["attacked_macs"] == exit_macs(subject.net)[0]
    assert point["attacked_accuracy"] <= point["accuracy"]
    assert found["deployed"]["exits"] == {"clean": [1.0], "pgd8": [1.0]}
