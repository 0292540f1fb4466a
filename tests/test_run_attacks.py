"""What `attack` and `evaluate` write of attacks: 8-bit images, costs, guards, other networks, slowdown."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import small_run
import swiftsure as ss
from swiftsure import evaluation, report, results, run_attacks, samples
from swiftsure.attacks import SLOWDOWNS
from swiftsure.attacks.questions import CHECKS
from swiftsure.cli import main
from swiftsure.errors import InputError, SoundnessError
from swiftsure.exits import MultiExit
from swiftsure.subject import open_subject

N = 40
EXITS = (
    "loss.proven=false",
    "loss.attacked=0.5",
    "loss.attack.steps=3",
    "schedule.ramp=0",
    "exits.at={2: pooled}",
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.train(tmp_path_factory.mktemp("plain") / "twin", f"evaluate.limit={N}")


@pytest.fixture(scope="module")
def exits(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Attacked from the plain run as well, with guards."""
    folder = small_run.train(tmp_path_factory.mktemp("exits") / "run", *EXITS, f"evaluate.limit={N}")
    evaluation.evaluate_run(folder, device="cpu", eps=0.04, transfer=[plain], guards=30)
    return folder


def macs_of(folder: Path) -> list[int]:
    net = ss.load(folder)
    assert isinstance(net, MultiExit)
    return net.macs((1, 8, 8))


def test_every_attack_has_its_figures(exits: Path) -> None:
    found = results.read(exits)
    attacked, forced = found["attacked"], found["macs"]["by_attack"]
    names = ["fgsm", "pgd40", "pgd40_average", "pgd40_max_average", "pgd40_deployed", "transfer_twin"]
    # One image is broken by guards alone, which counts as one more attack; what it costs is not noted.
    assert list(attacked["accuracy"]) == list(attacked["accuracy_8bit"]) == [*names, "guards", "union"]
    for name, value in attacked["accuracy"].items():
        assert value <= attacked["accuracy_8bit"][name]
    assert list(forced) == [*names, *SLOWDOWNS] == list(found["seconds"]["by_attack"])
    assert found["seconds"]["attack"] == pytest.approx(sum(found["seconds"]["by_attack"].values()))
    assert found["macs"]["slowdown_guard"]["verdict"] in ("reliable", "suspicious")
    assert max(forced[name] for name in SLOWDOWNS) <= found["macs"]["slowdown"] <= found["macs"]["static"]
    assert found["macs"]["clean"] < found["macs"]["slowdown"]
    for name, shares in found["exits"]["by_attack"].items():
        assert sum(shares) == pytest.approx(1)
        mean = sum(share * cost for share, cost in zip(shares, macs_of(exits), strict=True))
        assert forced[name] == pytest.approx(mean), "shares and costs are of the same images"
        assert forced[name] <= found["macs"]["p95_by_attack"][name] <= found["macs"]["static"]
    assert list(found["exits"]["by_attack"]) == list(forced)
    guards = attacked["guards"]
    assert guards["n"] == 30
    assert list(guards["checks"]) == list(CHECKS)
    assert guards["checks"]["transfer"]["reason"].startswith("what breaks twin breaks ")
    assert found["seconds"]["guards"] > 0


