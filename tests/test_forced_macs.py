"""Thresholds within a budget of multiply-adds that attacks on the cost force."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import small_run
from attacked import images
from swiftsure import calibration, data, run
from swiftsure.attacks import Forced, run_slowdown, within_forced_macs
from swiftsure.ball import Ball
from swiftsure.cli import main
from swiftsure.data import ImageSet
from swiftsure.errors import InputError
from swiftsure.exits import MultiExit, Policy, calibrate, within_macs

BALL = Ball(0.1)
FORCED = ("exits.at={2: pooled}", "exits.forced_macs=1e9")


def exits_of_growing_skill(seed: int = 0) -> tuple[MultiExit, ImageSet]:
    """Three linear exits and 80 images; labels are the last exit's, and the first head is a blurred copy of it."""
    torch.manual_seed(seed)
    last = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    last[1].weight.data *= 8
    heads = []
    for noise in (1.2, 0.4):
        head = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        head[1].weight.data = last[1].weight.data + noise * torch.randn(3, 16)
        head[1].bias.data = last[1].bias.data.clone()
        heads.append(head)
    net = MultiExit([nn.Flatten(0, 0), nn.ReLU(), nn.ReLU()], [*heads, last]).eval()
    x = images(seed, 80, 1, 4, 4)
    return net, ImageSet.from_tensors(x, net(x)[-1].argmax(1), 3)


def costs_and_right(
    policy: Policy, views: list[list[Tensor]], y: Tensor, macs: list[float]
) -> tuple[float, float]:
    exit = torch.stack([policy.exit_of(z) for z in views])
    right = torch.stack([~policy.misclassified(z, y) for z in views]).all(0)
    return torch.tensor(macs, dtype=torch.float64)[exit].amax(0).mean().item(), right.double().mean().item()


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.floats(0, 1), st.sampled_from(["entropy", "confidence"]))
def test_a_forced_budget_is_one_of_the_dearest_images(seed: int, share: float, rule: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (30,), generator=generator)
    views = [
        [1.5 * torch.randn(30, 4, generator=generator) + (exit + 1.0) * torch.eye(4)[y] for exit in range(2)]
        for _ in range(3)
    ]
    macs = [10.0, 40.0]
    budget = macs[0] + share * (macs[1] - macs[0])
    policy = within_macs(views[0], y, macs, budget, rule, views[1:], forced=True)
    cost, right = costs_and_right(policy, views, y, macs)
    assert cost <= budget + 1e-9
    # With one side exit every score is a candidate: 90 of them on 69 quantiles, so one step of accuracy may be missed.
    thresholds = torch.linspace(0, 1.4 if rule == "entropy" else 1, 400).tolist()
    tried = [costs_and_right(Policy(rule, [value]), views, y, macs) for value in thresholds]
    assert right >= max((r for c, r in tried if c <= budget), default=0.0) - 1.01 / 30
    # Clean images alone may cost as much as the budget, and then the dearest exceed it.
    assert (
        costs_and_right(within_macs(views[0], y, macs, budget, rule, views[1:]), views[:1], y, macs)[0]
        <= budget
    )


@pytest.mark.parametrize("rule", ["entropy", "confidence"])
def test_no_attack_forces_more(rule: str) -> None:
    net, held_out = exits_of_growing_skill()
    x, y = held_out.batch(slice(None))
    costs = net.macs(held_out.shape)
    budget = (costs[0] + costs[1]) / 2
    naive = calibrate(net, held_out, rule=rule, macs=budget)
    assert run_slowdown(net, x, y, BALL, naive, seed=7).dearest.macs.double().mean() > budget
    rounds: list[int] = []
    found = within_forced_macs(net, held_out, BALL, budget, rule=rule, steps=30, progress=rounds.append)
    assert found == within_forced_macs(net, held_out, BALL, budget, rule=rule, steps=30)
    assert costs[0] < found.macs <= budget
    assert 1 < len(rounds) <= 10
    # Attacks with other random starts and more steps, which the search has not seen, find hardly more.
    assert run_slowdown(net, x, y, BALL, found.policy, seed=7).dearest.macs.double().mean() <= budget * 1.02
    everywhere = within_forced_macs(net, held_out, BALL, costs[0], rule=rule, steps=5)
    assert everywhere.macs == costs[0]
    assert not everywhere.policy.exit_of(net(x)).any()
    assert everywhere.policy.misclassified(net(x), y).sum() > found.policy.misclassified(net(x), y).sum()


