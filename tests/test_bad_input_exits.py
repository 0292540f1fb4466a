"""Exits that cannot be, as the command line says it: one line, code 2, and the run as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from small_run import train, write_recipe
from swiftsure.cli import main


class Branching(nn.Module):
    """A trunk that looks at its data where it is to be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.fc = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        if x.mean() > 0.5:
            x = x / 2
        return self.fc(torch.relu(self.body(x)).flatten(1))


class Clear(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.body(torch.relu(self.stem(x)))).flatten(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exits") / "run"
    return train(folder, "loss.proven=false", "schedule.epochs=1", "schedule.ramp=0", "exits.count=3")


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main([*words, "--device", "cpu"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nan,0.5", "exits.thresholds holds nan; allowed: finite entropies >= 0, in nats"),
        ("0.5,inf", "exits.thresholds holds inf"),
        ("-0.1,0.5", "exits.thresholds holds -0.1"),
        ("0.5", "1 thresholds for 3 exits; allowed: 2, one for each exit but the last"),
        ("0.5,0.5,0.5", "3 thresholds for 3 exits; allowed: 2"),
        ("low,high", "'low,high' is no list of numbers; allowed: such as 0.1,0.5"),
    ],
)
def test_thresholds_by_hand(given: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {item.name: item.read_bytes() for item in folder.iterdir()}
    assert said in refused(["calibrate", str(folder), f"--thresholds={given}"], capsys)
    assert {item.name: item.read_bytes() for item in folder.iterdir()} == before


@pytest.mark.parametrize("budget", ["nan", "-5", "1"])
def test_budgets(budget: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "macs is " in refused(["calibrate", str(folder), f"--macs={budget}"], capsys)


@pytest.mark.parametrize(
    ("setting", "model", "said"),
    [
        ("exits.thresholds=[.nan]", "Clear", "exits.thresholds holds nan; allowed: finite entropies"),
        ("exits.at={bdoy: linear}", "Clear", "exits: Clear: unknown module 'bdoy'; did you mean 'body'?"),
        ("exits.at={stem: lineer}", "Clear", "exits: unknown head 'lineer'; did you mean 'linear'?"),
        (
            "exits.count=2",
            "Branching",
            "exits: the backbone Branching cannot be traced by torch.fx at line ",
        ),
        ("exits.at={stem: linear}", "Branching", "test_bad_input_exits.py, `if x.mean() > 0.5:`"),
    ],
)
def test_exits_of_a_recipe(
    setting: str,
    model: str,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    out = tmp_path / "run"
    words = ["train", str(write_recipe(tmp_path)), "--set", setting, "--out", str(out)]
    assert said in refused([*words, "--model", f"test_bad_input_exits:{model}"], capsys)
    assert not out.exists()