def test_the_table_of_samples(exits: Path) -> None:
    table, found = samples.read(exits), results.read(exits)
    for kind, part in (("attack", "accuracy"), ("attack_8bit", "accuracy_8bit")):
        for name, value in found["attacked"][part].items():
            assert 1 - table[f"{kind}:{name}"].mean() == pytest.approx(value)
    assert (table["attack_8bit:union"] <= table["attack:union"]).all()
    last = found["attacked"]["accuracy_last"]
    assert list(last) == list(found["attacked"]["accuracy"])
    assert all(last["union"] <= value <= 1 for value in last.values())
    assert table["slow_macs"].mean() == pytest.approx(found["macs"]["slowdown"])
    net = ss.load(exits)
    assert isinstance(net, MultiExit)
    costs = np.array(net.macs((1, 8, 8)))
    assert (costs[table["slow_exit"]] == table["slow_macs"]).all()
    assert (table["slow_macs"] >= table["macs"]).all()
    assert (table["slow_macs"] <= table["max_macs"]).all()
    shares = np.bincount(table["slow_exit"], minlength=2) / N
    assert shares.tolist() == pytest.approx(found["exits"]["slowdown"])
    # A certificate keeps what is known of attacks.
    evaluation.certify_run(exits, device="cpu", eps=0.04, method="interval")
    again = samples.read(exits)
    assert {name for name in table if samples.is_of_attacks(name)} <= set(again)
    assert "slow_macs" in again


