"""A run directory: what is in it, when it is refused, and how it is measured."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import swiftsure as ss
from small_run import recipe, train
from swiftsure import certificates, evaluation, examples, recipe_file, results, run, samples
from swiftsure.bounds import TECHNIQUES
from swiftsure.certificates import Certificate, certify
from swiftsure.errors import InputError, SoundnessError


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A trained run of the test's own."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def generous(net, x, y, **options) -> Certificate:
    """Certifies whatever is classified rightly: unsound, and so to be found out."""
    honest = certify(net, x, y, **options)
    right = net(x).argmax(1) == y
    return replace(
        honest,
        certified=right,
        margin=torch.where(right, 1.0, -1.0),
        method=["symbolic" if one else "none" for one in right.tolist()],
    )


# What training writes


def test_files_of_a_finished_training(trained: Path) -> None:
    names = {item.name for item in trained.iterdir()}
    assert names == {"recipe.yaml", "config.json", "model.safetensors", "log.jsonl", "results.json"}
    assert recipe_file.read(trained / "recipe.yaml") == recipe()
    # Resolved: what the small recipe left to defaults is written out.
    assert yaml.safe_load((trained / "recipe.yaml").read_text())["optimizer"]["name"] == "adam"
    log = run.read_log(trained)
    assert [line["epoch"] for line in log] == [1, 2, 3]
    assert sum(line["chosen"] for line in log) == 1
    config = json.loads((trained / "config.json").read_text())
    assert config["ball"] == {"eps": 0.02, "norm": "inf", "low": 0.0, "high": 1.0}
    assert config["classes_names"] == list("0123456789")
    assert config["data"]["test_sha256"] == ss.data.load("digits").test.sha256()
    found = results.read(trained)
    assert found["seconds"]["train"] == pytest.approx(sum(line["seconds"] for line in log))
    assert (found["seed"], found["device"], found["clean"]) == (0, "cpu", None)
    assert found["weights_sha256"] == config["weights_sha256"]
    assert set(found["versions"]) == {"swiftsure", "torch", "numpy", "python"}


def test_public_face(trained: Path) -> None:
    net = ss.load(trained)
    x, y = ss.data.load("digits").test.batch(slice(0, 4))
    ball = ss.Ball(eps="1/255")
    assert ss.margins(net, x, y, ball).shape == (4, 10)
    assert ss.attacks.pgd(net, x, y, ball, steps=1).shape == x.shape
    assert len(ss.certify(net, x, y, ball)) == 4
    assert ss.models.names()
    assert callable(ss.fit)
    assert ss.__version__
    assert set(ss.__all__) == set(dir(ss))
    for name in ss.__all__:
        assert getattr(ss, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = ss.nonsense


def test_warm_start_begins_with_those_weights(tmp_path: Path, trained: Path) -> None:
    still = ("optimizer.rate=1e-30", "optimizer.decay=constant")
    again = train(tmp_path / "again", f"model.warm_start={trained}", *still)
    weights = ss.models.read_weights(trained / "model.safetensors")
    for name, tensor in ss.models.read_weights(again / "model.safetensors").items():
        torch.testing.assert_close(tensor, weights[name])


def test_existing_runs_are_not_touched(folder: Path) -> None:
    before = {item.name: item.read_bytes() for item in folder.iterdir()}
    with pytest.raises(InputError, match="holds a run already"):
        run.train(recipe(), folder, device="cpu")
    with pytest.raises(InputError, match=r"begun with optimizer.rate = 0.001, now it is 0.5"):
        run.train(recipe("optimizer.rate=0.5"), folder, device="cpu", resume=True)
    assert run.train(recipe(), folder, device="cpu", resume=True).finished_before
    assert {item.name: item.read_bytes() for item in folder.iterdir()} == before


def test_foreign_folders_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for resume in (False, True):
        with pytest.raises(InputError, match="not empty and no run"):
            run.train(recipe(), tmp_path, device="cpu", resume=resume)
    assert [item.name for item in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_training_that_cannot_begin_leaves_nothing(tmp_path: Path) -> None:
    for override, fault in (
        ("data.name=nosuch", "data set is 'nosuch'"),
        ("model.name=mnist_small", "mnist_small takes images of 1x28x28, digits has 1x8x8"),
        ("data.crop=9", "crop is 9"),
        ("model.warm_start=/nowhere", "/nowhere"),
        ("optimizer.rate=1e20", "the loss became"),
    ):
        with pytest.raises(InputError, match=fault):
            run.train(recipe(override), tmp_path / "run", device="cpu")
        assert list(tmp_path.iterdir()) == []


def test_first_difference() -> None:
    assert recipe_file.first_difference(recipe(), recipe()) is None
    assert recipe_file.first_difference(recipe(), recipe("loss.k=2", "seed=4")) == ("seed", 0, 4)


# Measuring


def test_evaluate_joins_all_parts(folder: Path) -> None:
    measured = evaluation.evaluate_run(folder, device="cpu")
    found = results.read(folder)
    assert found == measured.results
    assert found["clean"]["n"] == found["attacked"]["n"] == found["verified"]["n"] == 60
    assert 0 < found["verified_accuracy"] <= found["robust_accuracy"]["union"] <= found["clean_accuracy"] < 1
    assert found["attacked"]["suite"] == "quick"
    assert found["macs"]["static"] == found["macs"]["certified_max"] > 0
    assert found["latency_ms"]["static_b1"] > 0
    table = samples.read(folder)
    assert list(table) == [
        *("index", "label", "prediction", "correct", "attack:fgsm", "attack:pgd40", "attack:union"),
        *("attack_8bit:fgsm", "attack_8bit:pgd40", "attack_8bit:union"),
        *(f"verified:{name}" for name in sorted(TECHNIQUES)),
        *("certified", "margin", "max_exit", "max_macs"),
    ]
    assert table["certified"].mean() == pytest.approx(found["verified_accuracy"])
    assert 1 - table["attack:union"].mean() == pytest.approx(found["robust_accuracy"]["union"])
    assert measured.page == folder / "report.html"
    assert "60 test images of digits" in measured.page.read_text()
    assert len(certificates.read(folder).certificate) == 60
    with np.load(folder / examples.NAME) as arrays:
        index = arrays["index"]
        assert (arrays["certified"] == (table["certified"][index] == 1)).all()
        assert (arrays["attack_broke"] == (table["attack:union"][index] == 1)).all()
        assert np.abs(arrays["x_adv"] - arrays["x"] / 255).max() <= 0.02 + 1e-6
    assert not (folder / examples.BROKEN).exists()


def test_commands_one_by_one_equal_evaluate(folder: Path, tmp_path: Path) -> None:
    whole = Path(shutil.copytree(folder, tmp_path / "whole"))
    evaluation.evaluate_run(whole, device="cpu")
    evaluation.attack_run(folder, device="cpu")
    evaluation.certify_run(folder, device="cpu")
    evaluation.measure_run(folder, device="cpu")
    first, second = results.read(whole), results.read(folder)
    for name in ("clean", "attacked", "verified", "macs"):
        assert first[name] == second[name]
    assert (whole / "samples.csv").read_bytes() == (folder / "samples.csv").read_bytes()
    assert (whole / "certificates.jsonl").read_bytes() == (folder / "certificates.jsonl").read_bytes()
    with np.load(whole / examples.NAME) as one, np.load(folder / examples.NAME) as other:
        shared = np.isin(other["index"], one["index"])
        assert shared.any()
        place = np.searchsorted(one["index"], other["index"][shared])
        for name in one.files:
            np.testing.assert_array_equal(one[name][place], other[name][shared])


def test_other_samples_or_another_ball_do_not_join(folder: Path) -> None:
    evaluation.attack_run(folder, device="cpu", limit=20)
    before = {item.name: item.read_bytes() for item in folder.iterdir()}
    with pytest.raises(InputError, match="n = 30 cannot join attacked on n = 20"):
        evaluation.certify_run(folder, device="cpu", limit=30)
    with pytest.raises(InputError, match=r"eps 0\.1 .* cannot join attacked .* eps 0\.02"):
        evaluation.certify_run(folder, device="cpu", limit=20, eps=0.1)
    assert {item.name: item.read_bytes() for item in folder.iterdir()} == before
    evaluation.evaluate_run(folder, device="cpu", limit=10, eps="1/255")
    assert results.read(folder)["attacked"]["ball"]["eps"] == pytest.approx(1 / 255)
    assert len(samples.read(folder)["index"]) == 10


def test_an_attack_that_breaks_a_certified_sample_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "certify", generous)
    with pytest.raises(SoundnessError, match=r"sample (\d+) is certified, yet broken by .*pgd40") as caught:
        evaluation.evaluate_run(folder, device="cpu", eps=0.2)
    assert results.read(folder)["verified"] is None
    table = samples.read(folder)
    broken = samples.broken_certificates(table)
    assert f"sample {broken[0]} is certified" in str(caught.value)
    with np.load(folder / examples.BROKEN) as arrays:
        assert arrays["index"].tolist() == broken.tolist()
        assert (arrays["adversarial_prediction"] != arrays["label"]).all()
    # Nothing is left of it once the certificates are sound.
    monkeypatch.undo()
    evaluation.evaluate_run(folder, device="cpu", eps=0.2)
    assert not (folder / examples.BROKEN).exists()


def test_broken_certificates_are_found_across_commands(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Path(shutil.copytree(folder, folder.with_name("other")))
    monkeypatch.setattr(evaluation, "certify", generous)
    evaluation.certify_run(folder, device="cpu", eps=0.2)
    (folder / "samples.csv").unlink()  # the certificate file alone must do
    with pytest.raises(SoundnessError, match=r"sample \d+ is certified"):
        evaluation.attack_run(folder, device="cpu", eps=0.2)
    assert (folder / examples.BROKEN).exists()
    assert results.read(folder)["attacked"] is None
    evaluation.attack_run(other, device="cpu", eps=0.2)
    with pytest.raises(SoundnessError, match=r"sample \d+ is certified"):
        evaluation.certify_run(other, device="cpu", eps=0.2)
    assert results.read(other)["verified"] is None


def test_certificates_of_another_ball_are_not_compared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "certify", generous)
    evaluation.certify_run(folder, device="cpu", eps=0.001)
    found = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps({**found, "verified": None, "verified_accuracy": None}))
    evaluation.attack_run(folder, device="cpu", eps=0.2)
    assert "certified" not in samples.read(folder)


def test_a_builder_of_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\n"
        "def build(width=4):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    mine = recipe("model.options.width=6")
    done = run.train(mine, "runs/mine", device="cpu", model="my_nets:build")
    with pytest.raises(InputError, match="name what builds it with --model my_nets:build"):
        evaluation.certify_run(done.folder, device="cpu", limit=5)
    found = evaluation.certify_run(done.folder, device="cpu", limit=5, model="my_nets:build")
    assert found.results["verified"]["n"] == 5
    assert found.parameters == 64 * 6 + 6 + 6 * 10 + 10
    for spec in ("my_nets", "my_nets:nothing", "no_such:build", "os:getcwd"):
        with pytest.raises(InputError, match=f"--model (is ')?{spec}"):
            run.build_from(spec, {})


def test_samples_keep_their_gaps(tmp_path: Path) -> None:
    table = {"index": np.arange(3), "label": np.array([1, 0, 2]), "margin": np.array([0.125, np.nan, -3.5])}
    samples.write(tmp_path, table)
    again = samples.read(tmp_path)
    assert list(again) == ["index", "label", "margin"]
    for name, column in table.items():
        np.testing.assert_array_equal(again[name], column)
    with pytest.raises(InputError, match="other samples"):
        samples.join(again, {"index": np.arange(3), "label": np.array([1, 1, 2])}, ["margin"])
