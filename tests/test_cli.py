"""The command line: help, suggestions, what it prints, and its exit codes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from small_run import command, write_recipe
from swiftsure import cli, commands, demo, recipe_file, results, run
from swiftsure.cli import COMMANDS, main


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """The one line with which an error of use ends."""
    assert main([str(word) for word in words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("swiftsure: ")
    return line


def test_overview_names_every_command_once_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, entry in COMMANDS.items():
        assert len(re.findall(rf"^  {name} ", text, re.MULTILINE)) == 1
        assert f"$ {entry.example}\n" in text
        assert callable(getattr(commands, name.replace(" ", "_")))
    assert main([]) == 0
    assert capsys.readouterr().out == text
    assert not re.search(r"export", text)
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_example_of_each_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*name.split(), "--help"]) == 0
    text = capsys.readouterr().out
    example = COMMANDS[name].example
    assert text.startswith(f"usage: swiftsure {name} ")
    assert text.endswith(f"{example}\n")
    # The example is one that its own parser takes.
    cli.parser(name).parse_args(example.removeprefix(f"swiftsure {name}").split())


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from swiftsure.cli import main; main(['train', '--help']); print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["atack", "x"], "unknown command 'atack'; did you mean 'attack'?"),
        (["data", "lst"], "did you mean 'list'?"),
        (["data"], "needs one of: list, path, fetch"),
        (["attack", "x", "--limt", "3"], "unknown option '--limt'; did you mean '--limit'?"),
        (["attack", "x", "--lim=3"], "did you mean '--limit'?"),
        (["attack"], "RUN is missing; see `swiftsure attack --help`"),
        (["attack", "x", "y"], "unexpected argument 'y'"),
        (["attack", "x", "--eps"], "--eps: a value is missing"),
        (["train", "x", "--resume=3"], "--resume: it takes no value"),
        (["attack", "x", "--limit", "0"], "allowed: an integer >= 1"),
        (["attack", "x", "--limit", "2.5"], "allowed: an integer >= 1"),
        (["report"], "RUN is missing"),
    ],
)
def test_misspelt_words(words: list[str], fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fault in refused(capsys, *words)


def test_main_as_a_program() -> None:
    done = subprocess.run(command("atack"), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "swiftsure: unknown command 'atack'; did you mean 'attack'?\n"
    done = subprocess.run(command("--version"), capture_output=True, text=True, check=True)
    assert re.fullmatch(r"swiftsure \d+\.\d+.*\n", done.stdout)


def test_from_recipe_to_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert main(["train", str(write_recipe(tmp_path)), "--set", "loss.k=2", "--out", str(folder)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert len(printed.out.splitlines()) == 1  # off a terminal training is silent until it ends
    assert printed.out.startswith("trained 3 epochs in ")
    assert len((folder / "log.jsonl").read_text().splitlines()) == 3
    assert str(folder) in printed.out.splitlines()[-1]
    assert recipe_file.read(folder / "recipe.yaml").loss.k == 2

    assert main(["evaluate", str(folder), "--limit", "20", "--eps", "2/255"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    found = results.read(folder)
    assert found["attacked"]["ball"]["eps"] == pytest.approx(2 / 255)
    assert "20 test images of digits" in printed.out
    for word, share in (
        ("clean", found["clean_accuracy"]),
        ("attacked", found["robust_accuracy"]["union"]),
        ("verified", found["verified_accuracy"]),
    ):
        assert re.search(rf"^{word} +{100 * share:.2f}%", printed.out, re.MULTILINE)
    assert str(folder / "report.html") in printed.out

    same = ["--limit", "20", "--eps", "2/255"]
    assert main(["attack", str(folder), *same, "--suite", "standard"]) == 0
    assert "apgd_t" in capsys.readouterr().out
    assert main(["certify", str(folder), *same, "--method", "symbolic"]) == 0
    assert "by symbolic" in capsys.readouterr().out
    assert main(["measure", str(folder)]) == 0
    assert "parameters" in capsys.readouterr().out
    assert main(["recheck", str(folder)]) == 0
    assert re.search(r"^\d+ of 20 samples are certified, and proven again", capsys.readouterr().out)
    assert main(["recheck", str(folder), "--limit", "3"]) == 0
    assert re.search(r"^\d of 3 samples are .*\n.*plain reference in float64: 3 ", capsys.readouterr().out)
    page = tmp_path / "pages" / "two.html"
    assert main(["report", str(folder), str(folder), "--out", str(page)]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    assert page.exists()
    assert main(["train", str(folder / "recipe.yaml"), "--out", str(folder), "--resume"]) == 0
    assert "is finished" in capsys.readouterr().out


def test_a_forged_certificate_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    main(["train", str(write_recipe(tmp_path)), "--out", str(folder)])
    main(["certify", str(folder), "--limit", "5"])
    capsys.readouterr()
    path = folder / "certificates.jsonl"
    path.write_text(path.read_text().replace('"margin": ', '"margin": 1', 1))
    assert "cannot be trusted" in refused(capsys, "recheck", folder)


def test_data_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "list", "--data", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} >= {"digits", "mnist", "cifar10", "folder"}
    assert "not found" in next(line for line in lines if line.startswith("mnist"))
    assert main(["data", "path", "digits"]) == 0
    assert Path(capsys.readouterr().out.strip()).is_dir()
    assert f"not found in {tmp_path}" in refused(capsys, "data", "path", "mnist", "--data", tmp_path)
    assert "allowed: digits, mnist" in refused(capsys, "data", "fetch", "minst")


def test_interruptions_end_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "train", interrupted)
    assert main(["train", "digits_mixtrain", "--out", "nowhere"]) == 130
    assert "nothing was written yet" in capsys.readouterr().err
    monkeypatch.setattr(commands, "data_list", interrupted)
    assert main(["data", "list"]) == 130
    assert capsys.readouterr().err == "swiftsure: interrupted; run the same command again\n"


# The demonstration


@pytest.fixture
def quick_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demonstration with two epochs and twenty images."""
    honest = recipe_file.read_packaged

    def shorter(name: str):
        short = honest(name)
        short.schedule.epochs, short.schedule.ramp, short.schedule.check_images = 2, 1, 10
        short.loss.k, short.evaluate.limit, short.evaluate.suite = 1, 20, "quick"
        return short

    monkeypatch.setattr(recipe_file, "read_packaged", shorter)


