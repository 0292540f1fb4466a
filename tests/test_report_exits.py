"""Exits on the page: how images use them, and accuracy against cost as thresholds sweep."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from drawn import BALL, N, drawn, full_results, write_run
from swiftsure import report
from swiftsure.errors import InputError
from swiftsure.report import _exits

EXITS = {"clean": [0.5, 0.3, 0.2], "attacked": [0.2, 0.3, 0.5], "slowdown": [0.0, 0.1, 0.9]}


def sweep_of(points: list[tuple[float, float, float, float]], **change) -> dict:
    """sweep.json whose points have (macs, accuracy, attacked_macs, attacked_accuracy); the second is deployed."""
    names = ("macs", "accuracy", "attacked_macs", "attacked_accuracy")
    entries = [{"thresholds": [], **dict(zip(names, point, strict=True))} for point in points]
    several = len(points) > 1
    attacks = ["pgd40_exit1", "pgd40_exit2", "pgd40_main", "pgd40_average"] if several else ["pgd40"]
    shares = [0.25, 0.5, 0.25] if several else [1.0]
    return {
        "n": N,
        "attacked_n": 30,
        "ball": BALL,
        "attacks": attacks,
        "weights_sha256": "ab" * 32,
        "rule": "entropy",
        "deployed": {**entries[several], "exits": dict.fromkeys(["clean", *attacks], shares)},
        "points": entries,
        **change,
    }


CURVE = [(1e6, 0.8, 1e6, 0.5), (4e6, 0.9, 6e6, 0.65), (10e6, 0.95, 10e6, 0.7)]


def write_sweep(folder: Path, points=CURVE, **change) -> Path:
    (folder / "sweep.json").write_text(json.dumps(sweep_of(points, **change)))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "digits_demo")


def test_use_of_exits_under_each_attack(tmp_path: Path):
    results = full_results(exits={**EXITS, "certified": [0.1, 0.2, 0.7]})
    run = write_sweep(write_run(tmp_path / "run", results=results))
    html, reader = drawn([run], tmp_path / "page.html")
    rows = (
        "clean 50.0% 30.0% 20.0% pgd40_exit1 25.0% 50.0% 25.0% pgd40_exit2",
        "pgd40_average 25.0% 50.0% 25.0% the worst images of all attacks 20.0% 30.0% 50.0% "
        "images made to be slow 0% 10.0% 90.0% proven: at the latest 10.0% 20.0% 70.0%",
    )
    for said in rows:
        assert said in reader.text
    assert 'aria-label="images made to be slow: exit 1 0%, exit 2 10.0%, exit 3 90.0%"' in html
    # A share of nothing draws nothing; the others are as wide as they are large.
    bar = html[html.index('aria-label="images made to be slow') :].partition("</div>")[0]
    assert re.findall(r"flex:([0-9.]+);--mix:(\d+)%", bar) == [("0.10000", "50"), ("0.90000", "0")]
    plain = write_run(tmp_path / "plain", results=full_results(exits=EXITS))
    _, reader = drawn([plain], tmp_path / "page.html")
    assert "clean 50.0% 30.0% 20.0% the worst images" in reader.text
    assert "Accuracy and cost" not in reader.text


def test_curves_lie_where_their_figures_are(tmp_path: Path):
    curves = _exits.run_curves(sweep_of(CURVE))
    clean, attacked = curves.curves
    # From 50% to 95%, from no multiply-add to ten million.
    assert clean.path == "M10.00 33.33L40.00 11.11L100.00 0.00"
    assert attacked.path == "M10.00 100.00L60.00 66.67L100.00 55.56"
    assert (clean.dot, attacked.dot) == ("M40.00 11.11h0", "M60.00 66.67h0")
    assert clean.text == "90.0% at 4 million multiply-adds"
    assert [tick.text for tick in curves.x_ticks] == ["0", "2", "4", "6", "8", "10"]
    assert (curves.y_ticks[0].at, curves.y_ticks[0].text) == (100.0, "50%")
    assert curves.unit == "million multiply-adds an image"
    static = sweep_of([(8e6, 0.94, 8e6, 0.72)])
    for plot, y in zip(
        _exits.compared_curves([("a", sweep_of(CURVE)), ("b", static)]), (0.94, 0.72), strict=True
    ):
        several, one = plot.curves
        assert several.path.startswith("M10.00 ")
        assert one.path == ""
        x, down = one.dot[1:].removesuffix("h0").split()
        low, high = (float(plot.y_ticks[end].text.removesuffix("%")) / 100 for end in (0, -1))
        ends = [plot.y_ticks[end].at for end in (0, -1)]
        assert float(x) == 80
        assert float(down) == pytest.approx(
            ends[0] + (y - low) / (high - low) * (ends[1] - ends[0]), abs=0.01
        )
    flat = _exits.run_curves(sweep_of([(0, 1.0, 0, 1.0)]))
    assert all(
        0 <= float(number) <= 100
        for curve in flat.curves
        for number in re.findall(r"[0-9.]+\b", curve.dot[:-2])
    )


def test_a_comparison_draws_a_line_for_each_run(tmp_path: Path):
    several = write_sweep(write_run(tmp_path / "a", "early", full_results(exits=EXITS)))
    static = write_sweep(write_run(tmp_path / "b", "static"), [(8e6, 0.94, 8e6, 0.72)])
    html, reader = drawn([several, static], tmp_path / "page.html")
    assert (html.count('class="line run0"'), html.count('class="line run1"')) == (2, 0)
    assert (html.count('class="dot run0"'), html.count('class="dot run1"')) == (2, 2)
    assert "early static one exit" in reader.text
    assert "Attacked: the first 30 images" in reader.text
    assert reader.text.count("images made to be slow") == 1
    many = [several] + [
        write_sweep(write_run(tmp_path / str(i), str(i), full_results(exits=EXITS))) for i in range(6)
    ]
    assert 'class="line run0 dashed"' in drawn(many, tmp_path / "page.html")[0]
    # Nothing to sweep: nothing is drawn.
    html, _ = drawn([static, static], tmp_path / "page.html")
    assert 'class="dot' not in html


@pytest.mark.parametrize(
    "change",
    [
        {"points": []},
        {"points": [{"macs": 1}]},
        {"points": 3},
        {"deployed": None},
        {"attacks": 3},
        {"n": 3},
        {"points": [dict.fromkeys(("macs", "accuracy", "attacked_macs", "attacked_accuracy"), 1.5)]},
        {"points": [dict.fromkeys(("macs", "accuracy", "attacked_macs", "attacked_accuracy"), float("nan"))]},
    ],
)
def test_damaged_sweeps_are_refused_in_one_line(run: Path, tmp_path: Path, change):
    (run / "sweep.json").write_text(json.dumps({**sweep_of(CURVE), **change}))
    with pytest.raises(InputError, match=r"sweep.json is damaged; `swiftsure evaluate .*` writes it anew"):
        report.page([run], tmp_path / "page.html")
    write_sweep(run, weights_sha256="cd" * 32)
    with pytest.raises(InputError, match="is of other weights"):
        report.page([run], tmp_path / "page.html")
