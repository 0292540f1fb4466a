"""Thresholds within a budget of multiply-adds that attacks on the cost force."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import small_run
from attacked import images
from swiftsure import calibration, data, run, run_exits
from swiftsure.attacks import SLOWDOWNS, Forced, forced, run_slowdown, slowdown_attacks, within_forced_macs
from swiftsure.attacks.forced import ROUNDS
from swiftsure.ball import Ball
from swiftsure.cli import main
from swiftsure.data import ImageSet
from swiftsure.errors import InputError
from swiftsure.exits import MultiExit, Policy, all_logits, calibrate, within_macs
from swiftsure.recipe import Exits
from swiftsure.training import check

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


def cost(policy: Policy, views: list[list[Tensor]], macs: list[float]) -> float:
    """What the dearest image of each sample costs on average."""
    exit = torch.stack([policy.exit_of(z) for z in views])
    return torch.tensor(macs, dtype=torch.float64)[exit].amax(0).mean().item()


def right(policy: Policy, views: list[list[Tensor]], y: Tensor) -> float:
    """The share of samples that is right on all of their images."""
    return torch.stack([~policy.misclassified(z, y) for z in views]).all(0).double().mean().item()


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.floats(0, 1), st.sampled_from(["entropy", "confidence"]))
def test_cost_is_that_of_the_dearest_image_and_accuracy_that_under_attack(
    seed: int, share: float, rule: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (30,), generator=generator)

    def view() -> list[Tensor]:
        return [
            1.5 * torch.randn(30, 4, generator=generator) + (exit + 1.0) * torch.eye(4)[y]
            for exit in range(2)
        ]

    clean, attacked, slowed = view(), [view()], [view(), view()]
    macs = [10.0, 40.0]
    budget = macs[0] + share * (macs[1] - macs[0])
    policy = within_macs(clean, y, macs, budget, rule, attacked, slowed)
    assert cost(policy, [clean, *slowed], macs) <= budget + 1e-9
    thresholds = torch.linspace(0, 1.4 if rule == "entropy" else 1, 400).tolist()
    tried = [Policy(rule, [value]) for value in thresholds]
    allowed = [one for one in tried if cost(one, [clean, *slowed], macs) <= budget]
    best = max((right(one, [clean, *attacked], y) for one in allowed), default=0.0)
    # Thresholds are quantiles of 90 scores, 69 of them: one sample may be missed.
    assert right(policy, [clean, *attacked], y) >= best - 1.01 / 30
    # Attacked images alone cost nothing: the budget is one of clean images then.
    assert cost(within_macs(clean, y, macs, budget, rule, attacked), [clean], macs) <= budget + 1e-9


@pytest.mark.parametrize("rule", ["entropy", "confidence"])
def test_no_attack_forces_more(rule: str) -> None:
    net, held_out = exits_of_growing_skill()
    x, y = held_out.batch(slice(None))
    costs = net.macs(held_out.shape)
    budget = (costs[0] + costs[1]) / 2
    naive = calibrate(net, held_out, rule=rule, macs=budget)
    assert run_slowdown(net, x, y, BALL, naive, seed=7).dearest.macs.double().mean() > budget
    done: list[int] = []
    found = within_forced_macs(net, held_out, BALL, budget, rule=rule, steps=10, progress=done.append)
    assert found == within_forced_macs(net, (x, y), BALL, budget, rule=rule, steps=10)
    assert costs[0] < found.macs <= budget
    assert found.n == 80
    assert sum(done) <= ROUNDS * len(SLOWDOWNS)
    # Attacks with other random starts and more steps, which the search has not seen, find hardly more.
    assert run_slowdown(net, x, y, BALL, found.policy, seed=7).dearest.macs.double().mean() <= budget * 1.05
    assert found.accuracy == pytest.approx(1 - found.policy.misclassified(net(x), y).double().mean().item())
    everywhere = within_forced_macs(net, held_out, BALL, costs[0], rule=rule, steps=10)
    assert everywhere.macs == costs[0]
    assert not everywhere.policy.exit_of(net(x)).any()
    assert everywhere.accuracy < found.accuracy


def test_what_was_known_is_kept_and_the_whole_suite_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    net, held_out = exits_of_growing_skill()
    costs = net.macs(held_out.shape)
    known: list[int] = []
    attacked: list[tuple[str, ...]] = []
    fit, attack = forced.within_macs, forced.run_slowdown

    def fitting(clean, y, macs, aim, rule, answers, slowed):  # type: ignore[no-untyped-def]
        known.append(len(slowed))
        return fit(clean, y, macs, aim, rule, answers, slowed)

    def attacking(*args, attacks, **options):  # type: ignore[no-untyped-def]
        attacked.append(tuple(attacks))
        return attack(*args, attacks=attacks, **options)

    monkeypatch.setattr(forced, "within_macs", fitting)
    monkeypatch.setattr(forced, "run_slowdown", attacking)
    within_forced_macs(net, held_out, BALL, (costs[0] + costs[1]) / 2, steps=10)
    assert len(known) > 2
    assert known == sorted(set(known))
    assert known[0] == 0
    assert known[-1] <= len(attacked)
    # The last thresholds withstood all attacks.
    assert attacked[-2] + attacked[-1] == SLOWDOWNS


class Pixel(nn.Module):
    """Two classes of a pixel p: surer of class 0 the darker it is."""

    def forward(self, x: Tensor) -> Tensor:
        odds = 4 * (1 - x.flatten(1).mean(1))
        return torch.stack([odds, torch.zeros_like(odds)], 1)


class Always(nn.Module):
    def __init__(self, label: int) -> None:
        super().__init__()
        self.label = label
        self.weight = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.weight(x.flatten(1)) * 0
        return torch.cat([z, z + (9.0 if self.label else -9.0)], 1)


def test_thresholds_that_a_later_attack_slows_down_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thresholds within the budget on what their own round found, and above it on what another one found."""
    net = MultiExit([nn.Identity(), nn.Identity()], [Pixel(), Always(1)]).eval()
    x = torch.linspace(0.05, 0.95, 20).reshape(20, 1, 1, 1)
    held_out = ImageSet.from_tensors(x, torch.tensor([0] * 12 + [1] * 8))
    monkeypatch.setattr(type(net), "macs", lambda net, shape: [10, 20])
    # Round 1: two more stay, too many. Round 2: nothing is found, far below the budget. Round 3: all stay.
    two_more, all_stay = x.clone(), torch.ones_like(x)
    two_more[:2] = 1.0
    script = [two_more, x, x, all_stay]
    monkeypatch.setattr(
        forced, "run_slowdown", lambda *args, **options: SimpleNamespace(images=script.pop(0))
    )
    found = within_forced_macs(net, held_out, Ball(0.9), 14.0)
    assert script == []
    assert found.macs == 10
    assert found.policy.exit_of(net(x)).tolist() == [0] * 20
    assert found.accuracy == 0.6


