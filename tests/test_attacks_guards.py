"""Guards: broken defences are broken or flagged, honest evaluations believed, and each guard sees what it is for."""

from functools import partial

import jsonschema
import pytest
import torch
from torch import nn

from defences import BALL, DEFENCES
from swiftsure import results
from swiftsure.attacks import attacks_for, guards, misclassified, pgd, run_suite, square
from swiftsure.attacks.guards import guard
from swiftsure.attacks.questions import CHECKS, LEAST, NOT_EVALUATED, RELIABLE, SUSPICIOUS, Check
from swiftsure.attacks.suite import SuiteResult
from swiftsure.ball import Ball
from swiftsure.exits import MultiExit
from trained import held_out, network

N = 40


def problem(count: int = N):
    return held_out(count).batch(slice(None))


def evaluated(net: nn.Module, ball: Ball = BALL, **changed) -> SuiteResult:
    """The standard suite with three targets and 300 queries: whatever this breaks, the whole suite does."""
    x, y = problem()
    policy = net.policy if isinstance(net, MultiExit) else None
    attacks = attacks_for("standard", 1 if policy is None else net.exits, 1, policy)
    for name, attack in attacks.items():
        less = (
            {"targets": 3}
            if name.startswith("apgd_t")
            else {"steps": 300}
            if name.startswith("square")
            else {}
        )
        attacks[name] = partial(attack, **less) if less else attack
    attacks = {
        name: attack for name, attack in attacks.items() if name not in ("pgd40_mix", "pgd40_max_average")
    }
    judge = misclassified if policy is None else policy.misclassified
    return run_suite(net, x, y, ball, "standard", judge=judge, attacks=attacks | changed)


@pytest.fixture(scope="module")
def truth() -> float:
    """What is left of the undefended network."""
    return evaluated(network(0).eval()).accuracy["union"]


@pytest.mark.parametrize("name", DEFENCES)
def test_broken_defences_are_broken_or_flagged(name, truth):
    net, (x, y) = DEFENCES[name](), problem()
    policy = net.policy if isinstance(net, MultiExit) else None
    found = evaluated(net)
    said = guard(net, x, y, BALL, found, policy=policy)
    assert list(said.checks) == list(CHECKS)
    broken = found.accuracy["union"] <= truth + 0.05
    assert broken or said.verdict == SUSPICIOUS
    alone = found.accuracy["pgd40"]
    # PGD-40 neither breaks nor flags it: it states far more than is left, and than is left of the undefended network.
    left = ~found.union
    left[list(said.broken)] = False
    assert left.double().mean() <= alone - 0.2
    if name == "dropout left on":
        # Noise averages out over forty steps, so that much is lost; what is reported is another figure each time.
        assert said.checks["randomness"].verdict == SUSPICIOUS
        again = run_suite(net, x, y, BALL, attacks={"pgd40": partial(pgd, steps=40)})
        assert not torch.equal(again.broken["pgd40"], found.broken["pgd40"])
        assert alone >= truth + 0.1
    else:
        assert alone >= 0.5 > truth + 0.2
    if name == "masked weak exit, false slopes":
        reason = said.checks["gradients"].reason
        assert reason.startswith("exit 1, which may answer, does not change as its gradients say")
    if "masked weak exit, rounded" in name:
        # Half of all gradients are fine, those of the other exit; only who asks exit by exit sees it.
        assert said.checks["gradients"].reason.startswith(
            "exit 1, which may answer, has 100.0% of its gradients"
        )
        assert said.checks["queries"].reason.startswith("square forcing each gate")


def test_an_honest_evaluation_is_believed(truth):
    net, (x, y) = network(0).eval(), problem()
    found = evaluated(net)
    said = guard(net, x, y, BALL, found, sources={"other": network(0, seed=3).eval()})
    assert {check.verdict for check in said.checks.values()} == {RELIABLE}
    assert said.verdict == RELIABLE
    assert "asked of 40 samples" in said.reason
    assert said.n == N
    assert said.seconds > 0
    # Without another network all that can be asked is asked.
    again = guard(net, x, y, BALL, found)
    assert again.checks["transfer"].verdict == NOT_EVALUATED
    assert again.verdict == RELIABLE
    others = [name for name in CHECKS if name != "transfer"]
    assert {name: said.checks[name] for name in others} == {name: again.checks[name] for name in others}


def test_what_guards_break_joins_the_union():
    net, (x, y) = network(0).eval(), problem()
    weak = run_suite(net, x, y, BALL, attacks={"pgd2": partial(pgd, steps=2, step_size=0.005)})
    before, worst = weak.union.clone(), weak.worst.clone()
    said = guard(net, x, y, BALL, weak)
    index = torch.tensor(list(said.broken))
    images = torch.stack(list(said.broken.values()))
    assert not before[index].any()
    assert BALL.contains(images, x[index]).all()
    with torch.no_grad():
        assert (net(images).argmax(1) != y[index]).all()
    more = run_suite(net, x[index], y[index], BALL, attacks={"guards": lambda *_, **__: images})
    weak.join(index, more)
    assert list(weak.accuracy) == ["pgd2", "guards", "union"]
    assert weak.accuracy_last == {}
    assert weak.union[index].all()
    assert torch.equal(weak.union, before.index_fill(0, index, True))
    assert torch.equal(weak.broken["guards"], weak.misclassified.index_fill(0, index, True))
    assert (weak.broken_8bit["guards"] <= weak.broken["guards"]).all()
    with torch.no_grad():
        assert torch.equal(net(weak.worst).argmax(1) != y, weak.union)
    assert torch.equal(weak.worst[before], worst[before])