def test_it_is_printed_next_to_the_figure(
    exits: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(exits, tmp_path / "run"))
    words = ["--device", "cpu", "--eps", "0.04", "--transfer", str(plain), "--guards", "25"]
    assert main(["attack", str(folder), *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = results.read(folder)
    attacked = found["attacked"]
    place = next(number for number, line in enumerate(lines) if line.startswith("attacked "))
    assert f"{100 * attacked['accuracy']['union']:.2f}%" in lines[place]
    assert lines[place + 1].strip() == f"{attacked['guards']['verdict']}: {attacked['guards']['reason']}"
    last = attacked["accuracy_last"]["union"]
    assert lines[place + 2].strip() == f"the last exit alone on the same images: {100 * last:.2f}%"
    assert lines[place + 3].split() == ["attack", "right", "8-bit", "seconds", "multiply-adds"]
    for name in ("pgd40_deployed", "transfer_twin"):
        row = next(line.split() for line in lines if line.split()[:1] == [name])
        assert row[1:3] == [f"{100 * attacked[part][name]:.2f}%" for part in ("accuracy", "accuracy_8bit")]
        assert row[4] == f"{found['macs']['by_attack'][name]:,.0f}"
    assert any(line.split()[:1] == ["one_by_one"] for line in lines)
    page = report.page([folder], tmp_path / "page.html").read_text()
    assert f"Guards: {attacked['guards']['verdict']}" in page
    assert re.search(rf"of {N}, {attacked['guards']['verdict']}", page)
    assert f"The last exit alone gets {100 * last:.1f}%" in page
    for check in attacked["guards"]["checks"].values():
        assert check["reason"].replace("'", "&#39;") in page
    assert page.count('<td class="name">one_by_one</td>') == 1
    # Without guards it says so.
    assert main(["attack", str(folder), "--device", "cpu", "--eps", "0.04", "--guards", "0"]) == 0
    assert "not evaluated: no guards were asked for" in capsys.readouterr().out


def test_what_guards_alone_find_is_in_the_union(
    exits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(exits, tmp_path / "run"))
    monkeypatch.setattr(run_attacks, "attacks_for", lambda *_: {"idle": lambda net, x, *_, **__: x})
    assert main(["attack", str(folder), "--device", "cpu", "--eps", "0.04", "--guards", "30"]) == 0
    assert "suspicious: " in capsys.readouterr().out
    attacked = results.read(folder)["attacked"]
    assert list(attacked["accuracy"]) == ["idle", "guards", "union"] == list(attacked["accuracy_last"])
    assert attacked["accuracy"]["union"] == attacked["accuracy"]["guards"] < attacked["accuracy"]["idle"]
    assert attacked["accuracy_last"]["guards"] <= attacked["accuracy_last"]["idle"]
    table = samples.read(folder)
    assert (table["attack:guards"] == table["attack:union"]).all()
    assert not (table["attack:union"].astype(bool) & table["certified"].astype(bool)).any()
    assert not table["attack:guards"][30:][table["correct"][30:] == 1].any(), "guards ask about the first 30"


def test_guards_break_a_network_that_draws_random_numbers(exits: Path) -> None:
    """Some of what they found is wrong without attack by the time it joins the union."""
    subject = open_subject(exits, device="cpu", eps=0.15)
    net, draws = subject.net, torch.Generator().manual_seed(0)
    assert isinstance(net, MultiExit)

    class Noisy(nn.Module):
        def __init__(self, stage: nn.Module) -> None:
            super().__init__()
            self.stage = stage

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.stage(x + torch.randn(x.shape, generator=draws) / 8)

    net.stages[0] = Noisy(net.stages[0])
    attacked = run_attacks.attack(subject, "quick", guards=N)
    assert attacked.guards.checks["randomness"].verdict == "suspicious"
    assert attacked.guards.broken
    assert list(attacked.found.broken)[-1] == "guards"


def test_a_run_measured_before_there_were_guards(
    exits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(exits, tmp_path / "run"))
    found = results.read(folder)
    for name in ("accuracy_8bit", "accuracy_last", "guards"):
        del found["attacked"][name]
    for name in ("macs", "seconds"):
        del found[name]["by_attack"]
    del found["seconds"]["guards"]
    results.files.write_json(folder / results.NAME, found)
    page = report.page([folder], tmp_path / "page.html").read_text()
    assert "Guards" not in page
    assert main(["measure", str(folder), "--device", "cpu"]) == 0
    capsys.readouterr()


def test_a_cost_beyond_the_proven_one_is_named(exits: Path) -> None:
    table = samples.read(exits)
    samples.refuse_broken_certificates(exits, table)
    for name in ("slow_macs", "forced_macs", "macs"):
        forged = {**table, "max_macs": table["max_macs"].copy()}
        forged["max_macs"][3] = table[name][3] - 1
        with pytest.raises(
            SoundnessError,
            match=r"sample 3 is proven to cost at most .* yet costs .* \((slow_|forced_)?macs\)",
        ):
            samples.refuse_broken_certificates(exits, forged)
    unknown = {**table, "max_macs": np.full(N, np.nan)}
    samples.refuse_broken_certificates(exits, unknown)


def test_an_image_of_eight_bits_breaks_a_certificate_too(exits: Path) -> None:
    table = samples.read(exits)
    row = int(np.flatnonzero((table["attack:union"] == 0) & (table["correct"] == 1))[0])
    forged = {
        **table,
        "certified": np.zeros(N, dtype=np.int64),
        "attack_8bit:pgd40": table["attack_8bit:pgd40"].copy(),
    }
    forged["certified"][row] = forged["attack_8bit:pgd40"][row] = 1
    with pytest.raises(SoundnessError, match=f"sample {row} is certified, yet broken by pgd40;"):
        samples.refuse_broken_certificates(exits, forged)


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--transfer", "nowhere"], "nowhere is no"),
        (["--guards", "-1"], "'-1' is no number of samples; allowed: an integer >= 0"),
        (["--guards", "many"], "'many' is no number of samples"),
    ],
)
def test_options_that_cannot_be(
    exits: Path, words: list[str], fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["attack", str(exits), "--eps", "0.04", *words]) == 2
    assert fault in capsys.readouterr().err


def test_other_networks_must_take_the_same_images(exits: Path, plain: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    other = tmp_path / "other"
    ss.models.save(ss.models.build("mnist_small"), other)
    with pytest.raises(
        InputError, match=r"other takes images of \[1, 28, 28\] in 10 classes; allowed: a network for"
    ):
        evaluation.attack_run(exits, device="cpu", eps=0.04, transfer=[other])
    with pytest.raises(InputError, match="names two runs 'twin'"):
        evaluation.attack_run(exits, device="cpu", eps=0.04, transfer=[plain, plain])
    with pytest.raises(InputError, match="guards is -1"):
        evaluation.attack_run(exits, device="cpu", eps=0.04, guards=-1)
