"""A run with exits from end to end: trained, thresholds fitted, evaluated as deployed, calibrated, asked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import small_run
import swiftsure as ss
from swiftsure import data, evaluation, exits, report, results, run, run_exits, samples
from swiftsure.calibration import calibrate_run
from swiftsure.cli import main
from swiftsure.errors import InputError
from swiftsure.exits import MultiExit, Policy
from swiftsure.prediction import predict
from swiftsure.recipe import Exits, Loss, Schedule

PLAIN = (
    *("loss.proven=false", "loss.attacked=0.5", "loss.attack.steps=3"),
    *("schedule.epochs=6", "schedule.ramp=0", "optimizer.rate=0.01"),
)


def build() -> nn.Module:
    """A builder that no name is registered for, as --model takes it."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, 1, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(128, 10),
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exits") / "run"
    return small_run.train(folder, *PLAIN, "exits.at={2: pooled, 4: {kind: conv, width: 6}}")


@pytest.fixture(scope="module")
def evaluated(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(trained, tmp_path_factory.mktemp("evaluated") / "run"))
    evaluation.evaluate_run(folder, device="cpu")
    return folder


@pytest.fixture
def folder(evaluated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(evaluated, tmp_path / "run"))


def network(folder: Path) -> MultiExit:
    net = ss.load(folder)
    assert isinstance(net, MultiExit)
    return net


def test_training_stores_thresholds_of_equal_shares(trained: Path) -> None:
    net = network(trained)
    assert net.exits == 3
    assert list(net.config["exits"]) == ["2", "4"]
    held_out = data.load("digits").calibration
    x, _ = held_out.batch(slice(None))
    counts = net.adaptive(x).exit.bincount(minlength=3)
    assert counts.max() - counts.min() <= 1
    # Every exit was trained.
    test = data.load("digits").test.batch(slice(0, 200))
    for z in net(test[0]):
        assert (z.argmax(1) == test[1]).double().mean() > 0.5


def test_what_is_measured_is_the_deployed_network(evaluated: Path) -> None:
    found = results.read(evaluated)
    net = network(evaluated)
    x, y = data.load("digits").test.batch(slice(0, 60))
    answer = net.adaptive(x)
    assert found["clean"] == {"n": 60, "accuracy": pytest.approx((answer.label == y).double().mean().item())}
    shares = (answer.exit.bincount(minlength=3) / 60).tolist()
    assert found["exits"]["clean"] == pytest.approx(shares)
    costs = exits.exit_macs(net)
    macs = found["macs"]
    assert macs["static"] == costs[-1]
    assert macs["clean"] == pytest.approx(answer.macs.double().mean().item())
    assert macs["clean_p95"] in costs
    assert macs["paper"] == pytest.approx(np.mean([exits.paper_macs(net)[exit] for exit in answer.exit]))
    assert costs[0] <= macs["clean"] <= macs["slowdown"] <= costs[-1]
    assert costs[0] <= macs["attacked"] <= costs[-1]
    for name in ("clean", "attacked", "slowdown"):
        assert sum(found["exits"][name]) == pytest.approx(1)
        assert macs[name] == pytest.approx(np.dot(found["exits"][name], costs))
    assert found["verified"]["accuracy"] <= found["attacked"]["accuracy"]["union"]
    assert macs["slowdown"] <= macs["certified_max"] <= costs[-1]
    assert sum(found["exits"]["certified"]) == pytest.approx(1)
    assert all(value > 0 for value in found["latency_ms"].values())
    table = samples.read(evaluated)
    assert list(table)[:6] == ["index", "label", "prediction", "correct", "exit", "macs"]
    assert table["exit"].tolist() == answer.exit.tolist()
    assert table["macs"].tolist() == answer.macs.tolist()
    # An attack's success is a wrong answer of the policy, not of the last exit.
    assert found["robust_accuracy"]["union"] == 1 - table["attack:union"].mean()
    assert (table["attack:union"] >= 1 - table["correct"]).all()
    with np.load(evaluated / "examples.npz") as archive:
        worst, rows = torch.from_numpy(archive["x_adv"]), archive["index"]
        assert archive["adversarial_prediction"].tolist() == net.adaptive(worst).label.tolist()
        broken = net.adaptive(worst).label != y[rows]
        assert broken.tolist() == archive["attack_broke"].tolist()
    assert (evaluated / "report.html").read_text().count("images that leave at exit") == 1