def test_answers_that_depend_on_the_batch():
    class Ranked(nn.Module):
        """Each image less the mean of those before it in its batch."""

        def __init__(self) -> None:
            super().__init__()
            self.net = network(0).eval()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            count = torch.arange(1, len(x) + 1).view(-1, 1, 1, 1)
            return self.net(x - 0.5 * x.cumsum(0) / count)

    x, y = problem()
    found = run_suite(Ranked(), x, y, BALL)
    said = guard(Ranked(), x, y, BALL, found)
    assert said.checks["randomness"].verdict == SUSPICIOUS
    assert "reads its batch" in said.checks["randomness"].reason


def test_answers_that_depend_on_the_batch_in_any_order():
    class Centred(nn.Module):
        """Each image less the mean of its batch, which no order changes."""

        def __init__(self) -> None:
            super().__init__()
            self.net = network(0).eval()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x - 0.5 * x.mean(0))

    x, y = problem()
    said = guard(Centred(), x, y, BALL, run_suite(Centred(), x, y, BALL))
    assert said.checks["randomness"].verdict == SUSPICIOUS
    assert said.checks["randomness"].reason == (
        "the same images in smaller batches get other answers: the network reads its batch"
    )


def test_weak_suites_are_found_out():
    """Two short steps leave what more steps, restarts and queries break; no step leaves what noise and others break."""
    net, (x, y) = network(0).eval(), problem()
    weak = run_suite(net, x, y, BALL, attacks={"pgd2": partial(pgd, steps=2, step_size=0.005)})
    said = guard(net, x, y, BALL, weak)
    for name in ("steps", "restarts", "queries"):
        assert said.checks[name].verdict == SUSPICIOUS
    assert said.checks["gradients"].verdict == RELIABLE
    assert said.verdict == SUSPICIOUS
    assert said.checks["steps"].reason.startswith("twice as many steps (pgd, 80) breaks ")
    assert said.reason.count(";") >= 2
    nothing = run_suite(net, x, y, Ball(0.3), attacks={"idle": lambda net, x, *_, **__: x})
    said = guard(net, x, y, Ball(0.3), nothing, sources={"other": network(0, seed=3).eval()})
    assert {name for name, check in said.checks.items() if check.verdict == SUSPICIOUS} >= {
        "steps", "restarts", "queries", "noise", "transfer",
    }  # fmt: skip
    assert said.checks["gradients"].verdict == NOT_EVALUATED


def test_queries_that_find_more_than_gradients():
    net, (x, y) = DEFENCES["rounded inputs"](), problem()
    attacks = {"pgd40": partial(pgd, steps=40), "square300": partial(square, steps=300)}
    found = run_suite(net, x, y, BALL, attacks=attacks)
    said = guard(net, x, y, BALL, found)
    only = found.broken["square300"] & ~found.broken["pgd40"]
    left = (~found.broken["pgd40"]).sum()
    assert said.checks["queries"].reason.startswith(
        f"square300 breaks {int(only.sum())} of the {int(left)} samples"
    )
    assert said.checks["gradients"].reason.startswith("even 100.0% of the gradients of pgd40")


def test_a_radius_that_changes_nothing():
    """A network that answers from its memory of the clean images; and one that answers one class, which is honest."""
    x, y = problem()
    known, answers = x.flatten(1), y

    class Memory(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            nearest = torch.cdist(x.detach().flatten(1), known).argmin(1)
            return 9 * nn.functional.one_hot(answers[nearest], 10).to(x) + 0 * x.sum()

    found = run_suite(Memory(), x, y, Ball(0.05), attacks={"pgd": partial(pgd, steps=5)})
    said = guard(Memory(), x, y, Ball(0.05), found)
    assert said.checks["eps"].verdict == SUSPICIOUS
    assert "stays above chance" in said.checks["eps"].reason

    class Constant(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(x), 10).index_fill(1, torch.tensor([int(y.mode().values)]), 1.0)

    found = run_suite(Constant(), x, y, Ball(0.05), attacks={"pgd": partial(pgd, steps=5)})
    assert guard(Constant(), x, y, Ball(0.05), found).checks["eps"].verdict == RELIABLE


def test_too_few_samples_say_nothing():
    net, (x, y) = network(0).eval(), problem(LEAST - 1)
    found = run_suite(net, x, y, BALL)
    said = guard(net, x, y, BALL, found)
    assert said.verdict == NOT_EVALUATED
    assert said.reason == "19 samples are too few; guards need 20"
    assert set(said.checks) == set(CHECKS)


def test_what_is_said_fits_results():
    rule = {**results.schema(), **results.schema()["properties"]["attacked"]["properties"]["guards"]}
    for said in (
        guards.not_evaluated("no guards were asked for"),
        guards.Guards(200, {name: Check(RELIABLE, "fine") for name in CHECKS}),
        guards.Guards(200, {"eps": Check(SUSPICIOUS, "it rises")}),
    ):
        jsonschema.validate(said.as_dict(), rule)
        assert said.as_dict()["verdict"] == said.verdict