def test_a_budget_that_nothing_exceeds_is_free() -> None:
    net, held_out = exits_of_growing_skill()
    for budget in (net.macs(held_out.shape)[-1], 1e9, 10**400):
        done: list[int] = []
        found = within_forced_macs(net, held_out, BALL, budget, steps=5, progress=done.append)
        assert done == [1] * len(SLOWDOWNS)
        assert found.accuracy == 1.0


def test_what_attacked_images_break_is_not_right() -> None:
    net, held_out = exits_of_growing_skill()
    last = net.macs(held_out.shape)[-1]
    wrong = [50 * torch.eye(3)[(held_out.labels + (torch.arange(80) < 20)) % 3]] * 3
    assert within_forced_macs(net, held_out, BALL, last, attacked=[wrong], steps=5).accuracy == 0.75


def test_the_command_fits_and_stores_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = small_run.train(tmp_path / "run", "exits.at={2: pooled}")
    net = run.read_network(folder, torch.device("cpu"))
    held_out = data.load("digits").calibration
    costs = net.macs(held_out.shape)
    seen: list[tuple[list[int], float, int]] = []

    def watched(net, images, ball, macs, *, attacked, **rest) -> Forced:  # type: ignore[no-untyped-def]
        seen.append((images.labels.tolist(), macs, len(attacked)))
        return within_forced_macs(net, images, ball, macs, attacked=attacked, steps=5, **rest)

    monkeypatch.setattr(run_exits, "within_forced_macs", watched)
    monkeypatch.setattr(run_exits, "FORCED", 20)
    budget = 0.5 * (costs[0] + costs[1])
    command = ["calibrate", str(folder), "--forced-macs", f"{budget}", "--device", "cpu"]
    assert main(command) == 0
    assert main([*command, "--attacked"]) == 0
    spread = held_out.labels[torch.linspace(0, len(held_out) - 1, 20).long()].tolist()
    assert seen == [(spread, budget, 0), (spread, budget, 3)]
    fitted = run.read_network(folder, torch.device("cpu"))
    assert fitted.policy is not None
    printed = capsys.readouterr().out
    assert f"{fitted.policy.thresholds[0]:.6g}" in printed
    found = calibration.calibrate_run(folder, forced_macs=budget, device="cpu")
    assert found.forced is not None
    assert found.forced.macs <= budget
    said = f"on 20 of them attacks on the cost force {found.forced.macs:,.0f} multiply-adds on average\n"
    assert said in printed
    assert calibration.calibrate_run(folder, macs=budget, device="cpu").forced is None
    for wrong, said in (
        (["--forced-macs", "1"], "forced_macs is 1.0; allowed: a number from "),
        (["--forced-macs", "5e5", "--macs", "5e5"], "macs and forced_macs are given together"),
        (["--attacked"], "give macs or forced_macs as well"),
    ):
        assert main(["calibrate", str(folder), *wrong, "--device", "cpu"]) == 2
        assert said in capsys.readouterr().err


