"""How images use the exits, as bars; accuracy against cost as thresholds sweep, as lines. Positions are in percent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swiftsure.report._charts import Tick, round_steps

COLOURS = 6
"""Runs that have a colour of their own; further ones have the same again, dashed."""
_USES = {
    "attacked": "the worst images of all attacks",
    "slowdown": "images made to be slow",
    "certified": "proven: at the latest",
}


@dataclass(frozen=True)
class Use:
    """A row of bars: of which images, and the share of them that leaves at each exit."""

    name: str
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Curve:
    """A line, and the dot of what is deployed, as SVG paths; `path` is empty where there is only the dot."""

    name: str
    style: str
    path: str
    dot: str
    text: str


@dataclass(frozen=True)
class Curves:
    """A plot of accuracy over multiply-adds."""

    title: str
    curves: tuple[Curve, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    unit: str


def uses(exits: Mapping[str, Any], sweep: Mapping[str, Any] | None = None) -> list[Use]:
    """Rows for clean images, for each attack of the sweep, and for the worst, the slowed and the proven ones.

    Args:
        exits: of results.json.
        sweep: sweep.json, whose attacks are shown as well.
    """
    rows = [] if exits["clean"] is None else [Use("clean", tuple(exits["clean"]))]
    if sweep is not None:
        rows += [
            Use(name, tuple(shares)) for name, shares in sweep["deployed"]["exits"].items() if name != "clean"
        ]
    return rows + [Use(text, tuple(exits[key])) for key, text in _USES.items() if exits.get(key) is not None]


def mixes(exits: int) -> list[int]:
    """How much of the first exit's colour each exit has, in percent; the last has none."""
    return [round(100 * (exits - 1 - exit) / max(exits - 1, 1)) for exit in range(exits)]


def run_curves(sweep: Mapping[str, Any]) -> Curves:
    """One run's clean and attacked accuracy in one plot."""
    return _plot(
        "Accuracy and cost", [("clean", "clean", sweep, ""), ("attacked", "attacked", sweep, "attacked_")]
    )


def compared_curves(sweeps: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Curves]:
    """Several runs, each a name and its sweep.json, in two plots: clean and attacked."""
    styles = [
        f"run{number % COLOURS}" + (" dashed" if number >= COLOURS else "") for number in range(len(sweeps))
    ]
    return [
        _plot(title, [(name, style, sweep, key) for (name, sweep), style in zip(sweeps, styles, strict=True)])
        for title, key in (("Clean", ""), ("Attacked", "attacked_"))
    ]


def words(sweeps: Sequence[Mapping[str, Any]]) -> str:
    """How the lines came about."""
    counts = sorted({sweep["attacked_n"] for sweep in sweeps})
    first = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    names = sorted({sweep["attacks"][0].partition("_")[0] for sweep in sweeps})
    steps = " or ".join(name.replace("pgd", "PGD-") for name in names)
    return (
        "Lines: thresholds from “all leave at the first exit” to “all at the last”, fitted to held-out images. Dots: "
        f"as deployed. Attacked: the first {first} images, right where they stay so under {steps} on the loss of each "
        "exit and on the average of all; these images know no thresholds, and their mean cost is shown."
    )


def _plot(title: str, lines: Sequence[tuple[str, str, Mapping[str, Any], str]]) -> Curves:
    """Lines of name, style, sweep and the prefix of its figures; the cost begins at 0."""
    points = [[_figures(point, key) for point in sweep["points"]] for _, _, sweep, key in lines]
    deployed = [_figures(sweep["deployed"], key) for _, _, sweep, key in lines]
    seen = [*(point for line in points for point in line), *deployed]
    most = max(cost for cost, _ in seen) or 1.0
    step = 0.05 if max(y for _, y in seen) - min(y for _, y in seen) > 0.1 else 0.01
    low = math.floor(min(y for _, y in seen) / step + 1e-9) * step
    high = max(math.ceil(max(y for _, y in seen) / step - 1e-9) * step, low + step)
    scale, unit = next(
        ((s, w) for s, w in ((1e9, "billion "), (1e6, "million "), (1e3, "thousand ")) if most >= s),
        (1.0, ""),
    )

    def at(point: tuple[float, float]) -> str:
        return f"{100 * point[0] / most:.2f} {100 * (high - point[1]) / (high - low):.2f}"

    drawn = [
        Curve(
            name=name,
            style=style,
            path="M" + "L".join(map(at, line)) if len(line) > 1 else "",
            dot=f"M{at(dot)}h0",
            text=f"{100 * dot[1]:.1f}% at {dot[0] / scale:.3g} {unit}multiply-adds",
        )
        for (name, style, _, _), line, dot in zip(lines, points, deployed, strict=True)
    ]
    return Curves(
        title,
        tuple(drawn),
        tuple(Tick(100 * value * scale / most, f"{value:.4g}") for value in round_steps(0, most / scale, 5)),
        tuple(
            Tick(100 * (high - value) / (high - low), f"{100 * value:.3g}%")
            for value in round_steps(low, high, 5)
        ),
        f"{unit}multiply-adds an image",
    )


def _figures(point: Mapping[str, Any], key: str) -> tuple[float, float]:
    return point[f"{key}macs"], point[f"{key}accuracy"]
