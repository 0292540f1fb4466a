"""Policies and their thresholds, against definitions written out plainly."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swiftsure.errors import InputError
from swiftsure.exits import Policy, confidence, entropy, equal_share, within_macs
from swiftsure.exits.thresholds import in_shares


def logits(exits: int, samples: int, classes: int = 4, seed: int = 0, scale: float = 3.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(samples, classes, generator=generator) * scale for _ in range(exits)]


@given(st.integers(1, 12), st.floats(0.01, 300), st.integers(0, 1000))
def test_scores_equal_their_definitions(classes: int, scale: float, seed: int) -> None:
    z = logits(1, 5, classes, seed, scale)[0]
    found = entropy(z)
    assert found.dtype == torch.float64
    for row, h, top in zip(z.double().tolist(), found.tolist(), confidence(z).tolist(), strict=True):
        weights = [math.exp(value - max(row)) for value in row]
        p = [weight / sum(weights) for weight in weights]
        assert h == pytest.approx(-sum(value * math.log(value) for value in p if value > 0), abs=1e-12)
        assert top == pytest.approx(max(p), abs=1e-12)
        assert 0 <= h <= math.log(classes) + 1e-12


def test_extreme_logits() -> None:
    z = torch.tensor([[0.0, -torch.inf], [1e30, 0.0], [torch.nan, 0.0], [0.0, 0.0]])
    assert entropy(z)[:2].tolist() == [0.0, 0.0]
    assert entropy(z)[3].item() == pytest.approx(math.log(2))
    for policy in (Policy("entropy", [0.5]), Policy("confidence", [0.6])):
        assert policy.fires(0, z).tolist() == [True, True, False, False]
        assert policy.fires(1, z).tolist() == [True] * 4


def test_comparisons_are_strict_and_in_float64() -> None:
    z = torch.tensor([[0.3, -0.2, 0.1]])
    h = entropy(z).item()
    assert not Policy("entropy", [h]).fires(0, z).any()
    assert Policy("entropy", [math.nextafter(h, 9)]).fires(0, z).all()
    p = confidence(z).item()
    assert not Policy("confidence", [p]).fires(0, z).any()
    assert Policy("confidence", [math.nextafter(p, 0)]).fires(0, z).all()


@pytest.mark.parametrize("rule", ["entropy", "confidence"])
def test_one_input_alone_leaves_where_it_leaves_among_others(rule: str) -> None:
    z = logits(3, 50)[0]
    z[7, 2] = torch.nan
    scores = Policy(rule, [0.5]).score(z)
    # Thresholds that are scores: a comparison that is not strict shows.
    for threshold in scores[:5].tolist():
        policy = Policy(rule, [min(threshold, 1.0)])
        alone = [policy.fires_alone(0, z[place : place + 1]) for place in range(len(z))]
        assert alone == policy.fires(0, z).tolist()
        assert any(alone)


@pytest.mark.parametrize("rule", ["entropy", "confidence"])
def test_the_first_exit_that_fires_answers(rule: str) -> None:
    z = logits(4, 60)
    policy = equal_share(z, rule)
    found = policy.exit_of(z)
    label = policy.logits_of(z).argmax(1)
    y = torch.randint(4, (60,), generator=torch.Generator().manual_seed(1))
    wrong = policy.misclassified(z, y)
    for sample in range(60):
        fired = [
            entropy(exit[None, sample]).item() < t
            if rule == "entropy"
            else confidence(exit[None, sample]).item() > t
            for exit, t in zip(z, policy.thresholds, strict=False)
        ]
        expected = fired.index(True) if any(fired) else 3
        assert found[sample] == expected
        assert label[sample] == z[expected][sample].argmax()
        assert wrong[sample] == (label[sample] != y[sample])
    z[3][found == 3] = torch.nan
    assert policy.misclassified(z, label)[found == 3].all()


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(6, 90), st.sampled_from(["entropy", "confidence"]), st.integers(0, 99))
def test_equal_shares_are_equal(exits: int, samples: int, rule: str, seed: int) -> None:
    z = logits(exits, samples, seed=seed)
    policy = equal_share(z, rule)
    counts = policy.exit_of(z).bincount(minlength=exits)
    assert counts.sum() == samples
    assert counts.max() - counts.min() <= 1


def test_equal_share_is_the_papers_rule() -> None:
    z = logits(3, 90)
    policy = equal_share(z)
    inside = torch.arange(90)
    for exit, threshold in enumerate(policy.thresholds):
        h = entropy(z[exit][inside]).sort().values
        # The 30th smallest leaves, the 31st stays.
        assert h[29] < threshold < h[30]
        inside = inside[entropy(z[exit][inside]) >= threshold]
    assert len(inside) == 30


def test_samples_of_one_score_leave_together() -> None:
    z = logits(2, 12)
    z[0][:8] = torch.tensor([200.0, 0.0, 0.0, 0.0])
    assert entropy(z[0][:8]).unique().numel() == 1
    for rule in ("entropy", "confidence"):
        assert (equal_share(z, rule).exit_of(z) == 0).sum() == 8
    z[0][:] = 1.0
    for rule in ("entropy", "confidence"):
        assert (equal_share(z, rule).exit_of(z) == 0).all()


def brute_force(z: list[Tensor], y: Tensor, macs: list[float], budget: float, rule: str) -> float:
    """The best accuracy of all thresholds there are, within a budget."""
    scores = [entropy(exit) if rule == "entropy" else confidence(exit) for exit in z[:-1]]
    allowed = []
    for score in scores:
        ordered = score.sort().values
        inside = ((ordered[1:] + ordered[:-1]) / 2).tolist()
        allowed.append([0.0, *inside, 100.0 if rule == "entropy" else 1.0])
    best = 0.0
    for thresholds in itertools.product(*allowed):
        policy = Policy(rule, thresholds)
        exit = policy.exit_of(z)
        if torch.tensor(macs)[exit].double().mean() <= budget:
            best = max(best, (policy.logits_of(z).argmax(1) == y).double().mean().item())
    return best


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 3), st.integers(0, 1000), st.floats(0, 1), st.sampled_from(["entropy", "confidence"]))
def test_the_search_is_near_the_best_there_is(exits: int, seed: int, share: float, rule: str) -> None:
    samples = 24
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (samples,), generator=generator)
    # Later exits are better: the true logit is raised more.
    z = [
        exit + (number + 1.0) * torch.nn.functional.one_hot(y, 4)
        for number, exit in enumerate(logits(exits, samples, seed=seed, scale=1.5))
    ]
    macs = [10.0, 25.0, 60.0][:exits]
    budget = macs[0] + share * (macs[-1] - macs[0])
    policy = within_macs(z, y, macs, budget, rule)
    exit = policy.exit_of(z)
    assert torch.tensor(macs)[exit].double().mean() <= budget + 1e-9
    found = (policy.logits_of(z).argmax(1) == y).double().mean().item()
    best = brute_force(z, y, macs, budget, rule)
    # With one side exit all is tried; with two at most one sample of 24 may be missed.
    assert best - (1.01 / samples if exits > 2 else 1e-9) <= found <= best + 1e-9


def test_more_budget_is_never_worse() -> None:
    z, y = logits(4, 300), torch.randint(4, (300,), generator=torch.Generator().manual_seed(3))
    z = [exit + number * torch.nn.functional.one_hot(y, 4) for number, exit in enumerate(z)]
    macs = [1.0, 2.0, 3.0, 4.0]
    accuracies = []
    for budget in (1.0, 1.5, 2.0, 3.0, 4.0):
        policy = within_macs(z, y, macs, budget)
        accuracies.append((policy.logits_of(z).argmax(1) == y).double().mean().item())
        assert torch.tensor(macs)[policy.exit_of(z)].mean() <= budget + 1e-6
    assert accuracies == sorted(accuracies)
    assert accuracies[-1] > accuracies[0] + 0.1
    assert accuracies[0] == pytest.approx((z[0].argmax(1) == y).double().mean().item())


def test_an_exit_that_is_fooled_closes() -> None:
    """Clean images let the cheap exit answer all; under attack it is sure and wrong, so it must not."""
    y = torch.zeros(40, dtype=torch.int64)
    right, wrong = torch.tensor([4.0, 0, 0]).repeat(40, 1), torch.tensor([0, 4.0, 0]).repeat(40, 1)
    # Half of the samples are surer than any attack makes a wrong class.
    right[:20] *= 3
    clean, attacked = [right, right], [torch.cat([right[:20], wrong[20:]]), right]
    assert (within_macs(clean, y, [1.0, 2.0], 1.0).exit_of(clean) == 0).all()
    policy = within_macs(clean, y, [1.0, 2.0], 1.5, attacked=[attacked])
    assert policy.exit_of(clean).tolist() == [0] * 20 + [1] * 20
    assert not policy.misclassified(attacked, y).any()
    # Of equally accurate policies the strictest: what the budget allows is used.
    assert (within_macs(clean, y, [1.0, 2.0], 2.0, attacked=[attacked]).exit_of(clean) == 1).all()
    assert within_macs(clean, y, [1.0, 2.0], 1.5).exit_of(clean).tolist() == [0] * 20 + [1] * 20
    # The budget is one of clean images, and may leave no choice.
    assert (within_macs(clean, y, [1.0, 2.0], 1.0, attacked=[attacked]).exit_of(clean) == 0).all()


def test_one_exit_has_no_threshold() -> None:
    z, y = logits(1, 5), torch.zeros(5, dtype=torch.int64)
    assert equal_share(z).thresholds == within_macs(z, y, [7.0], 7.0).thresholds == ()
    assert Policy("entropy", ()).exit_of(z).tolist() == [0] * 5


def test_a_policy_is_stored_as_plain_values() -> None:
    for policy in (
        Policy("entropy", [0.1, 2]),
        Policy("confidence", torch.tensor([0.5, 1.0])),
        Policy("entropy", []),
    ):
        again = Policy.from_dict(json.loads(json.dumps(policy.as_dict())))
        assert again == policy
        assert hash(again) == hash(policy)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Policy("entropie", [1.0]), "unknown rule of exits 'entropie'; did you mean 'entropy'"),
        (lambda: Policy("entropy", [0.1, math.nan]), "threshold 1 of entropy is nan; allowed: finite numbers >= 0"),
        (lambda: Policy("entropy", [math.inf]), "threshold 0 of entropy is inf"),
        (lambda: Policy("entropy", [-0.1]), "threshold 0 of entropy is -0.1"),
        (lambda: Policy("entropy", ["low"]), "threshold 0 of entropy is 'low'"),
        (lambda: Policy("entropy", [10**400]), "threshold 0 of entropy is 1000"),
        (lambda: Policy(["entropy"], [0.1]), "unknown rule of exits"),
        (lambda: equal_share([torch.zeros(4, 3), torch.zeros(5, 3)]), "exit 1 has logits of 5 samples, exit 0 of 4"),
        (lambda: within_macs(logits(2, 9), torch.zeros(8), [5.0, 9.0], 9.0), "labels"),
        (lambda: within_macs(logits(2, 9), torch.full((9,), 99), [5.0, 9.0], 9.0), "label"),
        (lambda: Policy("entropy", [True]), "threshold 0 of entropy is True"),
        (lambda: Policy("confidence", [1.5]), "threshold 0 of confidence is 1.5; allowed: numbers from 0 to 1"),
        (lambda: Policy("entropy", 0.5), "thresholds are 0.5; allowed: a list"),
        (lambda: Policy("entropy", "0.5"), "thresholds are '0.5'; allowed: a list"),
        (lambda: Policy("entropy", [0.5]).exit_of(logits(3, 2)), "1 thresholds for 3 exits; allowed: 2"),
        (lambda: Policy.from_dict({"rule": "entropy"}), "a policy is {'rule': 'entropy'}; allowed: a table"),
        (lambda: Policy.from_dict(None), "a policy is None"),
        (lambda: equal_share(logits(3, 2)), "2 samples for 3 exits"),
        (lambda: equal_share([]), "0 samples for 0 exits"),
        (lambda: equal_share([torch.tensor([[torch.nan, 0.0]])]), "logits of exit 0 are not finite"),
        (lambda: within_macs(logits(2, 9), torch.zeros(9), [5.0], 9.0), "1 costs for 2 exits"),
        (lambda: within_macs(logits(2, 9), torch.zeros(9), [5.0, 9.0], 4.0), "macs is 4.0; allowed: a number from 5"),
        (lambda: within_macs(logits(2, 9), torch.zeros(9), [5.0, 9.0], math.nan), "macs is nan"),
        (lambda: within_macs(logits(2, 9), torch.zeros(9), [5.0, 9.0], "60M"), "macs is '60M'"),
        (
            lambda: within_macs(logits(2, 9), torch.zeros(9), [5.0, 9.0], 9.0, attacked=[logits(2, 8)]),
            "attack 0 has logits of shapes",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(call, words: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("macs", "budget", "said"),
    [
        ([1.0, math.nan, 3.0], 2.0, "costs are"),
        ([3.0, 2.0, 1.0], 3.0, "do not fall from exit to exit"),
        ([1.0, 2.0, 3.0], True, "macs is True"),
    ],
)
def test_costs_that_cannot_be(macs: list[float], budget: float, said: str) -> None:
    z, y = logits(3, 9), torch.zeros(9, dtype=torch.int64)
    with pytest.raises(InputError, match=said):
        within_macs(z, y, macs, budget)


def test_shares_that_overflow() -> None:
    with pytest.raises(InputError, match="shares are"):
        in_shares(logits(3, 9), [1e308, 1e308, 1.0])


def test_thresholds_of_numpy_are_numbers() -> None:
    expected = Policy("entropy", [0.5, 0.25])
    assert (
        Policy("entropy", np.array([0.5, 0.25]))
        == Policy("entropy", [np.float32(0.5), np.float64(0.25)])
        == expected
    )
    with pytest.raises(InputError, match="threshold 1 of entropy is nan"):
        Policy("entropy", np.array([0.5, np.nan]))


def test_logits_that_carry_a_graph() -> None:
    z = [torch.rand(9, 4, requires_grad=True) for _ in range(2)]
    assert equal_share(z) == equal_share([one.detach() for one in z])
