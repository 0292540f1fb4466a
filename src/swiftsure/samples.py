"""samples.csv: one row a test image, with every verdict; where an attack meets a certificate, it shows here.

=====================  ====================================================================================
index, label           the image's number in the test set, and its class
prediction, correct    the class that the network gives the clean image, and whether it is the label (1 or 0)
exit, macs             with several exits: where the clean image leaves, from 0, and its multiply-adds
attack:NAME            1 where that attack broke the sample; a sample wrong without attack counts as broken
attack:union           1 where any did
attack_8bit:NAME       1 where it did so with pixels that are multiples of 1/255, and attack_8bit:union
slow_exit, slow_macs   with several exits: the latest exit, from 0, that attacks on the cost forced; multiply-adds
verified:METHOD        1 where that bound method proved the sample
certified, margin      1 where any did; the smallest lower bound of z_y - z_j
max_exit, max_macs     the last exit that any image of the ball can reach, and its multiply-adds
=====================  ====================================================================================
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import swiftsure.files as files
from swiftsure.errors import InputError, SoundnessError

NAME = "samples.csv"
Column = NDArray[np.float64] | NDArray[np.int64]
Table = dict[str, Column]
"""Columns by name, all of one length; NaN in a float column is an empty cell."""

_CLEAN = ("index", "label", "prediction", "correct", "exit", "macs")
_PROVEN = ("certified", "margin", "max_exit", "max_macs")


_SLOW = ("forced_macs", "slow_exit", "slow_macs")


def is_attacked(column: str) -> bool:
    """Whether a column says which samples an attack broke."""
    return column.startswith(("attack:", "attack_8bit:"))


def is_of_attacks(column: str) -> bool:
    """Whether a column is of attacks, on answers or on the cost."""
    return is_attacked(column) or column in _SLOW


def is_proven(column: str) -> bool:
    """Whether a column is of certification."""
    return column.startswith("verified:") or column in _PROVEN


def read(folder: Path) -> Table:
    """The table of a run; empty where there is none.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / NAME
    if not path.exists():
        return {}
    try:
        rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"))))
        names, body = rows[0], rows[1:]
        cells = np.array([[float(cell or "nan") for cell in row] for row in body]).reshape(
            len(body), len(names)
        )
    except (OSError, ValueError, IndexError) as error:
        raise InputError(f"{path} is damaged ({error}); remove it, or measure again") from None
    return {name: _integers_where_whole(cells[:, place]) for place, name in enumerate(names)}


def write(folder: Path, table: Mapping[str, Column]) -> None:
    """Write the table atomically, columns in the order of the module's description.

    Raises:
        InputError: the folder cannot be written.
    """
    names = sorted(table, key=_place)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(names)
    rows.writerows(zip(*([_cell(value) for value in table[name]] for name in names), strict=True))
    files.write_text(folder / NAME, text.getvalue())


def join(standing: Mapping[str, Column], measured: Mapping[str, Column], keep: Sequence[str]) -> Table:
    """Measured columns, beside those of an earlier measurement that are named in ``keep``.

    Args:
        standing: the table that is there; may be empty.
        measured: new columns, with index and label.
        keep: columns of the standing table that still hold, because they are of the same samples and ball.

    Raises:
        InputError: the standing columns are of other samples.
    """
    kept = {name: standing[name] for name in keep if name in standing and name not in measured}
    if kept and not all(
        np.array_equal(standing.get(name, ()), measured[name]) for name in ("index", "label")
    ):
        raise InputError(
            f"{NAME} is of other samples than those measured now; measure them together, with `swiftsure evaluate`"
        )
    return {**kept, **measured}


def broken_certificates(table: Mapping[str, Column]) -> NDArray[np.int64]:
    """Rows (from 0) that are certified and yet wrong or broken by an attack. There must be none."""
    if "certified" not in table:
        return np.zeros(0, dtype=np.int64)
    broken = np.asarray(table.get("correct", 1)) == 0
    for name in filter(is_attacked, table):
        broken = broken | (table[name] == 1)
    return np.flatnonzero(broken & (table["certified"] == 1))


def refuse_broken_certificates(folder: Path, table: Mapping[str, Column]) -> None:
    """The guard of every evaluation.

    Raises:
        SoundnessError: names the samples that are certified and broken, and the attacks; or those that cost more,
            attacked or not, than was proven to be the most.
    """
    _refuse_broken_costs(folder, table)
    rows = broken_certificates(table)
    if not len(rows):
        return
    first = rows[0]
    by = [name.partition(":")[2] for name in table if is_attacked(name) and table[name][first] == 1]
    by = list(dict.fromkeys(by))
    by = [name for name in by if name != "union"] or ["no attack at all: its clean image is misclassified"]
    others = "" if len(rows) == 1 else f" (and {len(rows) - 1} more: {_some(table['index'][rows[1:]])})"
    raise SoundnessError(
        f"sample {table['index'][first]} is certified, yet broken by {', '.join(by)}{others}; this is a defect of "
        f"swiftsure, and {folder / NAME} has the rows"
    )


def _refuse_broken_costs(folder: Path, table: Mapping[str, Column]) -> None:
    most = table.get("max_macs")
    for name in ("macs", "forced_macs", "slow_macs"):
        if most is None or name not in table:
            continue
        # NaN, where nothing is proven of the cost, compares false.
        rows = np.flatnonzero(table[name] > most)
        if len(rows):
            raise SoundnessError(
                f"sample {table['index'][rows[0]]} is proven to cost at most {most[rows[0]]:.0f} multiply-adds, yet "
                f"costs {table[name][rows[0]]:.0f} ({name}); this is a defect of swiftsure, and {folder / NAME} has "
                "the rows"
            )


def _some(indices: Column) -> str:
    shown = ", ".join(map(str, indices[:5]))
    return shown if len(indices) <= 5 else f"{shown}, ..."


def _place(name: str) -> tuple[int, int, str]:
    if name in _CLEAN:
        return 0, _CLEAN.index(name), name
    if is_attacked(name):
        kind, _, attack = name.partition(":")
        return 1 + int(kind == "attack_8bit"), int(attack == "union"), name
    if name in _SLOW:
        return 3, _SLOW.index(name), name
    if name in _PROVEN:
        return 5, _PROVEN.index(name), name
    return 4, 0, name


def _cell(value: float | int) -> str:
    if isinstance(value, np.integer):
        return str(int(value))
    return "" if np.isnan(value) else f"{value:.9g}"


def _integers_where_whole(column: NDArray[np.float64]) -> Column:
    whole = np.isfinite(column).all() and (column == np.round(column)).all()
    return column.astype(np.int64) if whole else column