def test_slowed_images_are_never_cheaper(evaluated: Path) -> None:
    found = results.read(evaluated)
    assert found["macs"]["slowdown"] > found["macs"]["clean"]
    assert found["exits"]["slowdown"][0] <= found["exits"]["clean"][0]


def test_an_evaluation_is_repeatable(evaluated: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(evaluated, tmp_path / "again"))
    first = results.read(evaluated)
    second = evaluation.attack_run(again, device="cpu").results
    for name in ("clean", "attacked", "exits", "macs"):
        assert first[name] == second[name]
    assert (again / "samples.csv").read_text() == (evaluated / "samples.csv").read_text()


def test_the_papers_forms_are_a_suite(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attack", str(folder), "--suite", "rdi", "--limit", "60", "--device", "cpu"]) == 0
    accuracy = results.read(folder)["attacked"]["accuracy"]
    assert {"pgd40_main", "pgd40_exit2", "pgd40_max_average", "fgsm_average", "wrm_main", "union"} <= set(
        accuracy
    )
    assert accuracy["union"] <= min(accuracy.values())
    assert "suite rdi: " in capsys.readouterr().out


def test_calibrating_replaces_thresholds_and_forgets_figures(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    seconds = results.read(folder)["seconds"]["train"]
    costs = exits.exit_macs(network(folder))
    budget = (costs[0] + costs[-1]) / 2
    done = calibrate_run(folder, macs=budget, device="cpu")
    assert done.forgot
    net = network(folder)
    assert net.policy == done.policy
    assert done.macs <= budget
    assert sum(done.shares) == pytest.approx(1)
    x, y = data.load("digits").calibration.batch(slice(None))
    assert done.accuracy == pytest.approx((net.adaptive(x).label == y).double().mean().item())
    assert done.n == len(x)
    found = results.read(folder)
    assert found["clean"] is found["attacked"] is found["exits"]["clean"] is found["macs"]["clean"] is None
    assert found["seconds"]["train"] == seconds
    left = {item.name for item in folder.iterdir()}
    assert left == {"recipe.yaml", "model.safetensors", "config.json", "log.jsonl", "results.json"}
    assert (folder / "model.safetensors").read_bytes() == weights
    by_hand = calibrate_run(folder, thresholds=[0.9, 0.8], policy="confidence", device="cpu")
    assert not by_hand.forgot
    assert network(folder).policy == by_hand.policy == Policy("confidence", [0.9, 0.8])
    assert calibrate_run(folder, device="cpu").policy.rule == "entropy"
    assert evaluation.attack_run(folder, device="cpu").results["exits"]["clean"] is not None


def test_more_budget_costs_more(folder: Path) -> None:
    costs = exits.exit_macs(network(folder))
    cheap = calibrate_run(folder, macs=costs[0], device="cpu")
    assert cheap.shares == [1.0, 0.0, 0.0]
    free = calibrate_run(folder, macs=costs[-1], device="cpu")
    assert free.accuracy >= cheap.accuracy


def test_thresholds_under_attack(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    budget = f"{exits.exit_macs(network(folder))[-1]}"
    assert main(["calibrate", str(folder), "--macs", budget, "--device", "cpu"]) == 0
    assert (
        f"is gone from {folder}; `swiftsure evaluate {folder}` measures it again" in capsys.readouterr().out
    )
    clean = network(folder)
    assert main(["calibrate", str(folder), "--macs", budget, "--attacked", "--device", "cpu"]) == 0
    attacked = network(folder)
    images = data.load("digits").calibration
    logits = run_exits.attacked_logits(clean, images, run.read_recipe(folder).ball.build())
    assert set(logits) == {"pgd40_exit1", "pgd40_exit2", "pgd40_main", "pgd40_average"}
    logits["none"] = exits.all_logits(clean, images)
    y = images.labels
    broken = [
        torch.stack([net.policy.misclassified(z, y) for z in logits.values()]).any(0).sum()
        for net in (clean, attacked)
    ]
    assert broken[1] <= broken[0]
    capsys.readouterr()
    assert main(["calibrate", str(folder), "--attacked", "--device", "cpu"]) == 2
    assert capsys.readouterr().err == (
        "swiftsure: attacked images fit thresholds within a budget; give macs or forced_macs as well\n"
    )


def test_the_commands(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", str(folder), "--thresholds", "0.5,0.25", "--device", "cpu"]) == 0
    line = capsys.readouterr().out
    assert line.startswith("entropy thresholds 0.5, 0.25: of ")
    assert main(["attack", str(folder), "--device", "cpu", "--limit", "20"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\nexits     ") == 3
    assert "clean images leave at" in printed
    files = []
    test = data.load("digits").test
    for place in range(3):
        files.append(str(tmp_path / f"{place}.png"))
        Image.fromarray(test.images[place, 0].numpy()).save(files[-1])
    assert main(["predict", str(folder), *files, "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    x, _ = test.batch(slice(0, 3))
    answer = network(folder).adaptive(x)
    for line, file, label, exit, macs in zip(
        lines, files, answer.label, answer.exit, answer.macs, strict=True
    ):
        assert line.startswith(f"{file}  {test.classes[label]}  ")
        assert f"  exit {exit + 1} of 3  {int(macs):,} multiply-adds" in line


def test_predictions_of_one_exit_can_be_proven(tmp_path: Path) -> None:
    folder = small_run.train(tmp_path / "run", "schedule.epochs=6", "schedule.ramp=2")
    test = data.load("digits").test
    files = [tmp_path / f"{place}.png" for place in range(8)]
    for place, file in enumerate(files):
        Image.fromarray(test.images[place, 0].numpy()).convert("RGB").save(file)
    found = predict(folder, files, eps=0.01, device="cpu")
    net = ss.load(folder)
    x, _ = test.batch(slice(0, 8))
    certificate = ss.certify(net, x, ball=ss.Ball(0.01))
    assert [one.certified for one in found] == certificate.certified.tolist()
    assert any(one.certified for one in found)
    assert [one.label for one in found] == net(x).argmax(1).tolist()
    assert [(one.exit, one.exits) for one in found] == [(0, 1)] * 8
    assert predict(folder, files[:1], device="cpu")[0].certified is None


def test_a_backbone_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    spec = "test_run_exits:build"
    recipe = small_run.recipe(*PLAIN, "schedule.epochs=1", "exits.count=3")
    folder = run.train(recipe, tmp_path / "run", device="cpu", model=spec).folder
    config = json.loads((folder / "config.json").read_text())
    assert "name" not in config["model"]
    assert len(config["model"]["exits"]) == 2
    assert evaluation.attack_run(folder, device="cpu", model=spec, limit=20).results["exits"]["clean"]
    with pytest.raises(InputError, match=f"name what builds it with --model {spec}"):
        evaluation.attack_run(folder, device="cpu")
    assert ss.load(folder, model=build()).exits == 3


def test_one_exit_is_measured_like_any_network(tmp_path: Path) -> None:
    folder = small_run.train(
        tmp_path / "run", "exits.count=1", "schedule.epochs=2", "evaluate.method=interval"
    )
    net = network(folder)
    assert net.exits == 1
    assert net.policy is None
    found = evaluation.evaluate_run(folder, device="cpu", limit=30).results
    assert found["verified"]["n"] == 30
    assert found["exits"]["clean"] is found["macs"]["clean"] is None
    assert found["macs"]["static"] == found["macs"]["certified_max"] == exits.static_macs(net)
    assert "exit" not in samples.read(folder)


def test_a_start_from_the_weights_of_the_backbone(tmp_path: Path) -> None:
    first = small_run.train(tmp_path / "first", *PLAIN, "schedule.epochs=1")
    warm = (f"model.warm_start={first}", "exits.count=2", "schedule.epochs=1", "optimizer.rate=1e-30")
    second = small_run.train(tmp_path / "second", *PLAIN, *warm)
    before, after = ss.load(first), network(second)
    for name, value in before.state_dict().items():
        torch.testing.assert_close(after.backbone.state_dict()[name], value)
    third = small_run.train(tmp_path / "third", *PLAIN, f"model.warm_start={second}", *warm[1:])
    for name, value in after.state_dict().items():
        torch.testing.assert_close(network(third).state_dict()[name], value)


@pytest.mark.parametrize(
    "loss", [PLAIN, ("schedule.ramp=0", "loss.mixing.controller=constant")], ids=["attacked", "proven"]
)
def test_exits_on_a_network_that_stays_as_it_is(loss: tuple[str, ...], tmp_path: Path) -> None:
    first = small_run.train(tmp_path / "first", *loss, "schedule.epochs=1")
    choice = (
        *loss,
        f"model.warm_start={first}",
        "exits.at={2: pooled}",
        "exits.frozen=true",
        "schedule.epochs=2",
    )
    second = small_run.train(tmp_path / "second", *choice)
    net = network(second)
    alone = ss.load(first)
    x, _ = data.load("digits").test.batch(slice(0, 100))
    with torch.no_grad():
        _, last = net(x)
        torch.testing.assert_close(last, alone(x), rtol=0, atol=0)
    for name, value in alone.state_dict().items():
        assert torch.equal(net.backbone.state_dict()[name], value)
    # The head has learned something, and weights may be trained again.
    log = run.read_log(second)
    assert log[-1]["loss"] < log[0]["loss"]
    assert all(weight.requires_grad for weight in net.parameters())


def test_the_statistics_of_a_frozen_network_stay() -> None:
    parts = data.load("digits")
    net = ss.attach(build(), {"2": "pooled"}, torch.zeros(2, 1, 8, 8))
    before = {name: value.clone() for name, value in net.backbone.state_dict().items()}
    ss.fit(
        net, parts.train, parts.val, loss=Loss(proven=False), exits=Exits(at={"2": "pooled"}, frozen=True),
        schedule=Schedule(epochs=1, ramp=0, steps=5),
    )  # fmt: skip
    for name, value in net.backbone.state_dict().items():
        assert torch.equal(before[name], value), name


def test_what_cannot_be_frozen() -> None:
    parts = data.load("digits")
    with pytest.raises(InputError, match=r"exits\.frozen trains attached heads alone; the network has none"):
        ss.fit(build(), parts.train, parts.val, exits=Exits(count=2, frozen=True))
    with pytest.raises(InputError, match=r"none are attached; give exits\.at or exits\.count"):
        Exits(frozen=True)
    alone = ss.attach(build(), 1, torch.zeros(2, 1, 8, 8))
    with pytest.raises(InputError, match=r"exits\.frozen .* those of 1 exits have no weights"):
        ss.fit(alone, parts.train, parts.val, exits=Exits(count=1, frozen=True))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ((), r"exits\.frozen keeps a network as it is, and model\.warm_start is null"),
        (
            ("model.warm_start=elsewhere",),
            r"model\.warm_start: elsewhere/model\.safetensors does not exist \(the path is relative to /",
        ),
    ],
)
def test_a_frozen_network_is_a_trained_one(setting: tuple[str, ...], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        small_run.train(tmp_path / "run", *PLAIN, "exits.count=2", "exits.frozen=true", *setting)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("frozen", [False, True])
def test_a_killed_training_ends_the_same(frozen: bool, tmp_path: Path) -> None:
    choice = (*PLAIN, "exits.count=3", "schedule.epochs=3")
    if frozen:
        first = small_run.train(tmp_path / "first", *PLAIN, "schedule.epochs=1")
        choice = (*choice, f"model.warm_start={first}", "exits.frozen=true", "schedule.choose=last")
    straight = small_run.train(tmp_path / "straight", *choice)

    class Killed(BaseException):
        pass

    from swiftsure.training import loop

    real, calls = loop.states.save, []

    def save_and_die(*arguments: object) -> None:
        real(*arguments)
        calls.append(1)
        if len(calls) == 2:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.states, "save", save_and_die)
        with pytest.raises(Killed):
            small_run.train(tmp_path / "broken", *choice)
    run.train(small_run.recipe(*choice), tmp_path / "broken", resume=True, device="cpu")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "broken" / name).read_bytes() == (straight / name).read_bytes()


def test_a_report_of_runs_with_and_without_exits(evaluated: Path, tmp_path: Path) -> None:
    plain = small_run.train(tmp_path / "plain", *PLAIN, "schedule.epochs=1")
    assert report.page([evaluated, plain], tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("exits.at={9: linear}",), "exits: Sequential: unknown module '9'"),
        (("exits.at={2: convs}",), "exits: unknown head 'convs'; did you mean 'conv'?"),
        (("exits.count=99",), "exits: exits is 99"),
        (("exits.count=3", "exits.thresholds=[0.1]"), "exits: 1 thresholds for 3 exits; allowed: 2"),
        (("exits.thresholds=[0.1]",), "exits: 1 thresholds for 1 exits"),
        (("exits.count=3", "exits.macs=5"), "exits.macs is 5; the first exit alone costs "),
        (("exits.macs=5000",), "exits.macs is a budget for several exits, and the network has one"),
    ],
)
def test_exits_that_do_not_fit_are_refused_before_training(
    tmp_path: Path, overrides: tuple[str, ...], words: str
) -> None:
    with pytest.raises(InputError) as caught:
        small_run.train(tmp_path / "run", *PLAIN, *overrides)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_measurements_that_cannot_be(folder: Path, tmp_path: Path) -> None:
    before = {item.name: item.read_bytes() for item in folder.iterdir()}
    with pytest.raises(InputError, match="macs is 3"):
        calibrate_run(folder, macs=3, device="cpu")
    with pytest.raises(InputError, match="1 thresholds for 3 exits"):
        calibrate_run(folder, thresholds=[0.5], device="cpu")
    with pytest.raises(InputError, match="are given together"):
        calibrate_run(folder, thresholds=[0.5, 0.5], macs=1e9, device="cpu")
    with pytest.raises(InputError, match="unknown rule of exits 'entrop'"):
        calibrate_run(folder, policy="entrop", device="cpu")
    assert {item.name: item.read_bytes() for item in folder.iterdir()} == before
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "policy": None}))
    with pytest.raises(InputError, match="3 exits and no thresholds"):
        evaluation.attack_run(folder, device="cpu")
    assert evaluation.measure_run(folder, device="cpu").results["macs"]["static"] > 0
    plain = small_run.train(tmp_path / "plain", *PLAIN, "schedule.epochs=1")
    with pytest.raises(InputError, match="has a network of one exit"):
        calibrate_run(plain, device="cpu")
    Image.new("L", (9, 9)).save(tmp_path / "large.png")
    with pytest.raises(InputError, match="9x9 pixels"):
        predict(plain, [tmp_path / "large.png"], device="cpu")
    with pytest.raises(InputError, match="cannot be read as an image"):
        predict(plain, [tmp_path / "none.png"], device="cpu")
