"""Plots as data: positions in percent of the plot's area, which the template draws as SVG paths and text.

The paths live in a stretched 100 x 100 view box and the text in HTML around it, so that a plot fills any
width while its words keep their size, and takes its colours from the page, in light, dark and print.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swiftsure.report._words import NOT_RUN, number, percent

_LABEL_GAP = 11.0
"""Percent of a plot's height between two labels at the end of lines: their text is about this tall."""


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: `at` percent from the left or the top, and its text."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """A line of a panel: its SVG path, style (a CSS class), and the label at its right end."""

    name: str
    style: str
    path: str
    value: str
    label_at: float


@dataclass(frozen=True)
class Panel:
    """A plot of lines over epochs. `kept` is the place of the chosen epoch, or None where none is marked."""

    title: str
    lines: tuple[Line, ...]
    missing: tuple[str, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    kept: float | None


@dataclass(frozen=True)
class Bar:
    """A bar of a histogram: place, width and height in percent, and whether its samples are proven."""

    left: float
    width: float
    height: float
    proven: bool
    text: str


@dataclass(frozen=True)
class Histogram:
    """Bars over a value, with the place of zero where it lies inside."""

    bars: tuple[Bar, ...]
    x_ticks: tuple[Tick, ...]
    zero: float | None


def accuracy_panel(log: Sequence[dict[str, Any]]) -> Panel:
    """Clean, attacked and verified accuracy on validation over the epochs of log.jsonl."""
    series = [
        ("clean", "clean", "clean_accuracy"),
        ("attacked", "attacked", "robust_accuracy"),
        ("proven", "proven", "verified_accuracy"),
    ]
    seen = [entry[key] for *_, key in series for entry in log if entry[key] is not None]
    low = math.floor(10 * min(seen, default=0.0)) / 10
    low = min(low, 0.8)
    return _panel("Accuracy on validation", log, series, (low, 1.0), percent)


def kept_epoch(log: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The epoch whose weights were kept: the last one marked, as each better epoch is marked in its turn."""
    return next((entry for entry in reversed(log) if entry.get("chosen") is True), None)


def kept_words(log: Sequence[dict[str, Any]]) -> str:
    """What validation said of the chosen epoch, or of the last where none is marked as chosen."""
    if not log:
        return ""
    kept = kept_epoch(log)
    entry, which = (log[-1], "the last") if kept is None else (kept, "the one kept")
    figures = ", ".join(
        f"{name} {percent(entry[key])}"
        for name, key in (
            ("clean", "clean_accuracy"), ("attacked", "robust_accuracy"), ("proven", "verified_accuracy"),
        )
    )  # fmt: skip
    return f"Epoch {entry['epoch']}, {which}: {figures}."


def small_panel(log: Sequence[dict[str, Any]], key: str, title: str) -> Panel:
    """One figure of log.jsonl ("weight", "eps", "loss") over the epochs; on a log scale over decades."""
    seen = [entry[key] for entry in log if entry[key] is not None]
    high = max(seen, default=1.0)
    span = (min(0.0, min(seen, default=0.0)), high if high > 0 else 1.0)
    log_scale = bool(seen) and min(seen) > 0 and high / min(seen) > 50
    if log_scale:
        span = (10 ** math.floor(math.log10(min(seen))), 10 ** math.ceil(math.log10(high)))
    return _panel(title, log, [(title.lower(), "plain", key)], span, number, log_scale=log_scale)


