"""From run directories to one HTML file."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray

from swiftsure import files
from swiftsure.errors import InputError
from swiftsure.report import _charts, _exits, _words
from swiftsure.report._images import VERDICTS, examples
from swiftsure.report._run import Run, read_run

_MACS = {
    "static": "the whole network",
    "clean": "clean images, mean",
    "clean_p95": "clean images, 95th percentile",
    "attacked": "attacked images, mean",
    "slowdown": "images made to be slow, mean",
    "certified_max": "proven worst case, mean",
    "paper": "RDI-Nets’ own count, in 2²⁰",
}
_LATENCY = {
    "static_b1": "whole network, one image at a time",
    "adaptive_b1": "early exits, one image at a time",
    "static_b256": "whole network, 256 at a time",
    "adaptive_b256": "early exits, 256 at a time",
}
_MOST_EPOCH_ROWS = 400


@dataclass(frozen=True)
class Share:
    """A segment of the bar of all samples: a key of VERDICTS, its words, its share and its count."""

    verdict: str
    text: str
    share: float
    count: int


@dataclass(frozen=True)
class ClassRow:
    """The figures of one class: fractions of its n samples, None where not run."""

    name: str
    n: int
    clean: float | None
    attacked: float | None
    proven: float | None


def page(run_folders: Sequence[str | Path], out: str | Path) -> Path:
    """Write one self-contained HTML page of one run, or a comparison of several.

    Args:
        run_folders: run directories with results.json and log.jsonl; recipe.yaml, config.json, samples.csv
            and examples.npz are shown where they exist.
        out: the file to write, atomically; folders on its way are made.

    Returns:
        `out` as a Path.

    Raises:
        InputError: no run, a missing or damaged file, or `out` cannot be written.
        SoundnessError: a certified sample is broken by an attack.
    """
    if isinstance(run_folders, str | Path) or not run_folders:
        raise InputError(f"run_folders is {run_folders!r}; allowed: a list of at least one run directory")
    runs = [read_run(folder) for folder in run_folders]
    if len(runs) == 1:
        html = _template("run.html.j2").render(title=runs[0].name, **_single(runs[0]))
    else:
        html = _template("comparison.html.j2").render(title="Runs compared", **_comparison(runs))
    out = Path(out)
    files.write_text(out, html)
    return out


def _template(name: str) -> Any:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": _words.percent,
        "large": _words.large,
        "milliseconds": _words.milliseconds,
        "duration": _words.duration,
        "number": _words.number,
    }
    environment.globals |= {"of_n": _words.of_n, "scaled": _words.scaled, "NOT_RUN": _words.NOT_RUN}
    return environment.get_template(name)


def _single(run: Run) -> dict[str, Any]:
    results = run.results
    head = _words.headline(results)
    attacks = dict(results["robust_accuracy"] or {})
    stride = -(-len(run.log) // _MOST_EPOCH_ROWS) or 1
    several = results["exits"]["clean"] or []
    union = attacks.pop("union", None)
    forced = results["macs"].get("by_attack")
    return {
        "run": run,
        "head": head,
        "verdict": _words.verdict(results, _data_name(run)),
        "facts": _facts(run, head),
        "shares": _shares(head),
        "accuracy_panel": _charts.accuracy_panel(run.log),
        "kept_words": _charts.kept_words(run.log),
        "small_panels": [
            _charts.small_panel(run.log, "weight", "Weight of the proven term"),
            _charts.small_panel(run.log, "eps", "eps in training"),
            _charts.small_panel(run.log, "loss", "Loss"),
        ],
        "log": run.log[::stride],
        "stride": stride,
        "kept": _charts.kept_epoch(run.log),
        "attacks": sorted(attacks.items(), key=lambda item: -item[1]),
        "union": union,
        "guards": (results["attacked"] or {}).get("guards"),
        "rounded": (results["attacked"] or {}).get("accuracy_8bit"),
        "last": (results["attacked"] or {}).get("accuracy_last"),
        "seconds": results["seconds"].get("by_attack"),
        "forced": forced,
        "slowdowns": [name for name in forced or {} if name not in attacks],
        "margins": _margins(run),
        "classes": _classes(run),
        "cards": examples(run),
        "verdicts": VERDICTS,
        "macs": [(text, results["macs"][key]) for key, text in _MACS.items()],
        "latency": [(text, results["latency_ms"][key]) for key, text in _LATENCY.items()],
        "uses": _exits.uses(results["exits"], run.sweep) if several else [],
        "mixes": _exits.mixes(len(several)),
        "curves": _exits.run_curves(run.sweep) if several and run.sweep else None,
        "curve_words": _exits.words([run.sweep]) if several and run.sweep else "",
        "commands": _commands([run]),
    }


def _comparison(runs: Sequence[Run]) -> dict[str, Any]:
    heads = [_words.headline(run.results) for run in runs]
    used = [run for run in runs if run.results["exits"]["clean"]]
    mixes = [_exits.mixes(len(run.results["exits"]["clean"])) for run in used]
    swept = [(run.name, run.sweep) for run in runs if run.sweep]
    return {
        "used": [(run, _exits.uses(run.results["exits"]), mix) for run, mix in zip(used, mixes, strict=True)],
        "legends": [mix for place, mix in enumerate(mixes) if mix not in mixes[:place]],
        "curves": _exits.compared_curves(swept) if used and swept else [],
        "curve_words": _exits.words([sweep for _, sweep in swept]) if used and swept else "",
        "rows": [{"run": run, "head": head} for run, head in zip(runs, heads, strict=True)],
        "introduction": _words.introduction(list(zip(map(_data_name, runs), heads, strict=True))),
        "ball_name": _words.ball_name,
        "commands": _commands(runs),
    }


def _data_name(run: Run) -> str | None:
    """The data set's name in the recipe, which may hold it bare or under `name`."""
    data = run.recipe.get("data")
    name = data.get("name") if isinstance(data, dict) else data
    return str(name) if name else None


