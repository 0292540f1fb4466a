"""The suites of a network with several exits: which attacks they hold, and that each is the form it is named after."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftsure import data
from swiftsure.attacks import (
    SUITE_NAMES,
    SUITES,
    attacks_for,
    average,
    deployed,
    fgsm,
    misclassified,
    never,
    pgd,
    run_suite,
    single,
    wrm,
)
from swiftsure.ball import Ball
from swiftsure.errors import InputError
from swiftsure.exits import MultiExit, Policy

BALL = Ball(0.1)
PGD_FORMS = {"pgd40_main", "pgd40_exit1", "pgd40_exit2", "pgd40_average", "pgd40_max_average", "pgd40_mix"}


def network() -> MultiExit:
    torch.manual_seed(0)
    stages = [
        nn.Flatten(),
        nn.Sequential(nn.Linear(64, 20), nn.ReLU()),
        nn.Sequential(nn.Linear(20, 20), nn.ReLU()),
    ]
    net = MultiExit(stages, [nn.Linear(64, 10), nn.Linear(20, 10), nn.Linear(20, 10)])
    descent = torch.optim.Adam(net.parameters(), 0.01)
    x, y = data.load("digits").train.batch(slice(0, 300))
    for _ in range(60):
        loss = torch.stack([F.cross_entropy(z, y) for z in net(x)]).sum()
        descent.zero_grad()
        loss.backward()
        descent.step()
    return net.eval()


NET = network()


def problem(count: int = 24) -> tuple[Tensor, Tensor]:
    return data.load("digits").test.batch(slice(0, count))


def run(name: str, suite: str = "rdi") -> Tensor:
    x, y = problem()
    attack = attacks_for(suite, 3)[name]
    return attack(
        NET, x, y, BALL, judge=misclassified, generator=torch.Generator().manual_seed(0), report=None
    )


def losses(x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.stack([F.cross_entropy(z, y, reduction="none") for z in NET(x)])


def test_the_papers_forms() -> None:
    weak = {f"{method}_{form}" for method in ("fgsm", "wrm") for form in ("main", "average", "max_average")}
    assert set(attacks_for("rdi", 3)) == PGD_FORMS | weak
    with pytest.raises(InputError, match="suite is 'quik'; allowed: quick, standard, full, rdi"):
        attacks_for("quik", 3)
    assert {name for name in attacks_for("rdi", 3, 3) if name.startswith("pgd")} == {
        name.replace("40", "20") for name in PGD_FORMS
    }
    assert set(attacks_for("rdi", 1)) == {"pgd40_main", "fgsm_main", "wrm_main"}
    assert (*SUITES, "rdi") == SUITE_NAMES


def test_other_suites_look_at_every_exit_as_well() -> None:
    for suite in SUITES:
        assert attacks_for(suite, 1) == SUITES[suite]
    assert set(attacks_for("quick", 3)) == {*SUITES["quick"], "pgd40_average", "pgd40_max_average"}
    for suite in ("standard", "full"):
        more = set(attacks_for(suite, 3)) - set(SUITES[suite])
        assert more == (PGD_FORMS - {"pgd40_main"}) | {"apgd_average"}


def test_with_a_policy_what_answers_is_attacked() -> None:
    policy = Policy("entropy", [0.5, 0.3])
    assert set(attacks_for("quick", 3, 1, policy)) == {*attacks_for("quick", 3), "pgd40_deployed"}
    for suite in ("standard", "full"):
        attacks = attacks_for(suite, 3, 1, policy)
        restarted = {
            name
            for name in attacks_for(suite, 3)
            if name.rpartition("_")[2][-2:] in ("x5", "x3") or "200x" in name
        } - {"interval40x5"}
        # In place of those that would read the last exit alone.
        assert set(attacks_for(suite, 3)) - set(attacks) == {"apgd_t", "fab_t", "square5000"} | restarted
        assert set(attacks) - set(attacks_for(suite, 3)) == {
            "apgd_deployed",
            "apgd_t_deployed",
            "apgd_gates",
            "fab_t_deployed",
            "square5000_deployed",
            *(["square5000_gates", "apgd_gatesx5"] if suite == "full" else []),
            *(f"{name}_deployed" for name in restarted),
        }
        assert len(restarted) == (6 if suite == "full" else 0)
        assert attacks_for(suite, 1, 1, Policy("entropy", [])) == SUITES[suite]
    # The paper's forms are the paper's.
    assert set(attacks_for("rdi", 3, 1, policy)) == set(attacks_for("rdi", 3))
    x, y = problem()
    wanted = pgd(
        NET, x, y, BALL,
        objective=deployed(policy), judge=policy.misclassified, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    found = attacks_for("quick", 3, 1, policy)["pgd40_deployed"](
        NET, x, y, BALL, judge=policy.misclassified, generator=torch.Generator().manual_seed(0), report=None
    )
    assert torch.equal(found, wanted)


def test_each_form_is_what_it_is_called() -> None:
    x, y = problem()

    def drawn() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    # The paper's attacks end with their last iterate, broken or not.
    steps = {"steps": 40, "step_size": BALL.radius / 30, "judge": never}
    assert torch.equal(run("pgd40_main"), pgd(NET, x, y, BALL, generator=drawn(), **steps))
    for exit in range(2):
        expected = pgd(NET, x, y, BALL, objective=single(exit), generator=drawn(), **steps)
        assert torch.equal(run(f"pgd40_exit{exit + 1}"), expected)
    assert torch.equal(
        run("pgd40_average"), pgd(NET, x, y, BALL, objective=average(), generator=drawn(), **steps)
    )
    assert torch.equal(run("fgsm_average"), fgsm(NET, x, y, BALL, objective=average()))
    assert torch.equal(
        run("pgd40_average", "quick"), pgd(NET, x, y, BALL, objective=average(), generator=drawn())
    )


def test_max_average_keeps_the_worst_of_the_single_ones() -> None:
    x, y = problem()
    singles = [wrm(NET, x, y, BALL, objective=single(exit), judge=never) for exit in range(3)]
    sums = torch.stack([losses(one, y).sum(0) for one in singles])
    best = sums.argmax(0)
    assert best.bincount(minlength=3).min() > 0
    expected = torch.stack(singles)[best, torch.arange(len(x))]
    torch.testing.assert_close(run("wrm_max_average"), expected)


def test_the_mix_is_drawn_once() -> None:
    assert torch.equal(run("pgd40_mix"), run("pgd40_mix"))
    assert torch.equal(run("pgd40_mix"), run("pgd40_mix"))
    assert not torch.equal(run("pgd40_mix"), run("pgd40_average"))


def test_each_exit_suffers_most_from_its_own_attack() -> None:
    _, y = problem()
    attacked = {name: losses(run(name), y).mean(1) for name in ("pgd40_exit1", "pgd40_exit2", "pgd40_main")}
    for exit, own in enumerate(attacked):
        assert all(attacked[own][exit] >= other[exit] for other in attacked.values())


@pytest.mark.parametrize("thresholds", [[0.0, 0.0], [100.0, 0.0]])
def test_success_is_judged_by_the_deployed_policy(thresholds: list[float]) -> None:
    x, y = problem()
    policy = Policy("entropy", thresholds)
    found = run_suite(NET, x, y, BALL, "rdi", judge=policy.misclassified, attacks=attacks_for("rdi", 3))
    assert found.suite == "rdi"
    assert found.skipped == {}
    assert set(found.broken) == set(attacks_for("rdi", 3))
    # The network that always answers at its first exit is broken best by the attack on that exit, and so on.
    own = "pgd40_main" if thresholds[0] == 0 else "pgd40_exit1"
    other = "pgd40_exit1" if own == "pgd40_main" else "pgd40_main"
    assert found.broken[own].sum() > found.broken[other].sum()
    answer = NET.adaptive(found.worst, policy)
    assert torch.equal(answer.label != y, found.union)


def test_an_unknown_suite_is_refused_where_no_attacks_are_given() -> None:
    x, y = problem(2)
    with pytest.raises(InputError, match="suite is 'rid'; allowed: quick, standard, full, rdi"):
        run_suite(NET, x, y, BALL, "rid", judge=misclassified)
