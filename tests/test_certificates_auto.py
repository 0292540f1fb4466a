"""Certificates by all techniques in turn: an exit at a time, only as far as it helps, and without losing proofs."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from swiftsure import models
from swiftsure.ball import Ball
from swiftsure.bounds import TECHNIQUES, Graph, Kept, Region, alpha_crown, crown, difference_bounds, trace
from swiftsure.certificates import FLOOR, Certificate, _proof, certify, recheck, write
from swiftsure.certificates._certify import certify_by
from swiftsure.exits import MultiExit, Policy
from trained import held_out
from trained_exits import exits

COUNT = 32
START = 80
"""Among these are two that take ascents at two exits."""
BALL = Ball(0.08)
POLICY = Policy("entropy", [0.8, 0.8])


def net() -> MultiExit:
    return exits("attached", (0.0, 0.0, 1.0))


def images() -> tuple[Tensor, Tensor]:
    return held_out(COUNT, START).batch(slice(None))


@functools.cache
def auto() -> Certificate:
    return certify(net(), *images(), BALL, POLICY, delta=FLOOR)


def test_hardly_a_proof_is_lost_against_every_technique_on_every_sample_and_exit() -> None:
    names = tuple(TECHNIQUES)
    most = certify_by(names, net(), *images(), BALL, POLICY, asked="auto", delta=FLOOR, frugal=False)
    found = auto()
    assert {"none", "interval", "crown-ibp", "alpha-crown"} <= set(found.method)
    assert not (found.certified & ~most.certified).any()
    assert int((most.certified & ~found.certified).sum()) <= 1
    assert (found.max_exit >= most.max_exit).all()


def test_a_dear_technique_bounds_one_exit_of_a_sample_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, int] = {}
    real = _proof.Proof.add

    def counting(proof, name, part, ball, delta, exit=None):  # type: ignore[no-untyped-def]
        if name != "interval":
            # What stands between label and proof, and where nothing is lost yet.
            assert proof.open[part, exit].all()
            assert not (proof.failing[part, exit + 1 :].any(1) & (proof.exit[part] > exit)).any()
            assert not (proof.certified | proof.broken | ~proof.right)[part].any()
        asked[name] = asked.get(name, 0) + len(part)
        real(proof, name, part, ball, delta, exit)

    monkeypatch.setattr(_proof.Proof, "add", counting)
    certify(net(), *images(), BALL, POLICY, delta=FLOOR)
    assert asked["crown-ibp"] > asked["symbolic"] >= asked["crown"] >= asked["alpha-crown"] > 0


def test_what_takes_ascents_at_two_exits_is_proven_again(tmp_path: Path) -> None:
    """The slopes of both are kept, though the first ascent alone proved nothing."""
    found, deployed = auto(), net()
    ascents = [{exit for exit, _ in slopes} for slopes in found.slopes if slopes]
    assert any(len(own) > 1 for own in ascents)
    before = deployed.policy
    try:
        deployed.policy = POLICY
        models.save(deployed, tmp_path)
        write(tmp_path, found, held_out(COUNT, START))
        again = recheck(deployed, tmp_path, held_out(COUNT, START))
    finally:
        deployed.policy = before
    assert again.certified == int(found.certified.sum()) > 0
    assert again.by_reference == COUNT
    assert again.largest_difference < 1e-4


# The ascent itself


def problem(count: int) -> tuple[Graph, Region, Tensor]:
    x, y = held_out(count, START).batch(slice(None))
    return trace(net(), x), Region(x, BALL), y


def ascent(count: int, kept: Kept | None = None, **options: object) -> list[tuple[Tensor, Tensor]]:
    def bound(graph, region, spec=None, *, upper=True):  # type: ignore[no-untyped-def]
        return alpha_crown(graph, region, spec, upper=upper, kept=kept, **options)

    graph, region, y = problem(count)
    return difference_bounds(bound, graph, region, y, upper=bool(options.get("above")))


def test_one_output_alone_is_bounded_as_among_others() -> None:
    several, alone = ascent(8), ascent(8, only=1)
    torch.testing.assert_close(alone[1][0], several[1][0], rtol=1e-4, atol=1e-4)
    others = torch.ones_like(alone[0][0], dtype=torch.bool).scatter(1, problem(8)[2][:, None], False)
    for exit in (0, 2):
        assert (alone[exit][0][others] == -torch.inf).all()
        assert (alone[exit][1][others] == torch.inf).all()


def test_a_graph_with_one_output_alone() -> None:
    graph, region, y = problem(8)
    several = difference_bounds(crown, graph, region, y)
    for exit in range(3):
        (alone,) = difference_bounds(crown, graph.only(exit), region, y)
        for side, wanted in zip(alone, several[exit], strict=True):
            torch.testing.assert_close(side, wanted)


def test_samples_that_are_settled_leave_the_ascent_and_change_nothing_for_the_others() -> None:
    """Alone a sample is carried to the end; among others it goes on in ever smaller parts."""
    kept: Kept = {}
    several = ascent(COUNT, kept, only=2)[2][0]
    x, y = images()
    climbed = sorted({sample for sample, _, _ in kept})
    assert 3 < len(climbed) < COUNT
    for sample in climbed[:4]:
        own: Kept = {}

        def bound(graph, region, spec=None, *, upper=True, own=own):  # type: ignore[no-untyped-def]
            return alpha_crown(graph, region, spec, upper=upper, kept=own, only=2)

        image = x[sample : sample + 1]
        found = difference_bounds(
            bound, trace(net(), image), Region(image, BALL), y[sample : sample + 1], upper=False
        )
        torch.testing.assert_close(found[2][0][0], several[sample], rtol=1e-2, atol=1e-2)
        slopes, wanted = kept[sample, 2, False], own[0, 2, False]
        assert torch.equal(slopes.function, wanted.function) and torch.equal(slopes.unit, wanted.unit)
        apart = (slopes.levels.int() - wanted.levels.int()).abs()
        assert apart.double().mean() < 10


def test_giving_up_loses_no_proof_and_saves_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from swiftsure.bounds._substitution import Substitution

    rows = []
    real = Substitution.reach

    def counting(self, target, given, *args, **options):  # type: ignore[no-untyped-def]
        if given.function is not None:
            rows.append(len(given.values))
        return real(self, target, given, *args, **options)

    monkeypatch.setattr(Substitution, "reach", counting)
    patient = ascent(COUNT, only=2)[2][0]
    needed, _ = sum(rows), rows.clear()
    hasty = ascent(COUNT, only=2, give_up=True)[2][0]
    assert sum(rows) < 0.6 * needed
    own = torch.nn.functional.one_hot(images()[1], 10).bool()
    proven = (patient > 0).masked_fill(own, True).all(1)
    start = (ascent(COUNT, only=2, steps=0)[2][0] > 0).masked_fill(own, True).all(1)
    assert (proven & ~start).any()
    assert torch.equal((hasty > 0).masked_fill(own, True).all(1), proven)
    assert (hasty <= patient + 1e-3).all()
