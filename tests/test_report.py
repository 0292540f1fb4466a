"""The page of a run: what it says, what it must not say, and that it stands alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from drawn import BALL, N, drawn, full_results, write_examples, write_log, write_run, write_samples
from swiftsure import report
from swiftsure.ball import Ball
from swiftsure.errors import InputError, SoundnessError
from swiftsure.report import _charts, _images, _page, _words
from swiftsure.report._run import read_run
from swiftsure.results import empty_results


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "digits_demo")


def test_page_stands_alone(run: Path, tmp_path: Path):
    for folders in ([run], [run, write_run(tmp_path / "other", "other")]):
        html, reader = drawn(folders, tmp_path / "page.html")
        assert all(address.startswith("data:image/png;base64,") for address in reader.addresses)
        assert "link" not in reader.tags
        assert not re.search(r"https?:|url\(|@import|fetch\(|//[a-z]", html)
        assert "default-src 'none'" in html
        assert len(html.encode()) < 2_000_000


def test_page_tells_every_figure(run: Path, tmp_path: Path):
    _, reader = drawn([run], tmp_path / "page.html")
    assert (
        "On 40 test images of digits: 95.0% right, 87.5% still right under every attack tried (fgsm, pgd), "
        "80.0% proven right for every image within eps 0.1 (L∞). 3 images remain in doubt: no attack "
        "broke them, and no proof was found. Each image costs 10.4 thousand multiply-adds and 0.12 ms."
        in reader.text
    )
    for said in (
        "digits_demo", "38 of 40", "35 of 40", "32 of 40", "suite quick", "92.5%", "interval", "symbolic",
        "0.0042 ms", "1 min 15 s", "2.13.0", "ab" * 32, "epoch kept", "model: {name: digits_small}",
        "swiftsure evaluate runs/digits_demo-again --limit 40 --eps 0.1", "certified",
        "becomes", "margin +2.50",
    ):  # fmt: skip
        assert said in reader.text, said
    assert reader.tags.count("img") == 2 * 12


def test_what_was_not_run_is_never_zero(tmp_path: Path):
    folder = tmp_path / "fresh"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(empty_results()))
    (folder / "log.jsonl").write_text("")
    for folders in ([folder], [folder, folder]):
        html, reader = drawn(folders, tmp_path / "page.html")
        assert reader.text.count("not run") > 5
        body = html[html.index("<body>") : html.index("<script>")]
        assert not re.search(r"\b0(\.0+)?( ?%| ms| s|<)", body)
        assert "None" not in reader.text
    assert "Nothing has been measured" in _words.verdict(empty_results(), None)


@pytest.mark.parametrize("missing", ["clean", "attacked", "verified"])
def test_a_missing_part_says_so(missing: str, tmp_path: Path):
    results = full_results(**{missing: None})
    _, reader = drawn([write_run(tmp_path / "part", results=results)], tmp_path / "page.html")
    said = {
        "clean": "clean accuracy was not run",
        "attacked": "attacks were not run",
        "verified": "nothing was certified",
    }
    assert said[missing] in reader.text
    assert "in doubt" not in reader.text or missing == "clean"


def test_names_are_only_ever_text(tmp_path: Path):
    evil = '<script>alert("x")</script>'
    classes = [f"{evil}{number}" for number in range(10)]
    results = full_results(
        attacked={"n": N, "ball": BALL, "suite": evil, "accuracy": {evil: 35 / N, "union": 35 / N}},
        versions={evil: evil},
        device=evil,
    )
    folder = write_run(tmp_path / "evil", name=evil, results=results, classes=classes)
    for folders in ([folder], [folder, folder]):
        html, reader = drawn(folders, tmp_path / "page.html")
        assert reader.tags.count("script") == 1
        assert "alert(" in reader.text
        assert evil not in html


def test_comparison_shows_each_run_and_warns_of_unlike_tests(run: Path, tmp_path: Path):
    other = write_run(tmp_path / "b", "wide_net")
    _, reader = drawn([run, other], tmp_path / "page.html")
    assert "All were measured on the same 40 test images of digits, within eps 0.1 (L∞)." in reader.text
    assert "digits_demo" in reader.text
    assert "wide_net" in reader.text
    ball = Ball("8/255").as_dict()
    unlike = full_results(
        attacked={"n": N, "ball": ball, "suite": "quick", "accuracy": {"pgd": 0.9, "union": 0.9}},
        verified={"n": N, "ball": ball, "accuracy": 0.8, "by": {"interval": 32}},
    )
    _, reader = drawn([run, write_run(tmp_path / "c", results=unlike)], tmp_path / "page.html")
    assert "Mind the columns" in reader.text
    assert "eps 8/255 (L∞)" in reader.text


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("results.json", None, "no results.json"),
        ("results.json", "{", "damaged"),
        ("results.json", '{"clean": 1}', "has no"),
        ("log.jsonl", None, "no log.jsonl"),
        ("log.jsonl", '{"epoch": 1}\n{"epoch": 2', "line 2: not a JSON object"),
        ("log.jsonl", "[1]\n", "line 1: not a JSON object"),
        ("log.jsonl", '{"epoch": 2}\n{"epoch": 2}\n', "line 2: epoch is 2"),
        ("log.jsonl", '{"epoch": 1, "loss": NaN}\n', "loss is nan"),
        ("log.jsonl", '{"epoch": 1, "eps": "0.1"}\n', "eps is '0.1'"),
        ("recipe.yaml", "a: [", "is not YAML"),
        ("recipe.yaml", "words", "holds no recipe"),
        ("config.json", "[]", "not the JSON object"),
        ("config.json", '{"classes_names": 3}', "classes_names is 3"),
        ("samples.csv", "index\n0\n", "no column 'label'"),
        ("samples.csv", "label,certified\n0,yes\n", "column 'certified'"),
        ("samples.csv", "label\n\n \n", "column 'label'"),
        ("examples.npz", "nothing", "examples.npz is not the archive"),
    ],
)
def test_damaged_files_are_refused_in_one_line(
    run: Path, tmp_path: Path, name: str, content: str | None, said: str
):
    (run / name).unlink()
    if content is not None:
        (run / name).write_text(content)
    out = tmp_path / "page.html"
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        report.page([run], out)
    assert "\n" not in str(caught.value)
    assert not out.exists()


def test_examples_of_other_shapes_or_with_objects_are_refused(run: Path, tmp_path: Path):
    arrays = dict(np.load(run / "examples.npz"))
    for change, said in (
        ({"x": arrays["x"][:3]}, "x has shape"),
        ({"x_adv": arrays["x_adv"][:, :, :4]}, "must agree"),
        ({"label": np.array([{}] * 12, dtype=object)}, "not the archive"),
    ):
        np.savez(run / "examples.npz", **{**arrays, **change})
        with pytest.raises(InputError, match=said):
            report.page([run], tmp_path / "page.html")
    np.savez(run / "examples.npz", **{name: array for name, array in arrays.items() if name != "margin"})
    with pytest.raises(InputError, match="lacks an array"):
        report.page([run], tmp_path / "page.html")


def test_no_run_and_no_folder_are_refused(run: Path, tmp_path: Path):
    with pytest.raises(InputError, match="at least one"):
        report.page([], tmp_path / "page.html")
    with pytest.raises(InputError, match="a list of"):
        report.page(str(run), tmp_path / "page.html")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no run directory"):
        report.page([tmp_path / "nowhere"], tmp_path / "page.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        report.page([run], tmp_path / "file" / "page.html")


def test_a_broken_certificate_draws_no_page(run: Path, tmp_path: Path):
    text = (run / "samples.csv").read_text()
    (run / "samples.csv").write_text(text.replace("\n20,0,0,1,0,0,1,1,", "\n20,0,0,1,1,1,1,1,"))
    with pytest.raises(SoundnessError, match="sample 20 is certified"):
        report.page([run], tmp_path / "page.html")
    write_samples(run)
    arrays = dict(np.load(run / "examples.npz"))
    np.savez(run / "examples.npz", **{**arrays, "attack_broke": np.ones(12, bool)})
    with pytest.raises(SoundnessError, match="sample 0 is certified"):
        report.page([run], tmp_path / "page.html")


def write_other_samples(run: Path, text: str) -> None:
    """In place of those of the run, whose results are then of as many."""
    (run / "samples.csv").write_text(text)
    found = json.loads((run / "results.json").read_text())
    for part in ("clean", "attacked", "verified"):
        found[part]["n"] = text.count("\n") - 1
    found["verified"]["by"] = {}
    (run / "results.json").write_text(json.dumps(found))


def test_a_cut_table_of_samples_is_refused(run: Path, tmp_path: Path) -> None:
    lines = (run / "samples.csv").read_text().splitlines(keepends=True)
    (run / "samples.csv").write_text("".join(lines[:-7]))
    with pytest.raises(InputError, match=r"samples.csv has 33 rows, results.json is of 40 samples"):
        report.page([run], tmp_path / "page.html")


def test_large_images_and_many_classes_stay_light(run: Path, tmp_path: Path):
    write_examples(run, shape=(3, 224, 224), count=40)
    rows = "".join(f"{index},{index % 1000},1\n" for index in range(2000))
    write_other_samples(run, "index,label,correct\n" + rows)
    write_log(run, epochs=1500)
    html, reader = drawn([run], tmp_path / "page.html")
    assert len(html.encode()) < 2_000_000
    assert reader.tags.count("img") >= 16
    assert "1000 classes" in reader.text


def test_examples_take_the_verdicts_in_turn(run: Path):
    cards = _images.examples(read_run(run), most=5)
    assert sorted(card.verdict for card in cards) == ["broken", "certified", "certified", "unproven", "wrong"]
    assert [card.verdict for card in cards] == sorted(
        (card.verdict for card in cards), key=list(_images.VERDICTS).index
    )


def test_a_sample_wrong_from_the_start_is_never_right_under_attack(run: Path):
    write_other_samples(run, "index,label,correct,attack:union\n0,3,0,0\n1,3,1,0\n2,4,1,1\n3,4,,\n")
    samples = read_run(run).samples
    assert samples is not None
    np.testing.assert_array_equal(samples.attacked, [0, 1, 0, np.nan])
    rows = _page._classes(read_run(run))
    assert [(row.name, row.clean, row.attacked, row.proven) for row in rows] == [
        ("3", 0.5, 0.5, None),
        ("4", None, None, None),
    ]


def test_one_epoch_and_the_last_choice():
    log = [
        {"epoch": 7, "chosen": True}
        | dict.fromkeys(("clean_accuracy", "robust_accuracy", "verified_accuracy"), 0.5)
    ]
    panel = _charts.accuracy_panel(log)
    assert panel.kept == 50.0
    assert all(line.path == "M50.00 100.00h0" for line in panel.lines)
    assert max(line.label_at for line in panel.lines) <= 100
    later = [{**log[0], "epoch": epoch, "chosen": epoch < 3} for epoch in (1, 2, 3)]
    assert _charts.accuracy_panel(later).kept == 50.0


def test_histogram_never_mixes_signs_in_a_bar():
    margin = np.array([-3.0, -0.01, 0.01, 2.0, 9.0, np.nan])
    drawn = _charts.histogram(margin, margin > 0)
    assert drawn is not None
    assert drawn.zero is not None
    for bar in drawn.bars:
        assert bar.proven == (bar.left >= drawn.zero - 1e-9)
    assert sum(int(bar.text.split()[0]) for bar in drawn.bars) == 5
    assert _charts.histogram(np.array([np.nan]), np.array([False])) is None


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "not run"),
        (0, "0%"),
        (1, "100%"),
        (0.972, "97.2%"),
        (0.9999, "99.99%"),
        (0.0001, "0.01%"),
        (0.9996, "99.96%"),
    ],
)
def test_percent_never_rounds_to_perfection(value: float | None, said: str):
    assert _words.percent(value) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "not run"),
        (950, "950"),
        (10432, "10.4 thousand"),
        (999_900, "1 million"),
        (2.38e6, "2.38 million"),
        (0.42, "0.42"),
    ],
)
def test_large_amounts(value: float | None, said: str):
    assert _words.large(value) == said


def test_radius_and_duration_as_people_write_them():
    assert [_words.radius(eps) for eps in (0.1, 0.3, 8 / 255, 1.785 / 255)] == [
        "0.1",
        "0.3",
        "8/255",
        "0.007",
    ]
    assert [_words.duration(seconds) for seconds in (8.44, 200, 7500, None)] == [
        "8.44 s",
        "3 min 20 s",
        "2 h 5 min",
        "not run",
    ]
