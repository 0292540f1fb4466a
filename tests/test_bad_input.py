"""Errors of use: one line that says what is wrong and what is allowed, code 2, and nothing written or lost."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import swiftsure as ss
from small_run import recipe, train, write_recipe
from swiftsure import recipe_file
from swiftsure.cli import main
from swiftsure.errors import InputError
from swiftsure.recipe import Recipe

MEASUREMENTS = ("attack", "certify", "measure", "evaluate")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("trained") / "run", "schedule.epochs=1", "schedule.ramp=0")


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def tree(root: Path) -> dict[str, bytes | None]:
    return {
        str(item.relative_to(root)): item.read_bytes() if item.is_file() else None for item in root.rglob("*")
    }


def refused(capsys: pytest.CaptureFixture[str], root: Path, *words: str | Path) -> str:
    """The line, once it is sure that it is one line, that the code is 2, and that no file has changed."""
    before = tree(root)
    assert main([str(word) for word in words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert "Traceback" not in line
    assert tree(root) == before
    return line


RECIPES = [
    ("loss: {kk: 3}", "unknown key 'loss.kk'; did you mean 'loss.k'?"),
    ("los: {k: 3}", "unknown key 'los'; did you mean 'loss'?"),
    ("epochs: 3", "unknown key 'epochs'; did you mean 'schedule.epochs'?"),
    ("loss: {mixing: {gaet: 1}}", "did you mean 'loss.mixing.gate'?"),
    ("loss: {k: three}", "loss.k is 'three'; allowed: an integer or null"),
    ("loss: {k: 1.5}", "loss.k is 1.5; allowed: an integer or null"),
    ("seed: true", "seed is True; allowed: an integer"),
    ("loss: {bound: symblic}", "loss.bound is 'symblic'; allowed: interval, crown-ibp, symbolic"),
    ("optimizer: {decay_epochs: [1, x]}", "allowed: a list, each an integer"),
    ("data: mnist", "data is 'mnist'; allowed: a table with the keys name"),
    ("loss: null", "loss is None; allowed: a table"),
    ("exits: 3", "exits is 3; allowed: a table with the keys at, count, policy, thresholds, macs"),
    ("exits: {att: {}}", "unknown key 'exits.att'; did you mean 'exits.at'?"),
    ("exits: {at: linear}", "exits.at is 'linear'; allowed: a table"),
    ("exits: {at: {1.1: linear}}", "exits.at has the key 1.1; allowed: names of modules, in quotes: '1.1'"),
    ("exits: {at: {'1': linear}, count: 3}", "exits.at and exits.count are both given"),
    ("exits: {count: 0}", "exits.count is 0; allowed: 1 or more, or null"),
    ("exits: {policy: guess}", "exits.policy is 'guess'; allowed: entropy, confidence"),
    ("exits: {thresholds: [0.1, .nan]}", "exits.thresholds holds nan; allowed: finite entropies >= 0"),
    ("exits: {policy: confidence, thresholds: [2]}", "exits.thresholds holds 2"),
    ("exits: {thresholds: [0.1], macs: 5}", "exits.thresholds and exits.macs are given together"),
    ("exits: {macs: 0}", "exits.macs is 0"),
    ("optimizer: {rate: .nan}", "optimizer.rate is nan; allowed: a finite number"),
    ("optimizer: {rate: .inf}", "optimizer.rate is inf; allowed: a finite number"),
    ('ball: {eps: "8/0"}', "eps is '8/0'; allowed: a number >= 0"),
    ("ball: {eps: -0.1}", "eps is -0.1; allowed: a finite number >= 0"),
    ("ball: {norm: l3}", "norm is 'l3'; allowed: 'inf', '2', '1'"),
    ("seed: -1", "seed is -1; allowed: 0 to "),
    ("seed: 99999999999999999999999", "seed is 99999999999999999999999; allowed: 0 to "),
    ("optimizer: {weight_decay: -1}", "optimizer.weight_decay is -1"),
    ("optimizer: {name: sgd, momentum: -1}", "optimizer.momentum is -1"),
    ("evaluate: {method: foo}", "evaluate.method"),
    ("schedule: {shape: epoch, epochs: 4, ramp: 4}", "warmup + ramp must be below epochs"),
    ("schedule: {epochs: 0}", "schedule.epochs is 0; allowed: 1 or more"),
    ("model: {name: minst_small}", "did you mean 'mnist_small'?"),
    ("model: {options: {wheels: 3}}", "'digits_small' cannot be built with options"),
    ("data: {name: minst}", "data set is 'minst'; allowed: digits, mnist"),
    ("seed: 1\nseed: 2", "line 2: 'seed' is given twice"),
    ("loss: {k: 1", "not YAML: line 1"),
    ("- a\n- b", "this is no recipe"),
    ("seed: !!python/object/apply:os.getcwd []", "not YAML: line 1"),
    ("\x00", "not YAML"),
]


@pytest.mark.parametrize(("text", "fault"), RECIPES)
def test_recipes(text: str, fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    line = refused(
        capsys, tmp_path, "train", tmp_path / "bad.yaml", "--out", tmp_path / "new", "--device", "cpu"
    )
    assert fault in line


@pytest.mark.parametrize(
    ("setting", "fault"),
    [
        ("loss.kk=3", "unknown key 'loss.kk'; did you mean 'loss.k'?"),
        ("k=3", "did you mean 'loss.k'?"),
        ("loss.k", "allowed: key=value"),
        ("loss=3", "loss is a section; set one of its keys"),
        ("loss.k=[1", "is not YAML"),
        ("loss.k=many", "loss.k is 'many'; allowed: an integer or null"),
        ("ball.eps=8/0", "eps is '8/0'"),
    ],
)
def test_settings(setting: str, fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = write_recipe(tmp_path)
    assert fault in refused(capsys, tmp_path, "train", small, "--set", setting, "--out", tmp_path / "new")


def test_numbers_as_people_write_them() -> None:
    read = recipe_file.parse("optimizer: {rate: 1e-3}\nball: {eps: 8/255, norm: 2}", "r", ["loss.l1=1e-5"])
    assert (read.optimizer.rate, read.loss.l1) == (1e-3, 1e-5)
    assert read.ball.build() == ss.Ball(8 / 255, "2")
    assert recipe_file.parse(recipe_file.dump(read), "again") == read
    assert recipe_file.parse("", "empty") == Recipe()


def test_missing_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--out", tmp_path / "new")
    assert "does not exist" in refused(capsys, tmp_path, "train", tmp_path / "none.yaml", *out)
    line = refused(capsys, tmp_path, "train", "digits_mixtran", *out)
    assert "did you mean 'digits_mixtrain', which comes with swiftsure?" in line
    assert "Is a directory" in refused(capsys, tmp_path, "train", tmp_path, *out)
    small = write_recipe(tmp_path)
    line = refused(capsys, tmp_path, "train", small, "--set", "data.name=mnist", "--data", tmp_path, *out)
    assert f"mnist not found in {tmp_path}" in line
    assert "swiftsure data fetch mnist" in line


@pytest.mark.parametrize("command", MEASUREMENTS)
def test_runs(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder.parent
    assert "allowed: a finite number >= 0" in refused(capsys, root, command, folder, "--eps", "-1")
    assert "eps is '8/0'" in refused(capsys, root, command, folder, "--eps", "8/0")
    assert "allowed here: auto, cpu" in refused(capsys, root, command, folder, "--device", "gpu")
    assert "is no run directory" in refused(capsys, root, command, root / "none")
    assert "has no recipe.yaml" in refused(capsys, root, command, root)

    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "damaged or not a safetensors file" in refused(capsys, root, command, folder)
    weights.write_bytes(b"")
    assert "damaged or not a safetensors file" in refused(capsys, root, command, folder)
    ss.models.save_weights(ss.models.build("mnist_small").state_dict(), weights)
    assert "has shape" in refused(capsys, root, command, folder)
    torch.manual_seed(5)
    ss.models.save_weights(ss.models.build("digits_small").state_dict(), weights)
    assert "is not the file that config.json was written with" in refused(capsys, root, command, folder)
    weights.unlink()
    assert "has no model.safetensors" in refused(capsys, root, command, folder)
    weights.write_bytes(whole)

    config = folder / "config.json"
    text = config.read_text()
    config.write_text(text[:-20])
    assert "not JSON" in refused(capsys, root, command, folder)
    found = json.loads(text)
    config.write_text(json.dumps({**found, "data": {**found["data"], "test_sha256": "0" * 64}}))
    assert "are not those of the run" in refused(capsys, root, command, folder)
    config.write_text(text)
    (folder / "results.json").write_text("{}")
    assert "results.json" in refused(capsys, root, command, folder)


def test_a_training_that_is_not_finished_cannot_be_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    (folder / "state").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe_file.dump(recipe()))
    line = refused(capsys, tmp_path, "attack", folder)
    assert f"swiftsure train {folder}/recipe.yaml --out {folder} --resume" in line


def test_unknown_suites_and_methods(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("attack", "evaluate"):
        assert "allowed: quick, standard, full" in refused(capsys, folder, command, folder, "--suite", "quik")
    for command in ("certify", "evaluate"):
        assert "allowed: interval, crown-ibp, symbolic" in refused(
            capsys, folder, command, folder, "--method", "crow"
        )


def test_existing_folders_and_other_recipes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = write_recipe(folder.parent)
    assert "holds a run already" in refused(capsys, folder.parent, "train", small, "--out", folder)
    line = refused(capsys, folder.parent, "train", small, "--set", "loss.k=7", "--out", folder, "--resume")
    assert "begun with loss.k = 1, now it is 7" in line


# Folders that cannot be written. Permissions do not stop the superuser, so these are of other kinds.


def test_folders_below_a_file_or_without_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = write_recipe(tmp_path)
    for place in (small / "below", "/proc/swiftsure", small):
        assert str(place) in refused(capsys, tmp_path, "train", small, "--out", place)


def test_report_cannot_replace_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder.parent / "page.html").mkdir()
    line = refused(capsys, folder.parent, "report", folder, "--out", folder.parent / "page.html")
    assert "it is a folder or a device" in line


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder.parent
    small = write_recipe(root)
    assert "No space left on device" in refused(capsys, root, "train", small, "--out", root / "new")
    for command in MEASUREMENTS:
        assert "No space left on device" in refused(capsys, root, command, folder, "--limit", "5")
    assert "No space left on device" in refused(capsys, root, "report", folder, "--out", root / "page.html")


def test_a_disk_that_fills_up_in_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small, folder = write_recipe(tmp_path), tmp_path / "run"
    honest, writes = os.fsync, iter(range(100))

    def fsync(file: int) -> None:
        if next(writes) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        honest(file)

    monkeypatch.setattr(os, "fsync", fsync)
    assert main(["train", str(small), "--out", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device" in line
    assert not list(folder.rglob(".*"))
    assert main(["train", str(small), "--out", str(folder), "--resume"]) == 0
    assert (folder / "model.safetensors").exists()


# Data


def write_idx(root: Path, name: str, array: np.ndarray) -> None:
    kind = {1: 0x0801, 3: 0x0803}[array.ndim]
    header = struct.pack(f">{1 + array.ndim}I", kind, *array.shape)
    with gzip.open(root / name, "wb") as file:
        file.write(header + array.astype(np.uint8).tobytes())


def test_labels_out_of_range_in_a_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part, count in (("train", 60), ("t10k", 10)):
        labels = np.arange(count) % 10
        labels[7] = 11 if part == "train" else 7
        write_idx(tmp_path, f"{part}-images-idx3-ubyte.gz", np.zeros((count, 28, 28)))
        write_idx(tmp_path, f"{part}-labels-idx1-ubyte.gz", labels)
    small = write_recipe(tmp_path)
    settings = ("--set", "data.name=mnist", "--set", "model.name=mnist_small")
    line = refused(capsys, tmp_path, "train", small, *settings, "--data", tmp_path, "--out", tmp_path / "new")
    assert "11" in line
    assert "9" in line


def test_bad_tensors_are_refused_everywhere(trained: Path) -> None:
    net, ball = ss.load(trained), ss.Ball(0.1)
    x, y = ss.data.load("digits").test.batch(slice(0, 40))
    nan = x.clone()
    nan[3, 0, 2, 2] = torch.nan
    wrong = y.clone()
    wrong[5] = 10
    for images, labels, fault in (
        (nan, y, "NaN"),
        (x * 255, y, "allowed: \\[0, 1\\]"),
        (x, wrong, "10"),
        (x, y[:-1], "label"),
        (x, y.float(), "integer"),
    ):
        for use in (
            lambda a, b: ss.attacks.pgd(net, a, b, ball, steps=1),
            lambda a, b: ss.certify(net, a, b, ball),
            lambda a, b: ss.margins(net, a, b, ball),
            lambda a, b: ss.fit(ss.models.build("digits_small"), (x, y), (a, b)),
        ):
            with pytest.raises(InputError, match=fault) as caught:
                use(images, labels)
            assert "\n" not in str(caught.value)
