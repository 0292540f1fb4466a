"""The walk over exits, on boxes made by hand and on random ones that are searched for counterexamples."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swiftsure.certificates import _walk
from swiftsure.certificates._walk import Walk, walk
from swiftsure.exits import Policy, entropy
from unsound_walks import WRONG_SECOND_LOOKS, WRONG_WALKS

INF, NAN = math.inf, math.nan
Ends = list[tuple[float, float]]
SURE: Ends = [(-9.0, -8.0), (-9.0, -8.0)]
"""Of z_j - z_0 of two other classes: class 0 has more than .999."""
UNSURE: Ends = [(-1.0, -0.5), (-1.0, -0.5)]
"""Class 0 is the largest, with an entropy near ln 3."""


def one(
    exits: list[Ends], thresholds: list[float], fires: list[bool], rule: str = "entropy", delta: float = 0.0
) -> Walk:
    """The walk of one sample of three classes, labelled 0; ``fires``: what the exits do at the image itself."""
    boxes = [
        (torch.tensor([[0.0, *(low for low, _ in ends)]]), torch.tensor([[0.0, *(high for _, high in ends)]]))
        for ends in exits
    ]
    # Logits that fire at any threshold that can, or at none that is not beyond the largest score.
    logits = [torch.tensor([[0.0, -50.0, -50.0] if fired else [0.0, 0.0, 0.0]]) for fired in fires]
    return walk(boxes, torch.zeros(1, dtype=torch.int64), Policy(rule, thresholds), delta, logits)


def said(found: Walk) -> tuple[float, list[bool], int]:
    return float(found.margin), found.required[0].tolist(), int(found.max_exit)


def test_an_exit_that_cannot_fire_asks_for_nothing() -> None:
    found = one([[(-1.0, 1.0), (-1.0, 1.0)], SURE], [0.1], [False, True])
    assert said(found) == (8.0, [False, True], 1)
    assert not found.open.any()


def test_an_exit_that_always_fires_ends_the_walk() -> None:
    found = one([SURE, [(-5.0, 5.0), (NAN, NAN)]], [0.1], [True, True])
    assert said(found) == (8.0, [True, False], 0)


def test_an_exit_that_may_fire_must_be_right_and_so_must_what_follows() -> None:
    perhaps: Ends = [(-9.0, -2.0), (-9.0, -2.0)]
    assert said(one([perhaps, SURE], [0.1], [True, True])) == (2.0, [True, True], 1)
    assert said(one([perhaps, UNSURE, SURE], [0.1, 0.1], [True, False, True])) == (
        2.0,
        [True, False, True],
        2,
    )
    wrong = one([perhaps, [(-1.0, 3.0), (-1.0, -1.0)]], [0.1], [False, True])
    assert said(wrong) == (-3.0, [True, True], 1)
    # An exit at which the image leaves might turn out to end the walk before the one that fails.
    assert wrong.open.tolist() == [[False, True]]
    assert one([perhaps, [(-1.0, 3.0), (-1.0, -1.0)]], [0.1], [True, True]).open.tolist() == [[True, True]]


def test_the_second_look_at_a_class_that_could_be_the_answer() -> None:
    """Class 1 may win by up to 1 logit, and then the entropy is at least .58; below, only class 0 fires."""
    ends: Ends = [(-9.0, 1.0), (-9.0, -1.0)]
    assert said(one([ends, SURE], [0.5], [True, True])) == (1.0, [True, True], 1)
    assert said(one([ends, SURE], [0.6], [True, True])) == (-1.0, [True, True], 1)
    # The last exit has no threshold, and no second look.
    assert said(one([SURE, ends], [1e-9], [False, True])) == (-1.0, [False, True], 1)


def test_nothing_is_needed_where_only_the_label_can_fire() -> None:
    ends: Ends = [(-9.0, 0.5), (-9.0, 0.5)]
    assert said(one([ends, ends, SURE], [0.3, 0.3], [True, True, True])) == (8.0, [True, True, True], 2)


def test_a_class_that_another_always_exceeds_is_no_rival() -> None:
    """Class 1 may exceed the label, but never class 2, which is far ahead of both: the only wrong answer is class 2."""
    found = one([[(-1.0, 1.0), (5.0, 6.0)], SURE], [0.001], [False, True])
    assert said(found) == (8.0, [False, True], 1)
    assert said(one([[(-1.0, 1.0), (5.0, 6.0)], SURE], [0.05], [True, True])) == (-6.0, [True, True], 1)


def test_ties_prove_nothing() -> None:
    tie: Ends = [(-1.0, 0.0), (-1.0, -1.0)]
    assert said(one([tie], [], [True])) == (0.0, [True], 0)
    assert said(one([SURE, tie], [0.0], [False, True])) == (0.0, [False, True], 1)
    # A class that can only tie with the label is looked at again; where it ties, the entropy is at least ln 2.
    assert said(one([[(-9.0, 0.0), (-9.0, -8.0)], SURE], [0.69], [True, True])) == (8.0, [True, True], 1)
    # An exit fires strictly below its threshold: the entropy of a single point is not below itself.
    point: Ends = [(-1.0, -1.0), (-2.0, -2.0)]
    at = float(entropy(torch.tensor([[0.0, -1.0, -2.0]])))
    for threshold, can in ((at - 1e-9, False), (at + 1e-9, True)):
        assert said(one([point, SURE], [threshold], [can, True]))[1] == [can, not can]
    # Too near to call: it may fire, and it may not.
    assert said(one([point, SURE], [at], [False, True]))[1:] == ([True, True], 1)
    assert said(one([point, SURE], [at], [True, True]))[1:] == ([True, True], 1)


def test_the_image_itself_says_what_can_happen() -> None:
    """An exit that fires at the image can fire, whatever a search says; one that does not cannot always fire."""
    assert said(one([UNSURE, SURE], [0.1], [True, True]))[1:] == ([True, True], 1)
    assert said(one([SURE, SURE], [0.1], [False, True]))[1:] == ([True, True], 1)


def test_boxes_are_widened_by_the_slack() -> None:
    ends: Ends = [(-9.0, -0.5), (-9.0, -0.5)]
    assert said(one([ends], [], [True])) == (0.5, [True], 0)
    # A margin below the slack is none: the class is looked at again, or its margin stands as computed.
    assert said(one([ends, SURE], [0.3], [True, True], delta=0.6)) == (8.0, [True, True], 1)
    assert said(one([ends, SURE], [2.0], [True, True], delta=0.6)) == (0.5, [True, False], 0)
    narrow: Ends = [(-3.0, -3.0), (-3.0, -3.0)]
    least = float(entropy(torch.tensor([[0.0, -3.0, -3.0]])))
    assert said(one([narrow, SURE], [least - 1e-3], [False, True]))[1] == [False, True]
    assert said(one([narrow, SURE], [least - 1e-3], [False, True], delta=0.1))[1] == [True, True]
    assert said(one([narrow, SURE], [least + 1e-3], [True, True]))[1] == [True, False]
    assert said(one([narrow, SURE], [least + 1e-3], [True, True], delta=0.1))[1] == [True, True]


@pytest.mark.parametrize(
    "bad", [(NAN, NAN), (-INF, INF), (NAN, -8.0), (-9.0, NAN), (INF, INF), (-INF, -INF), (2.0, 1.0)]
)
@pytest.mark.parametrize("rule", ["entropy", "confidence"])
def test_ends_that_say_nothing_prove_nothing(bad: tuple[float, float], rule: str) -> None:
    """A NaN, an overflow, or ends that contradict each other: the exit may fire, need not, and with any label."""
    threshold = {"entropy": 5.0, "confidence": 0.0}[rule]
    found = one([[bad, (-9.0, -8.0)], SURE], [threshold], [True, True], rule)
    known = bad[1] == -8.0
    assert said(found) == (8.0 if known else -INF, [True, True], 1)
    last = one([SURE, [bad, (-9.0, -8.0)]], [threshold], [True, True], rule)
    assert said(last) == (8.0, [True, False], 0)
    assert float(one([[bad, (-9.0, -8.0)]], [], [True], rule).margin) == (8.0 if known else -INF)


@pytest.mark.parametrize(("rule", "closed", "opened"), [("entropy", 0.0, 5.0), ("confidence", 1.0, 0.0)])
def test_thresholds_at_their_ends(rule: str, closed: float, opened: float) -> None:
    wide: Ends = [(-90.0, 90.0), (-90.0, 90.0)]
    assert said(one([wide, SURE], [closed], [False, True], rule)) == (8.0, [False, True], 1)
    assert said(one([SURE, wide], [opened], [True, True], rule)) == (8.0, [True, False], 0)


def test_no_samples() -> None:
    empty = torch.zeros(0, 3)
    found = walk(
        [(empty, empty)] * 2, torch.zeros(0, dtype=torch.int64), Policy("entropy", [0.1]), 0.0, [empty, empty]
    )
    assert found.margin.shape == (0,) and found.required.shape == (0, 2)


Problem = tuple[list[tuple[Tensor, Tensor]], Tensor, Policy, list[Tensor], float]


def problem(seed: int, rule: str) -> Problem:
    """Boxes of a few exits and classes for 160 samples, their labels, a policy, logits in the boxes, and a slack."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*values: float) -> float:
        return values[int(torch.randint(len(values), (), generator=generator))]

    exits, classes = int(drawn(1, 2, 3)), int(drawn(2, 3, 4))
    scale, width = drawn(0.5, 2.0, 6.0), drawn(0.05, 0.3, 1.0)
    y = torch.randint(classes, (160,), generator=generator)
    own = torch.nn.functional.one_hot(y, classes).bool()
    boxes, logits = [], []
    for _ in range(exits):
        z = torch.randn(160, classes, generator=generator) * scale + 1.5 * scale * own
        z = z - z.gather(1, y[:, None])
        below, above = (torch.rand(160, classes, generator=generator) * width * scale for _ in range(2))
        boxes.append(((z - below).masked_fill(own, 0.0), (z + above).masked_fill(own, 0.0)))
        logits.append(z)
    highest = 1.0 if rule == "confidence" else 0.8
    thresholds = [highest * float(torch.rand((), generator=generator)) for _ in range(exits - 1)]
    return boxes, y, Policy(rule, thresholds), logits, drawn(0.0, 0.01, 0.3)


