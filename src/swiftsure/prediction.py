"""What a trained run says of image files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from swiftsure import models, run
from swiftsure.certificates import Certificate, certify, certifying
from swiftsure.data.decoding import decode, inspect
from swiftsure.exits import Answer


@dataclass(frozen=True)
class Predicted:
    """One image.

    Attributes:
        path: the file.
        label: the class, from 0.
        name: of the class.
        probability: softmax probability of the class at the exit that answered.
        exit: which one that was, from 0.
        exits: how many there are.
        macs: what it cost.
        certified: whether every image of the ball gets this label; None where no ball was asked for.
        margin: the smallest lower bound of z_label - z_j.
    """

    path: str
    label: int
    name: str
    probability: float
    exit: int
    exits: int
    macs: int
    certified: bool | None = None
    margin: float | None = None


def predict(
    folder: str | Path,
    paths: Sequence[str | Path],
    *,
    eps: float | str | None = None,
    method: str | None = None,
    device: str = "auto",
    model: str | None = None,
) -> list[Predicted]:
    """The answers of a run's network, as it is deployed, to image files.

    Args:
        folder: a run directory whose training is finished.
        paths: image files of the size the network takes; grey or colour is converted.
        eps: also certify each answer within this radius, in the norm of the run's ball.
        method: a technique of `swiftsure.bounds`, or "auto"; None: the recipe's.
        device: "auto" or a torch device.
        model: "package.module:function" for an architecture that no name is registered for.

    Raises:
        InputError: files that are no images or of another size, several exits without thresholds or with eps, or
            unusable options or files.
    """
    folder, names = Path(folder), [str(path) for path in paths]
    recipe = run.read_recipe(folder)
    ball = None if eps is None else recipe.ball.build().with_eps(eps)
    net = run.read_network(folder, run.pick_device(device), model)
    config = models.read_config(folder)
    channels, height, width = _shape(config, names[0])
    pixels = torch.from_numpy(decode(names, (height, width), channels, "read"))
    weights = next(net.parameters())
    x = pixels.to(weights.device).to(weights.dtype).div_(255)
    with certifying(net):
        answer: Answer = net.adaptive(x)  # type: ignore[operator]
    proven: Certificate | None = None
    if ball is not None:
        proven = certify(net, x, None, ball, method=method or recipe.evaluate.method)
    classes = config.get("classes_names") or []
    sure = answer.logits.double().softmax(1).amax(1)
    exits = getattr(net, "exits", 1)
    return [
        Predicted(
            path=name,
            label=int(label := answer.label[place]),
            name=str(classes[label]) if label < len(classes) else str(int(label)),
            probability=float(sure[place]),
            exit=int(answer.exit[place]),
            exits=int(exits),
            macs=int(answer.macs[place]),
            certified=None if proven is None else bool(proven.certified[place]),
            margin=None if proven is None else float(proven.margin[place]),
        )
        for place, name in enumerate(names)
    ]


def _shape(config: dict[str, Any], first: str) -> tuple[int, int, int]:
    """(C, H, W) that the network takes; where config.json does not say, that of the first file."""
    described = config.get("model")
    if isinstance(described, dict) and "input_shape" in described:
        channels, height, width = described["input_shape"]
        return channels, height, width
    (height, width), channels = inspect(first)
    return channels, height, width
