"""Certificates of small networks with exits against a fine grid over each ball, which stands for the truth."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from swiftsure.ball import Ball
from swiftsure.certificates import FLOOR, _proof, certify
from swiftsure.exits import Policy
from unsound_walks import only_the_last_exit

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from small_exits import images, network, truth

POLICIES = (Policy("entropy", [0.5, 0.5]), Policy("confidence", [0.9, 0.9]))
COUNT, POINTS = 40, 31


@pytest.mark.parametrize("ball", [Ball(0.05), Ball(0.07, "2")], ids=lambda ball: ball.norm)
def test_a_grid_agrees(ball: Ball) -> None:
    net, (x, y) = network(2), images(COUNT, 2)
    for policy in POLICIES:
        found = truth(net, x, y, ball, policy, POINTS)
        for method in ("interval", "crown", "auto"):
            claim = certify(net, x, y, ball, policy, method, delta=FLOOR)
            assert not (claim.certified & ~found.safe).any()
            assert (claim.max_exit >= found.deepest).all()
            assert not (found.leaves & ~claim.required).any()
            if method != "interval":
                # What is missed: little, by tight bounds of two inputs.
                assert int(claim.certified.sum()) >= 0.8 * int(found.safe.sum()) > 8


def test_a_grid_notices_a_walk_that_ignores_which_exit_fires(monkeypatch: pytest.MonkeyPatch) -> None:
    net, (x, y) = network(2, proven=0.0), images(4 * COUNT, 2)
    ball, policy = Ball(0.05), Policy("entropy", [0.9, 0.9])
    found = truth(net, x, y, ball, policy, POINTS)
    assert not (certify(net, x, y, ball, policy, "crown", delta=FLOOR).certified & ~found.safe).any()
    monkeypatch.setattr(_proof, "walk", only_the_last_exit)
    wrong = certify(net, x, y, ball, policy, "crown", delta=FLOOR).certified & ~found.safe
    assert torch.count_nonzero(wrong) > 0