def contradicted(
    found: Walk, boxes: list[tuple[Tensor, Tensor]], y: Tensor, policy: Policy, delta: float
) -> Tensor:
    """Which samples have points, one in the box of each exit, at which something else happens: (B,) bool.

    Tried are all vertices, points with equal entries, and random ones. A tie may go to either class.
    """
    generator = torch.Generator().manual_seed(0)
    classes = boxes[0][0].shape[1]
    corners = torch.tensor(list(itertools.product([0.0, 1.0], repeat=classes)), dtype=torch.float64)
    share = torch.cat([corners, torch.rand(40, classes, generator=generator, dtype=torch.float64)])[:, None]
    result, reached = torch.zeros_like(y, dtype=torch.bool), torch.ones_like(y, dtype=torch.bool)
    for exit, (lower, upper) in enumerate(boxes):
        low, high = lower.double() - delta, upper.double() + delta
        level = low.amin() + (high.amax() - low.amin()) * torch.linspace(0, 1, 40).double()[:, None, None]
        points = torch.cat([low + (high - low) * share, level.maximum(low).minimum(high)])
        column = y.expand(len(points), -1)[..., None]
        points = points.scatter(2, column, 0.0)
        fires = policy.fires(exit, points.flatten(0, 1)).view(len(points), -1)
        wrong = points.scatter(2, column, -INF).amax(2) >= 0
        result |= reached & (exit > found.max_exit)
        result |= reached & fires.any(0) & ~found.required[:, exit]
        result |= reached & (fires & wrong).any(0) & (found.margin > delta)
        reached = reached & ~fires.all(0)
    return result


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**20), st.sampled_from(["entropy", "confidence"]))
def test_no_point_of_the_boxes_contradicts_the_walk(seed: int, rule: str) -> None:
    boxes, y, policy, logits, delta = problem(seed, rule)
    found = walk(boxes, y, policy, delta, logits)
    assert not contradicted(found, boxes, y, policy, delta).any()
    # What is proven needs nothing more, and what is not has an exit to blame.
    assert torch.equal(found.margin > delta, ~found.open.any(1))