def test_a_budget_that_nothing_exceeds_is_free() -> None:
    net, held_out = exits_of_growing_skill()
    rounds: list[int] = []
    found = within_forced_macs(
        net, held_out, BALL, net.macs(held_out.shape)[-1], steps=5, progress=rounds.append
    )
    assert rounds == [1]
    assert found.accuracy == 1.0


def test_what_attacked_images_break_is_not_right() -> None:
    net, held_out = exits_of_growing_skill()
    last = net.macs(held_out.shape)[-1]
    wrong = [torch.eye(3)[(held_out.labels + 1) % 3] * 50] * 3
    wrong = [
        torch.where(torch.arange(80)[:, None] < 20, z, 50 * torch.eye(3)[held_out.labels]) for z in wrong
    ]
    assert within_forced_macs(net, held_out, BALL, last, attacked=[wrong], steps=5).accuracy == 0.75


def test_the_command_fits_and_stores_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = small_run.train(tmp_path / "run", "exits.at={2: pooled}")
    net = run.read_network(folder, torch.device("cpu"))
    held_out = data.load("digits").calibration
    costs = net.macs(held_out.shape)
    seen: list[tuple[int, float, int]] = []

    def watched(net, images, ball, macs, *, attacked, **rest) -> Forced:  # type: ignore[no-untyped-def]
        seen.append((len(images), macs, len(attacked)))
        return within_forced_macs(net, images, ball, macs, attacked=attacked, steps=5, **rest)

    monkeypatch.setattr("swiftsure.run_exits.within_forced_macs", watched)
    budget = 0.5 * (costs[0] + costs[1])
    command = ["calibrate", str(folder), "--forced-macs", f"{budget}", "--device", "cpu"]
    assert main(command) == 0
    assert main([*command, "--attacked"]) == 0
    n = min(500, len(held_out))
    assert seen == [(n, budget, 0), (n, budget, 3)]
    fitted = run.read_network(folder, torch.device("cpu"))
    assert fitted.policy is not None
    assert f"{fitted.policy.thresholds[0]:.6g}" in capsys.readouterr().out
    found = calibration.calibrate_run(folder, forced_macs=costs[-1], device="cpu")
    assert found.macs <= costs[-1]
    for wrong, said in (
        (["--forced-macs", "1"], "macs is 1.0; allowed: a number from "),
        (["--forced-macs", "5e5", "--macs", "5e5"], "macs and forced_macs are both given"),
        (["--attacked"], "give macs or forced_macs as well"),
    ):
        assert main(["calibrate", str(folder), *wrong, "--device", "cpu"]) == 2
        assert said in capsys.readouterr().err


def test_a_recipe_may_ask_for_them(tmp_path: Path) -> None:
    folder = small_run.train(tmp_path / "run", *FORCED, "exits.attacked=true")
    net = run.read_network(folder, torch.device("cpu"))
    assert isinstance(net, MultiExit)
    assert net.policy is not None
    with pytest.raises(InputError, match=r"exits\.forced_macs is 5; the first exit alone costs "):
        small_run.train(tmp_path / "cheap", *FORCED[:1], "exits.forced_macs=5")


def test_bad_input() -> None:
    net, held_out = exits_of_growing_skill()
    for budget in (net.macs(held_out.shape)[0] - 1, float("nan"), True):
        with pytest.raises(InputError, match="macs is"):
            within_forced_macs(net, held_out, BALL, budget)
    with pytest.raises(InputError, match="one exit"):
        within_forced_macs(nn.Flatten(), held_out, BALL, 5.0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="unknown rule"):
        within_forced_macs(net, held_out, BALL, 1e9, rule="entropie")
