"""A recipe that trains in a second, for tests of what surrounds the training."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from swiftsure import recipe_file, run
from swiftsure.recipe import Recipe

TEXT = """
name: small
data: {name: digits}
model: {name: digits_small}
ball: {eps: 0.02}
loss: {k: 1, mixing: {controller: geometric, gate: 0.8}}
schedule: {epochs: 3, batch: 150, ramp: 1, check_images: 10, check_steps: 1}
evaluate: {limit: 60, guards: 0}
"""


def recipe(*overrides: str) -> Recipe:
    return recipe_file.parse(TEXT, "small", overrides)


def write_recipe(folder: Path) -> Path:
    path = folder / "small.yaml"
    path.write_text(TEXT)
    return path


def train(folder: Path, *overrides: str) -> Path:
    return run.train(recipe(*overrides), folder, device="cpu").folder


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "swiftsure.cli", *map(str, words)]


def start(*words: str | Path) -> subprocess.Popen[str]:
    """The command line as a process of its own, on one thread."""
    return subprocess.Popen(
        command(*words),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell ignores interrupts for what it runs in the background, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