def least_at_the_lower_corner(low: Tensor, high: Tensor, limit: Tensor) -> Tensor:
    return entropy(low)


def most_at_the_middle(low: Tensor, high: Tensor) -> Tensor:
    return entropy((low + high) / 2)


WRONG_RANGES = {
    "lowest_entropy": (least_at_the_lower_corner,),
    "highest_entropy": (most_at_the_middle,),
    "highest_probability": (lambda low, high: high.softmax(1).amax(1),),
    "lowest_probability": (lambda low, high: low.softmax(1).amax(1),),
}


def catches(walk_under_test: Callable[..., Walk]) -> bool:
    """Whether any of a few hundred problems contradicts this walk."""
    for seed, rule in itertools.product(range(150), ("entropy", "confidence")):
        boxes, y, policy, logits, delta = problem(seed, rule)
        if contradicted(walk_under_test(boxes, y, policy, delta, logits), boxes, y, policy, delta).any():
            return True
    return False


@pytest.mark.parametrize("wrong", WRONG_WALKS)
def test_unsound_walks_are_caught(wrong: Callable[..., Walk]) -> None:
    assert catches(wrong)


@pytest.mark.parametrize("wrong", WRONG_SECOND_LOOKS)
def test_unsound_second_looks_are_caught(wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_walk, "rival_boxes", wrong)
    assert catches(walk)


@pytest.mark.parametrize(
    ("name", "wrong"), [(name, wrong) for name, many in WRONG_RANGES.items() for wrong in many]
)
def test_unsound_ranges_are_caught(
    name: str, wrong: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_walk, name, wrong)
    assert catches(walk)
