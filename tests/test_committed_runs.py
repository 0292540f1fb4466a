"""The runs under results/: what is committed is what this version reads, and can be proven again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from swiftsure import certificates, data, files, models, recipe_file, results, samples
from swiftsure.models.storage import WEIGHTS
from swiftsure.run import RECIPE

HERE = Path(__file__).resolve().parents[1] / "results"
RUNS = sorted(folder for folder in HERE.iterdir() if (folder / RECIPE).is_file())
CERTIFIED = [folder for folder in RUNS if (folder / certificates.NAME).exists()]


@pytest.mark.parametrize("folder", RUNS, ids=lambda folder: folder.name)
def test_a_run_is_whole(folder: Path) -> None:
    found = results.read(folder)
    assert recipe_file.read(folder / RECIPE).name == folder.name
    assert found["weights_sha256"] == files.sha256(folder / WEIGHTS)
    assert not models.load(folder).training
    assert found["seconds"]["train"] > 0


@pytest.mark.parametrize("folder", CERTIFIED, ids=lambda folder: folder.name)
def test_its_certificates_are_what_its_results_say(folder: Path) -> None:
    file, found = certificates.read(folder), results.read(folder)
    assert file.weights_sha256 == found["weights_sha256"]
    assert len(file.certificate) == found["verified"]["n"]
    assert file.certificate.certified.double().mean() == found["verified_accuracy"]
    assert file.certificate.by == found["verified"]["by"]
    assert file.certificate.ball.as_dict() == found["verified"]["ball"]
    table = samples.read(folder)
    assert table["certified"].sum() == file.certificate.certified.sum()
    assert not len(samples.broken_certificates(table))


@pytest.mark.real_data("mnist")
@pytest.mark.parametrize("folder", CERTIFIED, ids=lambda folder: folder.name)
def test_its_first_certificates_are_proven_again(folder: Path) -> None:
    torch.set_num_threads(1)
    recipe = recipe_file.read(folder / RECIPE)
    file = certificates.read(folder)
    if not file.certificate.certified[:10].any():
        pytest.skip("nothing of the first ten is certified")
    images = data.load(recipe.data.name, None, recipe.seed).test.select(slice(0, len(file.certificate)))
    again = certificates.recheck(models.load(folder), folder, images, limit=10)
    assert again.n == 10
    assert again.certified == int(file.certificate.certified[:10].sum())
