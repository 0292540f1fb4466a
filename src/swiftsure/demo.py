"""The demonstration: a network of three exits for 8x8 digits, trained for a proof, attacked, certified and reported."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from swiftsure import evaluation, recipe_file, run
from swiftsure.errors import InputError
from swiftsure.evaluation import Measured

RECIPE = "digits_exits"
NAME = "demo"
"""What the runs of this command are called: only such a run is ever replaced."""


def demo(folder: str | Path = "runs/demo") -> tuple[run.Trained, Measured]:
    """Train the recipe of the demonstration, evaluate it and draw its page.

    Args:
        folder: a new or empty folder, or an earlier demonstration, which is replaced.

    Raises:
        InputError: the folder holds something else, or cannot be written.
        SoundnessError: an attack broke a certified sample.
    """
    folder = Path(folder)
    recipe = replace(recipe_file.read_packaged(RECIPE), name=NAME)
    if _is_demo(folder):
        shutil.rmtree(folder)
    elif folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(
            f"{folder} holds something other than a demonstration; choose a new folder with --out"
        )
    with _one_thread():
        done = run.train(recipe, folder, device="cpu")
        return done, evaluation.evaluate_run(folder, device="cpu")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Operations on 8x8 images are too small to share; beside other work, threads that wait cost minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _is_demo(folder: Path) -> bool:
    """Whether a folder was made by this command, whatever recipe an earlier version had, and holds nothing else."""
    if not (folder / run.RECIPE).is_file():
        return False
    others = {item.name for item in folder.iterdir()} - set(run.FILES)
    try:
        return run.read_recipe(folder).name == NAME and all(name.startswith(".") for name in others)
    except InputError:
        return False