def test_a_recipe_may_ask_for_them(tmp_path: Path) -> None:
    folder = small_run.train(tmp_path / "run", *FORCED, "exits.attacked=true")
    net = run.read_network(folder, torch.device("cpu"))
    assert isinstance(net, MultiExit)
    assert net.policy is not None
    # While training, clean images stand for slowed ones.
    held_out = data.load("digits").calibration
    logits, budget = all_logits(net, held_out), net.macs(held_out.shape)[0] * 1.5
    policy = check._deployed(net, logits, held_out, Exits(forced_macs=budget), BALL)
    assert policy == within_macs(logits, held_out.labels, net.macs(held_out.shape), budget)
    with pytest.raises(InputError, match=r"exits\.forced_macs is 5; the first exit alone costs "):
        small_run.train(tmp_path / "cheap", *FORCED[:1], "exits.forced_macs=5")


def test_some_attacks_alone_say_nothing_of_gradients() -> None:
    net, held_out = exits_of_growing_skill()
    x, y = held_out.batch(slice(None))
    policy = Policy("entropy", [0.5, 0.5])
    attacks = slowdown_attacks(policy, 2)
    for names, verdict in (
        (SLOWDOWNS[:2], "not evaluated"),
        (SLOWDOWNS[-1:], "not evaluated"),
        (SLOWDOWNS, None),
    ):
        found = run_slowdown(net, x, y, BALL, policy, attacks={name: attacks[name] for name in names})
        assert tuple(found.slowed) == names
        assert found.guard.verdict == (verdict or found.guard.verdict)
    assert found.guard.verdict in ("reliable", "suspicious")


def test_bad_input() -> None:
    net, held_out = exits_of_growing_skill()
    for budget in (net.macs(held_out.shape)[0] - 1, float("nan"), True, "60M"):
        with pytest.raises(InputError, match="forced_macs is"):
            within_forced_macs(net, held_out, BALL, budget)
    with pytest.raises(InputError, match="one exit"):
        within_forced_macs(nn.Flatten(), held_out, BALL, 5.0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="unknown rule"):
        within_forced_macs(net, held_out, BALL, 1e9, rule="entropie")
