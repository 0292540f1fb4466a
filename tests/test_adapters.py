"""AutoAttack's interface, others' attacks as inner methods, and RobustBench's record."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import small_run
import swiftsure as ss
from defences import BALL, masked
from swiftsure import adapters, evaluation, results
from swiftsure.adapters import AutoAttack, from_foolbox, from_torchattacks
from swiftsure.attacks import pgd, run_suite
from swiftsure.cli import main
from swiftsure.errors import InputError
from trained import held_out, network


def problem(count: int = 30) -> tuple[Tensor, Tensor]:
    return held_out(count).batch(slice(None))


def answers(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x).argmax(1)


# AutoAttack


def test_a_script_of_autoattack_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    net, (x, y) = network(0).eval(), problem()
    assert AutoAttack(net).attacks_to_run == ["apgd-ce", "apgd-t", "fab-t", "square"]
    # These two alone, as the others take their time.
    names = ["apgd-ce", "apgd-dlr"]
    adversary = AutoAttack(
        net,
        norm="Linf",
        eps=0.05,
        seed=0,
        version="custom",
        attacks_to_run=names,
        log_path=tmp_path / "log.txt",
    )
    x_adv, labels = adversary.run_standard_evaluation(x, y, bs=16, return_labels=True)
    assert BALL.with_eps(0.05).contains(x_adv, x).all()
    assert torch.equal(labels, answers(net, x_adv))
    broken, wrong = labels != y, answers(net, x) != y
    assert wrong.sum() < broken.sum() < len(x)
    # Who still stands keeps the image.
    assert torch.equal(x_adv[~broken | wrong], x[~broken | wrong])
    said = capsys.readouterr().out
    assert f"initial accuracy: {(~wrong).double().mean():.2%}" in said
    assert "robust accuracy after APGD-CE: " in said
    assert f"robust accuracy: {(~broken).double().mean():.2%}" in said
    assert (tmp_path / "log.txt").read_text() == said
    again = AutoAttack(net, "Linf", 0.05, 0, False, names, "custom")
    assert torch.equal(again.run_standard_evaluation(x, y, bs=16), x_adv)
    assert again.clean_accuracy(x, y) == (~wrong).double().mean().item()
    each = again.run_standard_evaluation_individual(x, y, bs=16)
    assert list(each) == names
    assert torch.equal((torch.stack([answers(net, one) != y for one in each.values()])).any(0), broken)
    assert again.attacks_to_run == names
    assert capsys.readouterr().out == ""


def test_versions_and_norms() -> None:
    net = network(0).eval()
    assert AutoAttack(net, version="plus", verbose=False).attacks_to_run == [
        "apgd-ce",
        "apgd-dlr",
        "apgd-t",
        "fab-t",
        "square",
    ]
    x, y = problem(12)
    for norm, eps in (("L2", 0.3), ("L1", 1.0)):
        some = AutoAttack(net, norm, eps, 0, False, ["apgd-dlr"], "custom", device="cpu")
        x_adv = some.run_standard_evaluation(x, y)
        assert ss.Ball(eps, norm).contains(x_adv, x).all()
        assert (answers(net, x_adv) != y).sum() > (answers(net, x) != y).sum()


def test_several_exits_are_attacked_as_they_are_deployed() -> None:
    net, (x, y) = masked(), problem(20)
    adversary = AutoAttack(net, eps=BALL.radius, seed=0, verbose=False)
    assert {"apgd_gates", "apgd_deployed", "square5000_deployed"} <= set(adversary.attacks_to_run)
    adversary.attacks_to_run = ["pgd40", "apgd_gates"]
    x_adv, labels = adversary.run_standard_evaluation(x, y, return_labels=True)
    answer = net.adaptive(x_adv)
    assert torch.equal(answer.label, labels)
    assert (labels == y).sum() == 0
    assert (answer.exit == 0).any()
    assert adversary.clean_accuracy(x, y) == (net.adaptive(x).label == y).double().mean().item()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "L3"}, "norm is 'L3'; allowed: Linf, L2, L1"),
        ({"version": "rand"}, "averages over its draws"),
        ({"version": "fast"}, "allowed: standard, plus, custom"),
        ({"is_tf_model": True}, "allowed: a torch module"),
        ({"device": "cuda"}, "the model is on cpu"),
        ({"eps": -1}, "eps is -1"),
    ],
)
def test_what_autoattack_here_cannot_do(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        AutoAttack(network(0), **options)


def test_what_is_set_later_counts() -> None:
    net, (x, y) = network(0).eval(), problem(12)
    adversary = AutoAttack(net, eps=0.05, seed=0, version="custom", attacks_to_run=["apgd-ce"], verbose=False)
    adversary.epsilon = 0.2
    moved = BALL.distance(adversary.run_standard_evaluation(x, y), x).max()
    assert 0.19 < moved < 0.2001
    exits = masked()
    adversary = AutoAttack(exits, eps=0.05, seed=0, verbose=False)
    before = adversary.clean_accuracy(x, y)
    exits.policy = ss.exits.Policy("entropy", [10.0])
    assert adversary.judge == exits.policy.misclassified
    assert adversary.clean_accuracy(x, y) != before


def test_functions_and_networks_that_draw_random_numbers() -> None:
    net, (x, y) = network(0).eval(), problem(12)
    options = {"eps": 0.05, "seed": 0, "version": "custom", "attacks_to_run": ["apgd-ce"], "verbose": False}
    plain = AutoAttack(net, **options).run_standard_evaluation(x, y)
    assert torch.equal(AutoAttack(lambda x: net(x), **options).run_standard_evaluation(x, y), plain)
    with pytest.warns(UserWarning, match="two passes over the same images differ"):
        AutoAttack(lambda x: net(x + torch.rand_like(x) / 4), **options).run_standard_evaluation(x, y)
    exits = masked()
    exits.policy = None
    with pytest.raises(InputError, match="2 exits and no thresholds"):
        AutoAttack(exits)


def test_an_attack_that_is_not_here() -> None:
    adversary = AutoAttack(network(0), version="custom", attacks_to_run=["fab"], verbose=False)
    with pytest.raises(InputError, match=r"'fab'; allowed: apgd-ce, apgd-dlr, apgd-t, fab-t, square"):
        adversary.run_standard_evaluation(*problem(2))


# Attacks of others


class Foreign:
    """Called as torchattacks' attacks are: noise from torch's global generator, in whatever mode it pleases."""

    def __init__(self, model: nn.Module, eps: float) -> None:
        self.model, self.eps = model, eps

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        assert self.model(x).shape == (len(x), 10)
        assert torch.is_grad_enabled()
        self.model.train()
        x = x.clone().requires_grad_()
        loss = nn.functional.cross_entropy(self.model.eval()(x), y)
        (grad,) = torch.autograd.grad(loss, x)
        return (x + self.eps * grad.sign() + 1e-3 * torch.rand_like(x)).detach()


def test_foreign_attacks_are_called_and_checked_like_ours() -> None:
    net, (x, y) = network(0), problem()
    modes = [module.training for module in net.modules()]
    attack = from_torchattacks(lambda model, ball: Foreign(model, ball.radius))
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first, again, other = (
        attack(net, x, y, BALL, generator=torch.Generator().manual_seed(seed), report=None)
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert BALL.contains(first, x).all()
    assert [module.training for module in net.modules()] == modes
    assert attack(net, x[:0], y[:0], BALL).shape == x[:0].shape
    found = run_suite(net, x, y, BALL, attacks={"foreign": attack, "pgd": partial(pgd, steps=40)})
    assert found.skipped == {}
    assert found.broken["foreign"].sum() > 10
    # What is no number is given up.
    nothing = from_torchattacks(lambda model, ball: lambda x, y: x * torch.nan)
    assert torch.equal(nothing(net, x, y, BALL), x)


def test_foreign_attacks_see_one_tensor_of_logits() -> None:
    net, (x, y) = masked(), problem()
    seen: list[Tensor] = []

    def look(model: nn.Module, ball: ss.Ball):
        def call(x: Tensor, y: Tensor) -> Tensor:
            seen.append(model(x))
            return x

        return call

    from_torchattacks(look)(net, x, y, BALL)
    from_torchattacks(look, read=net.policy.logits_of)(net, x, y, BALL)
    from_torchattacks(look, read=lambda logits: logits[0])(net, x, y, BALL)
    with torch.no_grad():
        early, late = net(x)
    assert torch.equal(seen[0], late)
    assert torch.equal(seen[1], net.policy.logits_of((early, late)))
    assert torch.equal(seen[2], early)


def test_foolbox_is_called_as_it_wants_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    net, (x, y) = network(0).eval(), problem()
    module, calls = ModuleType("foolbox"), []

    class PyTorchModel:
        def __init__(self, model: nn.Module, bounds: tuple[float, float], device: torch.device) -> None:
            calls.append((model, bounds, device))
            self.model = model

    module.PyTorchModel = PyTorchModel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "foolbox", module)

    class Attack:
        def __call__(self, view: PyTorchModel, inputs: Tensor, criterion: Tensor, *, epsilons: float):
            x_adv = Foreign(view.model, epsilons)(inputs, criterion)
            return x_adv + 7, x_adv, view.model(x_adv).argmax(1) != criterion

    x_adv = from_foolbox(lambda ball: Attack())(net, x, y, BALL, generator=torch.Generator())
    assert BALL.contains(x_adv, x).all()
    assert (answers(net, x_adv) != y).sum() > 10
    assert calls[0][1:] == ((0.0, 1.0), x.device)


def test_the_real_libraries() -> None:
    """Where they are installed."""
    torchattacks = pytest.importorskip("torchattacks")
    net, (x, y) = network(0).eval(), problem()
    attack = from_torchattacks(lambda model, ball: torchattacks.PGD(model, ball.radius, ball.radius / 10, 40))
    theirs, ours = attack(net, x, y, BALL), pgd(net, x, y, BALL, steps=40)
    assert abs(int((answers(net, theirs) != y).sum()) - int((answers(net, ours) != y).sum())) <= 2


def test_the_real_foolbox() -> None:
    foolbox = pytest.importorskip("foolbox")
    net, (x, y) = network(0).eval(), problem()
    theirs = from_foolbox(lambda ball: foolbox.attacks.LinfPGD(steps=40))(net, x, y, BALL)
    assert (answers(net, theirs) != y).sum() > 15


# Records


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = small_run.train(tmp_path_factory.mktemp("record") / "run")
    evaluation.evaluate_run(folder, device="cpu", limit=30, guards=20)
    return folder


def test_a_record_has_the_fields_of_robustbench(attacked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = results.read(attacked)
    entry = adapters.record(attacked, name="A | test", link="https://example.org", venue="ICLR 2020")
    assert (entry["name"], entry["venue"], entry["authors"]) == ("A | test", "ICLR 2020", None)
    assert entry["clean_acc"] == f"{100 * found['clean_accuracy']:.2f}"
    assert entry["external"] == f"{100 * found['robust_accuracy']['union']:.2f}"
    assert entry["verified_acc"] == f"{100 * found['verified_accuracy']:.2f}"
    assert float(entry["external_8bit"]) >= float(entry["external"])
    assert entry["autoattack_acc"] is None
    verdict = found["attacked"]["guards"]["verdict"]
    assert entry["unreliable"] is {"suspicious": True, "reliable": False, "not evaluated": None}[verdict]
    assert (entry["dataset"], entry["architecture"], entry["eps"], entry["norm"], entry["n"]) == (
        *("digits", "digits_small", "0.02", "Linf"),
        30,
    )
    row = adapters.as_row(entry)
    assert row.startswith("| [A \\| test](https://example.org) | ")
    assert row.replace("\\|", "").count("|") == len(adapters.COLUMNS) + 1
    assert main(["record", str(attacked), "--about", "authors=A, B", "--about", "additional_data=true"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == adapters.record(attacked, authors="A, B", additional_data=True)
    assert main(["record", str(attacked), "--row"]) == 0
    head, rule, row = capsys.readouterr().out.splitlines()
    assert head.count("|") == rule.count("|") == row.count("|")


def test_records_that_cannot_be(attacked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fresh = small_run.train(tmp_path / "run")
    with pytest.raises(InputError, match="was not attacked; `swiftsure attack"):
        adapters.record(fresh)
    with pytest.raises(InputError, match="no place for 'colour'; allowed: link, name"):
        adapters.record(attacked, colour="red")
    assert main(["record", str(attacked), "--about", "venue"]) == 2
    assert "allowed: KEY=VALUE" in capsys.readouterr().err
