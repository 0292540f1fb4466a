"""What a measurement is about: a trained run, images and ball, and how its network answers as it is deployed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swiftsure import data, models, results, run
from swiftsure.attacks.objectives import Judge, misclassified
from swiftsure.ball import Ball
from swiftsure.certificates import certifying
from swiftsure.errors import InputError
from swiftsure.exits import Answer, MultiExit
from swiftsure.recipe import Recipe

BATCH = 500
"""Images that are float on the device at once."""


@dataclass(frozen=True)
class Subject:
    """A trained network, the images and the ball that it is measured on, and what is known of it already."""

    folder: Path
    recipe: Recipe
    net: nn.Module
    images: data.ImageSet
    held_out: data.ImageSet
    """Those that thresholds are fitted to."""
    ball: Ball
    device: torch.device
    results: dict[str, Any]

    @property
    def n(self) -> int:
        """How many samples are measured."""
        return len(self.images)

    @property
    def exits(self) -> int:
        """How many exits the network has."""
        return self.net.exits if isinstance(self.net, MultiExit) else 1

    @property
    def judge(self) -> Judge:
        """What counts as broken: a wrong answer of the network as it is deployed, exits and thresholds included.

        Raises:
            InputError: several exits, and no thresholds.
        """
        if not isinstance(self.net, MultiExit) or self.net.exits == 1:
            return misclassified
        if self.net.policy is None:
            raise InputError(
                f"the network has {self.exits} exits and no thresholds; `swiftsure calibrate {self.folder}` fits them"
            )
        return self.net.policy.misclassified

    def answers(self, instead: Tensor | None = None) -> Answer:
        """What the deployed network says of every sample, or of other images (n, C, H, W) in their place; on the CPU.

        Raises:
            InputError: several exits, and no thresholds.
        """
        parts: list[Answer] = []
        deployed: Any = self.net
        with certifying(self.net):
            for start in range(0, self.n, BATCH):
                part = slice(start, start + BATCH)
                x = (
                    self.images.batch(part, self.device)[0]
                    if instead is None
                    else instead[part].to(self.device)
                )
                parts.append(deployed.adaptive(x))
        columns = ("label", "exit", "macs", "logits")
        return Answer(**{name: torch.cat([getattr(part, name) for part in parts]).cpu() for name in columns})


def open_subject(
    folder: str | Path,
    *,
    limit: int | None = None,
    eps: float | str | None = None,
    device: str = "auto",
    model: str | None = None,
    data_root: str | Path | None = None,
) -> Subject:
    """All that a measurement needs, checked.

    Args:
        folder: a run directory whose training is finished.
        limit: the first so many test images; None: the recipe's, else all.
        eps: another radius than the recipe's.
        device: "auto" or a torch device.
        model: "package.module:function" for an architecture that no name is registered for.
        data_root: where the data sets lie.

    Raises:
        InputError: what is missing, damaged, of another network or of other data.
    """
    folder = Path(folder)
    recipe = run.read_recipe(folder)
    ball = recipe.ball.build()
    if eps is not None:
        ball = ball.with_eps(eps)
    where = run.pick_device(device)
    limit = recipe.evaluate.limit if limit is None else limit
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise InputError(f"limit is {limit!r}; allowed: an integer >= 1, or None for all test images")
    net = run.read_network(folder, where, model)
    config = models.read_config(folder)
    known = results.read(folder) if (folder / results.NAME).exists() else results.empty_results()
    if known["weights_sha256"] not in (None, config["weights_sha256"]):
        raise InputError(
            f"{folder / results.NAME} was measured on other weights; remove it to begin a new one"
        )
    parts = data.load(recipe.data.name, data_root, recipe.seed)
    test = parts.test
    stated = (config.get("data") or {}).get("test_sha256")
    if stated not in (None, test.sha256()):
        raise InputError(
            f"the test images of {recipe.data.name} found here are not those of the run; name its data with --data"
        )
    images = test.select(slice(0, limit)) if limit is not None else test
    return Subject(folder, recipe, net, images, parts.calibration, ball, where, known)