def histogram(margin: NDArray[np.float64], proven: NDArray[np.bool_], bins: int = 48) -> Histogram | None:
    """How the margins are spread; the outermost 0.5% on either side join the end bars.

    Args:
        margin: (N,) margins; NaN where they were not run.
        proven: (N,) whether the sample is certified, and its bar coloured so: no bin crosses zero.
    """
    known = np.isfinite(margin)
    margin, proven = margin[known], proven[known]
    if not len(margin):
        return None
    low, high = np.quantile(margin, (0.005, 0.995))
    low, high = float(min(low, 0.0)), float(max(high, 0.0))
    step = max(high - low, 1e-6) / bins
    first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
    edges = np.arange(first, last + 1) * step
    clipped = np.clip(margin, edges[0], np.nextafter(edges[-1], -math.inf))
    counts, _ = np.histogram(clipped, edges)
    certified, _ = np.histogram(clipped[proven], edges)
    width = 100 / len(counts)
    bars = [
        Bar(
            left=width * place,
            width=width,
            height=100 * int(count) / int(counts.max()),
            proven=2 * int(sure) > int(count),
            text=f"{count} from {edges[place]:.3g} to {edges[place + 1]:.3g}",
        )
        for place, (count, sure) in enumerate(zip(counts, certified, strict=True))
        if count
    ]

    def at(value: float) -> float:
        return float(100 * (value - edges[0]) / (edges[-1] - edges[0]))

    ticks = [Tick(at(value), f"{value:.10g}") for value in round_steps(float(edges[0]), float(edges[-1]), 6)]
    return Histogram(tuple(bars), tuple(ticks), at(0.0))


def _panel(
    title: str,
    log: Sequence[dict[str, Any]],
    series: Sequence[tuple[str, str, str]],
    span: tuple[float, float],
    say: Callable[[float | None], str],
    log_scale: bool = False,
) -> Panel:
    low, high = span
    ends = (log[0]["epoch"], log[-1]["epoch"]) if log else (1, 1)

    def across(epoch: float) -> float:
        return 50.0 if ends[0] == ends[1] else 100 * (epoch - ends[0]) / (ends[1] - ends[0])

    def down(value: float) -> float:
        if log_scale:
            return 100 * (1 - math.log(value / low) / math.log(high / low))
        return 100 * (1 - (value - low) / (high - low))

    drawn, missing = [], []
    for name, style, key in series:
        points = [(across(entry["epoch"]), down(entry[key])) for entry in log if entry[key] is not None]
        if points:
            last = next(entry[key] for entry in reversed(log) if entry[key] is not None)
            # A path of one point draws nothing; a step of length zero draws the round cap of the stroke.
            path = "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in points) + ("h0" if len(points) == 1 else "")
            drawn.append((points[-1][1], Line(name, style, path, say(last), 0.0)))
        else:
            missing.append(f"{name}: {NOT_RUN}")
    if log_scale:
        decades = range(round(math.log10(low)), round(math.log10(high)) + 1)
        y_values = [10.0**power for power in decades]
    else:
        y_values = round_steps(low, high, 4)
    x_values = [value for value in round_steps(ends[0], ends[1], 6) if value == int(value)] or [ends[0]]
    kept = kept_epoch(log)
    return Panel(
        title=title,
        lines=tuple(_spread(drawn)),
        missing=tuple(missing),
        x_ticks=tuple(Tick(across(value), f"{value:.0f}") for value in x_values),
        y_ticks=tuple(Tick(down(value), _tick_text(value, say)) for value in y_values),
        kept=None if kept is None else across(kept["epoch"]),
    )


def _spread(drawn: list[tuple[float, Line]]) -> list[Line]:
    """The lines with labels near their ends and apart from each other, in their given order."""
    order = sorted(range(len(drawn)), key=lambda index: drawn[index][0])
    places: dict[int, float] = {}
    lowest_free = -math.inf
    for index in order:
        places[index] = max(drawn[index][0], lowest_free)
        lowest_free = places[index] + _LABEL_GAP
    # What was pushed out at the bottom moves up as one, which keeps the order and the gaps.
    overflow = max(max(places.values(), default=0.0) - 100.0, 0.0)
    return [
        Line(line.name, line.style, line.path, line.value, places[index] - overflow)
        for index, (_, line) in enumerate(drawn)
    ]


def round_steps(low: float, high: float, about: int) -> list[float]:
    """Round values from low to high, about so many."""
    if high <= low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [round((first + index) * step, 12) for index in range(count)]


def _tick_text(value: float, say: Callable[[float | None], str]) -> str:
    return f"{100 * value:.3g}%" if say is percent else f"{value:.6g}"