def _model_name(run: Run) -> str | None:
    model = run.recipe.get("model") or run.config.get("model")
    name = model.get("name") if isinstance(model, dict) else model
    return str(name) if name else None


def _facts(run: Run, head: dict[str, Any]) -> list[tuple[str, str]]:
    results = run.results
    facts = [
        ("model", _model_name(run)),
        ("data", _data_name(run)),
        ("ball", _words.ball_name(head["ball"]) if head["ball"] else None),
        ("seed", None if results["seed"] is None else str(results["seed"])),
        ("device", results["device"]),
        (
            "trained in",
            None if results["seconds"]["train"] is None else _words.duration(results["seconds"]["train"]),
        ),
    ]
    return [(name, value) for name, value in facts if value]


def _shares(head: dict[str, Any]) -> list[Share]:
    """All samples split by what is known of them; empty unless all three figures were run."""
    n = head["n"]
    if None in (head["clean"], head["attacked"], head["proven"]):
        return []
    right, held, proven = (round(head[name] * n) for name in ("clean", "attacked", "proven"))
    # An attack may set a wrong answer right; such samples count as broken by none and stay wrong.
    held = min(held, right)
    counts = {"certified": proven, "unproven": held - proven, "broken": right - held, "wrong": n - right}
    return [Share(name, VERDICTS[name], count / n, count) for name, count in counts.items()]


def _margins(run: Run) -> _charts.Histogram | None:
    samples = run.samples
    if samples is None or samples.margin is None:
        return None
    proven = np.zeros(len(samples.label)) if samples.certified is None else samples.certified
    return _charts.histogram(samples.margin, proven == 1)


def _classes(run: Run) -> list[ClassRow]:
    samples = run.samples
    if samples is None:
        return []
    rows = []
    for label in np.unique(samples.label):
        mine = samples.label == label
        rows.append(
            ClassRow(
                name=run.class_name(int(label)),
                n=int(mine.sum()),
                clean=_mean(samples.correct, mine),
                attacked=_mean(samples.attacked, mine),
                proven=_mean(samples.certified, mine),
            )
        )
    return rows


def _mean(column: NDArray[np.float64] | None, mine: NDArray[np.bool_]) -> float | None:
    """The mean over `mine`, or None if any of them was not run: a part is not the class."""
    if column is None or not np.isfinite(column[mine]).all():
        return None
    return float(column[mine].mean())


def _commands(runs: Sequence[Run]) -> list[str]:
    """Shell lines that measure the runs again and draw this page; a single run is trained again too."""
    lines, folders = [], []
    for run in runs:
        head = _words.headline(run.results)
        folder = f"runs/{run.folder.resolve().name}"
        if len(runs) == 1 and run.recipe_text:
            again = f"{folder}-again"
            lines.append(f"swiftsure train {shlex.quote(f'{folder}/recipe.yaml')} --out {shlex.quote(again)}")
            folder = again
        options = f" --limit {head['n']}" if head["n"] else ""
        options += f" --eps {_words.radius(head['ball']['eps'])}" if head["ball"] else ""
        lines.append(f"swiftsure evaluate {shlex.quote(folder)}{options}")
        folders.append(shlex.quote(folder))
    return [*lines, f"swiftsure report {' '.join(folders)} --out report.html"]
