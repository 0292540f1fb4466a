"""What bounds are measured on: networks with their weights, and images of their size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swiftsure as ss
from swiftsure.errors import InputError

NETWORKS = ("mnist_small", "mnist_large", "cifar_resnet", "cnn7")
EPS = {1: "0.1", 3: "2/255"}
"""By the number of colours, where nothing else says."""
STATISTICS_BATCH = 128


@dataclass(frozen=True)
class Subject:
    """A network in evaluation mode, where its weights come from, and the ball it is bounded over."""

    name: str
    weights: str
    net: nn.Module
    ball: ss.Ball
    images: ss.data.ImageSet

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """The first images and labels, over again where there are not so many."""
        return self.images.batch(torch.arange(size) % len(self.images))


def untrained(name: str, data: str, eps: str | None, seed: int) -> Subject:
    """A registered network as it is drawn; batch norm has the statistics of a batch, as at a first training step."""
    torch.manual_seed(seed)
    net = ss.models.build(name)
    shape = net.config["input_shape"]  # type: ignore[index]
    images = load_images(data, tuple(shape))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = None  # a plain mean over the batches seen: here one
    with torch.no_grad():
        net.train()(images.batch(slice(0, STATISTICS_BATCH))[0])
    return Subject(name, "random", net.eval(), ss.Ball(eps or EPS[shape[0]]), images)  # type: ignore[index]


def trained(run: Path, data: str, eps: str | None) -> Subject:
    """The network of a run, at the run's own eps."""
    net, config = ss.load(run), ss.models.read_config(run)
    own = (config.get("ball") or {}).get("eps", EPS[config["model"]["input_shape"][0]])
    images = load_images(data, tuple(config["model"]["input_shape"]))
    return Subject(config["model"]["name"], run.name, net, ss.Ball(eps or own), images)


def load_images(data: str, shape: tuple[int, int, int]) -> ss.data.ImageSet:
    """The test images of a data set, brought to (C, H, W): enlarged by a whole factor, edged with black, grey to RGB.

    Raises:
        InputError: the set is missing, or its images are larger.
    """
    test = ss.data.load(data).test
    channels, height, width = test.shape
    if channels not in (1, shape[0]) or height > shape[1] or width > shape[2]:
        raise InputError(
            f"images of {data} are {test.shape}, the network takes {shape}; choose another --data"
        )
    factor = min(shape[1] // height, shape[2] // width)
    images = test.images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    rows, columns = shape[1] - factor * height, shape[2] - factor * width
    edges = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    images = F.pad(images, edges).expand(-1, shape[0], -1, -1).contiguous()
    return ss.data.ImageSet(test.name, images, test.labels, test.classes)
