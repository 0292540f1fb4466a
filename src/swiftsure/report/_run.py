"""A run directory as the page needs it: read once, checked, and never written."""

from __future__ import annotations

import csv
import json
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from swiftsure import files
from swiftsure import results as results_file
from swiftsure.errors import InputError, SoundnessError

_LOG_FIGURES = (
    "eps", "weight", "rate", "loss", "clean_accuracy", "robust_accuracy", "verified_accuracy", "seconds",
)  # fmt: skip
_EXAMPLE_ARRAYS = {
    "x": 4, "x_adv": 4, "label": 1, "clean_prediction": 1, "adversarial_prediction": 1,
    "attack_broke": 1, "certified": 1, "margin": 1, "index": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Samples:
    """The columns of samples.csv, one entry a sample; what was not run is NaN, a missing column None.

    Attributes:
        label: (N,) true classes.
        correct, attacked, certified: (N,) 1 where the sample is right, right under every attack, proven.
        margin: (N,) the smallest lower bound of z_y - z_j.
    """

    label: NDArray[np.int64]
    correct: NDArray[np.float64] | None
    attacked: NDArray[np.float64] | None
    certified: NDArray[np.float64] | None
    margin: NDArray[np.float64] | None


@dataclass(frozen=True)
class Run:
    """One run directory.

    Attributes:
        name: the recipe's name, or that of the folder.
        results: results.json, checked.
        log: the lines of log.jsonl, in order of epochs.
        recipe, recipe_text: recipe.yaml as read and as written; empty where there is none.
        config: config.json; empty where there is none.
        classes: class names, empty where none are known.
        samples, examples, sweep: samples.csv, examples.npz and sweep.json, or None.
    """

    folder: Path
    name: str
    results: dict[str, Any]
    log: list[dict[str, Any]]
    recipe: dict[str, Any]
    recipe_text: str
    config: dict[str, Any]
    classes: tuple[str, ...]
    samples: Samples | None
    examples: dict[str, NDArray[Any]] | None
    sweep: dict[str, Any] | None

    def class_name(self, label: int) -> str:
        """The name of a class, or its number where it has none."""
        return self.classes[label] if 0 <= label < len(self.classes) else str(label)


def read_run(folder: str | Path) -> Run:
    """Read a run directory: results.json and log.jsonl must be there, the rest is shown if it is.

    Raises:
        InputError: no such folder, a missing or damaged file.
        SoundnessError: a certified sample is broken by an attack.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is no run directory; allowed: a folder that `swiftsure train` wrote")
    results = results_file.read(folder)
    log = _read_log(folder / "log.jsonl")
    recipe_text, recipe = _read_recipe(folder / "recipe.yaml")
    config = _read_config(folder / "config.json")
    names = config.get("classes_names") or ()
    if not isinstance(names, list | tuple):
        raise InputError(f"{folder / 'config.json'}: classes_names is {names!r}; allowed: a list of names")
    samples = _read_samples(folder / "samples.csv")
    measured = {results[part]["n"] for part in results_file.SAMPLED if results[part]}
    if samples is not None and measured and measured != {len(samples.label)}:
        raise InputError(
            f"{folder / 'samples.csv'} has {len(samples.label):,} rows, results.json is of {max(measured):,} samples; "
            "`swiftsure evaluate` writes both"
        )
    return Run(
        folder=folder,
        name=str(recipe.get("name") or folder.resolve().name),
        results=results,
        log=log,
        recipe=recipe,
        recipe_text=recipe_text,
        config=config,
        classes=tuple(map(str, names)),
        samples=samples,
        examples=_read_examples(folder / "examples.npz"),
        sweep=_read_sweep(folder / "sweep.json", results["weights_sha256"]),
    )


def _read_log(path: Path) -> list[dict[str, Any]]:
    text = _text(path)
    if text is None:
        raise InputError(f"{path.parent} has no {path.name}; `swiftsure train` writes it, one line an epoch")
    lines: list[dict[str, Any]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            raise InputError(f"{path}, line {number}: not a JSON object") from None
        if not isinstance(entry, dict):
            raise InputError(f"{path}, line {number}: not a JSON object")
        epoch = entry.get("epoch")
        if not isinstance(epoch, int) or epoch <= (lines[-1]["epoch"] if lines else 0):
            raise InputError(f"{path}, line {number}: epoch is {epoch!r}; allowed: integers from 1 that grow")
        for name in _LOG_FIGURES:
            if not _is_figure(entry.setdefault(name, None)):
                raise InputError(
                    f"{path}, line {number}: {name} is {entry[name]!r}; allowed: a number or null"
                )
        lines.append(entry)
    return lines


def _is_figure(value: Any) -> bool:
    return value is None or (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    )


def _read_recipe(path: Path) -> tuple[str, dict[str, Any]]:
    text = _text(path)
    if text is None:
        return "", {}
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"{path} is not YAML; `swiftsure train` writes the resolved recipe there") from None
    if not isinstance(recipe, dict):
        raise InputError(
            f"{path} holds no recipe; allowed: a mapping with the keys name, data, model and so on"
        )
    return text, recipe


def _read_config(path: Path) -> dict[str, Any]:
    config = files.read_json(path) if path.exists() else {}
    if not isinstance(config, dict):
        raise InputError(f"{path} is not the JSON object that swiftsure saves with a model")
    return config


def _read_samples(path: Path) -> Samples | None:
    text = _text(path)
    if text is None:
        return None
    reader = csv.DictReader(text.splitlines())
    rows = list(reader)
    if "label" not in (reader.fieldnames or []):
        raise InputError(f"{path} has no column 'label'; `swiftsure evaluate` writes it, one row a sample")

    def column(name: str) -> NDArray[np.float64] | None:
        if name not in (reader.fieldnames or []):
            return None
        try:
            return np.array([float(row[name] or "nan") for row in rows])
        except ValueError:
            raise InputError(f"{path}: column {name!r} holds what is no number") from None

    label, correct, certified = column("label"), column("correct"), column("certified")
    broken = column("attack:union")
    if label is None or not np.isfinite(label).all():
        raise InputError(f"{path}: a row has no label")
    if broken is not None and certified is not None and ((broken == 1) & (certified == 1)).any():
        row = rows[int(((broken == 1) & (certified == 1)).argmax())]
        raise SoundnessError(f"{path}: sample {row.get('index')} is certified and an attack breaks it")
    return Samples(
        label=label.astype(np.int64),
        correct=correct,
        # A sample that was wrong from the start may count as unbroken, but it is not right under attack.
        attacked=None if broken is None else (1 - broken) * (1 if correct is None else correct),
        certified=certified,
        margin=column("margin"),
    )


def _read_examples(path: Path) -> dict[str, NDArray[Any]] | None:
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            examples = {name: archive[name] for name in _EXAMPLE_ARRAYS}
    except KeyError as error:
        raise InputError(f"{path} lacks an array: {error.args[0]}") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        raise InputError(f"{path} is not the archive of arrays that `swiftsure evaluate` writes") from None
    for name, dims in _EXAMPLE_ARRAYS.items():
        if examples[name].ndim != dims or len(examples[name]) != len(examples["label"]):
            raise InputError(
                f"{path}: {name} has shape {examples[name].shape}; allowed: {dims} dimensions, one entry each"
            )
    shape = examples["x"].shape
    if examples["x_adv"].shape != shape or shape[1] not in (1, 3):
        raise InputError(
            f"{path}: x {shape} and x_adv {examples['x_adv'].shape} must agree, with 1 or 3 channels"
        )
    return examples


def _read_sweep(path: Path, weights_sha256: str | None) -> dict[str, Any] | None:
    if not path.exists():
        return None
    sweep = files.read_json(path)
    mend = f"`swiftsure evaluate {path.parent}` writes it anew"
    try:
        points = [*sweep["points"], sweep["deployed"]]
        figures = [point[name] for point in points for name in ("accuracy", "attacked_accuracy")]
        shares = list(sweep["deployed"]["exits"].values())
        costs = [point[name] for point in points for name in ("macs", "attacked_macs")]
        good = (
            all(0 <= value <= 1 for value in [*figures, *(one for exits in shares for one in exits)])
            and all(0 <= value < math.inf for value in costs)
            and len(points) > 1
            and len({len(exits) for exits in shares}) == 1
            and sweep["n"] >= sweep["attacked_n"] >= 1
            and all(isinstance(name, str) for name in [*sweep["attacks"], *sweep["deployed"]["exits"]])
        )
    except (TypeError, KeyError, AttributeError):
        good = False
    if not good:
        raise InputError(f"{path} is damaged; {mend}")
    if weights_sha256 not in (None, sweep.get("weights_sha256")):
        raise InputError(f"{path} is of other weights; {mend}")
    return dict(sweep)


def _text(path: Path) -> str | None:
    """The text of a file, or None where there is no file."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise InputError(f"{path} is no text file") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