@pytest.mark.usefixtures("quick_demo")
def test_demo_replaces_only_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["demo"]) == 0
        printed = capsys.readouterr().out
        assert re.search(
            r"^clean .*^attacked .*^verified .*^page +runs/demo/report.html$", printed, re.M | re.S
        )
        assert Path("runs/demo/report.html").exists()
    (tmp_path / "runs/demo/notes.txt").write_text("mine")
    assert "something other than a demonstration" in refused(capsys, "demo")
    assert (tmp_path / "runs/demo/model.safetensors").exists()
    main(
        ["train", "digits_mixtrain", "--set", "schedule.epochs=1", "--set", "schedule.ramp=0", "--out", "own"]
    )
    capsys.readouterr()
    assert "something other than a demonstration" in refused(capsys, "demo", "--out", "own")
    assert Path("own/model.safetensors").exists()
    Path("file").write_text("")
    assert "choose a new folder" in refused(capsys, "demo", "--out", "file")


def test_demo_recipe_is_the_one_it_claims_to_be() -> None:
    shown = recipe_file.read_packaged(demo.RECIPE)
    assert (shown.data.name, shown.loss.bound, shown.loss.proven) == ("digits", "symbolic", True)
    assert shown.ball.build().radius == 0.1
    assert shown.loss.k is not None
    assert shown.loss.k < shown.schedule.batch


@pytest.mark.parametrize("name", recipe_file.packaged())
def test_every_packaged_recipe_reads_and_says_its_own_name(name: str) -> None:
    assert recipe_file.read_packaged(name).name == name
