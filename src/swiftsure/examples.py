"""examples.npz: some test images with the worst image an attack found for each, and all that is known of them."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

import swiftsure.files as files
from swiftsure import samples
from swiftsure.data import ImageSet
from swiftsure.errors import InputError
from swiftsure.samples import Table

NAME = "examples.npz"
BROKEN = "broken_certificates.npz"
"""The same arrays of every certified sample that an attack broke. Without such a sample there is no such file."""

_EACH = 12
"""How many of each kind are kept: certified, unproven, broken, and wrong from the start."""


def write(folder: Path, images: ImageSet, table: Table, worst: Tensor, answer: NDArray[np.int64]) -> None:
    """Write examples of every kind, and broken_certificates.npz where a certificate is broken.

    Args:
        folder: the run directory.
        images: the n samples.
        table: their rows of samples.csv.
        worst: the worst image found for each, (n, C, H, W).
        answer: the class that the network gives it, (n,).

    Raises:
        InputError: the folder cannot be written.
    """
    _save(folder / NAME, _arrays(_chosen(table), images, table, worst, answer))
    broken = samples.broken_certificates(table)
    if len(broken):
        _save(folder / BROKEN, _arrays(broken, images, table, worst, answer))
    else:
        (folder / BROKEN).unlink(missing_ok=True)


def update(folder: Path, table: Table) -> None:
    """Put new certificates into the examples that are there; drop examples of attacks that no longer count.

    Raises:
        InputError: the file is damaged, or the folder cannot be written.
    """
    path = folder / NAME
    if not path.exists():
        return
    if not any(map(samples.is_attacked, table)):
        path.unlink()
        return
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        rows = arrays["index"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        raise InputError(f"{path} is damaged; remove it, and attack again to have a new one") from None
    _save(path, {**arrays, **_proven(rows, table)})


def _chosen(table: Table) -> NDArray[np.int64]:
    """Rows of every kind, the first of each."""
    right, broken = table["correct"] == 1, table["attack:union"] == 1
    certified = table["certified"] == 1 if "certified" in table else np.zeros_like(right)
    kinds = (~right, right & broken, right & ~broken & ~certified, right & ~broken & certified)
    return np.sort(np.concatenate([np.flatnonzero(kind)[:_EACH] for kind in kinds]))


def _arrays(
    rows: NDArray[np.int64], images: ImageSet, table: Table, worst: Tensor, answer: NDArray[np.int64]
) -> dict[str, NDArray[Any]]:
    return {
        "index": rows,
        "x": images.images[rows].cpu().numpy(),
        "x_adv": worst[rows].cpu().numpy().astype(np.float32),
        "label": table["label"][rows],
        "clean_prediction": table["prediction"][rows],
        "adversarial_prediction": answer[rows],
        "attack_broke": table["attack:union"][rows] == 1,
        **_proven(rows, table),
    }


def _proven(rows: NDArray[np.int64], table: Table) -> dict[str, NDArray[Any]]:
    if "certified" not in table:
        return {
            "certified": np.zeros(len(rows), dtype=bool),
            "margin": np.full(len(rows), np.nan, dtype=np.float32),
        }
    return {"certified": table["certified"][rows] == 1, "margin": table["margin"][rows].astype(np.float32)}


def _save(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    # Into an open file: given a path, numpy would add a suffix to the temporary name.
    with files.atomic(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
