"""A training that is killed and resumed ends with the same bytes as one that is not."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from small_run import recipe, start, train, write_recipe
from swiftsure import files, run


class Killed(BaseException):
    """Not an Exception: nothing may catch it and carry on."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("unbroken") / "run")


def epochs_done(folder: Path) -> int:
    log = folder / "log.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def same_weights(first: Path, second: Path) -> bool:
    return (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_killed_with_sigkill_at_random_moments(tmp_path: Path) -> None:
    small = write_recipe(tmp_path)
    longer = ("--set", "schedule.epochs=8", "--set", "optimizer.decay=step", "--set", "loss.k=3")
    straight = start("train", small, *longer, "--out", tmp_path / "straight")
    broken = tmp_path / "broken"
    draw = random.Random(2718)
    kills = 0
    while kills < 3:
        before = epochs_done(broken)
        process = start("train", small, *longer, "--out", broken, "--resume")
        while process.poll() is None and epochs_done(broken) <= before:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.15))
        if process.poll() is not None:
            # An unlucky machine may have finished before the third kill.
            assert process.returncode == 0, process.communicate()
            break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        kills += 1
    assert kills >= 2
    assert epochs_done(broken) > 0
    last = start("train", small, *longer, "--out", broken, "--resume")
    assert (last.communicate()[1], last.returncode) == ("", 0)
    assert (straight.communicate()[1], straight.returncode) == ("", 0)
    assert same_weights(tmp_path / "straight", broken)
    assert not list(broken.glob("state*"))
    kept = [[line["chosen"] for line in run.read_log(folder)] for folder in (tmp_path / "straight", broken)]
    assert kept[0] == kept[1]


def test_killed_at_every_write(tmp_path: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at random moments but at all that matter: after each finished file and before the next."""
    honest = files.atomic
    for writes in range(100):
        folder = tmp_path / f"run{writes}"
        left = writes

        @contextlib.contextmanager
        def dying(path: Path) -> Iterator[Path]:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            with honest(path) as temporary:
                yield temporary

        monkeypatch.setattr(files, "atomic", dying)
        try:
            run.train(recipe(), folder, device="cpu")
        except Killed:
            pass
        else:
            break
        finally:
            monkeypatch.setattr(files, "atomic", honest)
        done = run.train(recipe(), folder, device="cpu", resume=True)
        assert same_weights(unbroken, folder), f"killed at write {writes}"
        assert len(done.history.records) == 3
    assert writes >= 8, "the training writes at least that often, so it was killed that often"


def test_a_temporary_file_of_a_kill_does_no_harm(tmp_path: Path, unbroken: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".recipe.yaml.abc").write_text("half of a rec")
    run.train(recipe(), folder, device="cpu", resume=True)
    assert same_weights(unbroken, folder)


def test_another_seed_gives_other_weights(tmp_path: Path, unbroken: Path) -> None:
    """Else the equalities above would say nothing."""
    assert not same_weights(unbroken, train(tmp_path / "run", "seed=1"))


def test_ctrl_c_says_how_to_resume(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start("train", write_recipe(tmp_path), "--set", "schedule.epochs=500", "--out", folder)
    while process.poll() is None and epochs_done(folder) < 1:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    (line,) = errors.splitlines()
    assert f"swiftsure train {folder}/recipe.yaml --out {folder} --resume" in line
