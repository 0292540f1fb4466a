"""A run as a record of the kind that RobustBench (Croce et al. 2021) keeps of a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swiftsure import models, results, run
from swiftsure.attacks.questions import RELIABLE, SUSPICIOUS
from swiftsure.errors import InputError

ABOUT = ("link", "name", "authors", "venue", "additional_data", "reported", "footnote")
"""What a run does not know about itself, and a record has a place for."""

COLUMNS = ("name", "clean", "robust", "verified", "threat model", "n", "suite", "guards", "architecture")
"""Of `as_row`."""


def record(folder: str | Path, **about: Any) -> dict[str, Any]:
    """RobustBench's fields, from what was measured; accuracies are percentages in text, as there.

    "external" is its field for the robust accuracy by another evaluation than AutoAttack's: the per-sample union of the
    suite. "autoattack_acc" is left to AutoAttack. "unreliable" is true where the guards are suspicious, null where they
    were not asked. Fields that RobustBench has not: norm, n, suite, guards, verified_acc, external_8bit, macs (a mean
    over the clean images).

    Args:
        folder: a run directory, attacked.
        about: any of `ABOUT`.

    Raises:
        InputError: the run was not attacked, or something about it has no place in a record.
    """
    unknown = [name for name in about if name not in ABOUT]
    if unknown:
        raise InputError(f"a record has no place for {unknown[0]!r}; allowed: {', '.join(ABOUT)}")
    folder = Path(folder)
    found, recipe = results.read(folder), run.read_recipe(folder)
    attacked, macs = found["attacked"], found["macs"]
    if attacked is None:
        raise InputError(f"{folder} was not attacked; `swiftsure attack {folder}` does it")
    guards = attacked.get("guards")
    model = models.read_config(folder).get("model") or {}
    return {
        "link": None,
        "name": recipe.name,
        "authors": None,
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": recipe.data.name,
        "venue": None,
        "architecture": model.get("name", recipe.model.name),
        "eps": str(
            recipe.ball.eps if recipe.ball.build().as_dict() == attacked["ball"] else attacked["ball"]["eps"]
        ),
        "clean_acc": _percent(found["clean_accuracy"]),
        "reported": None,
        "autoattack_acc": None,
        "external": _percent(attacked["accuracy"]["union"]),
        "unreliable": None if guards is None else {SUSPICIOUS: True, RELIABLE: False}.get(guards["verdict"]),
        "footnote": None,
        **about,
        "norm": {"inf": "Linf", "2": "L2", "1": "L1"}[attacked["ball"]["norm"]],
        "n": attacked["n"],
        "suite": f"swiftsure {found['versions'].get('swiftsure', '')} {attacked['suite']}",
        "guards": None if guards is None else f"{guards['verdict']}: {guards['reason']}",
        "external_8bit": _percent((attacked.get("accuracy_8bit") or {}).get("union")),
        "verified_acc": _percent(found["verified_accuracy"]),
        "macs": macs["static"] if macs["clean"] is None else macs["clean"],
    }


def as_row(entry: Mapping[str, Any]) -> str:
    """A record as a row of a markdown table, with `COLUMNS`."""
    name = f"[{entry['name']}]({entry['link']})" if entry["link"] else entry["name"]
    guards = (entry["guards"] or "not evaluated").partition(":")[0]
    cells = (
        name,
        f"{entry['clean_acc']}%",
        f"{entry['external']}%",
        "-" if entry["verified_acc"] is None else f"{entry['verified_acc']}%",
        f"{entry['norm']}, eps {entry['eps']}",
        f"{entry['n']:,}",
        entry["suite"],
        guards,
        entry["architecture"],
    )
    # A bar would end the cell.
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.2f}"
