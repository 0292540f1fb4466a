"""Two ways to bound a sample again: by plain reference code, and by `swiftsure.bounds` in float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from swiftsure.attacks.objectives import as_exits
from swiftsure.ball import Ball
from swiftsure.bounds import Region, difference_bounds, technique, trace
from swiftsure.certificates._plain_bounds import Box, PlainBounds, Slopes
from swiftsure.certificates._plain_network import Array, PlainNetwork
from swiftsure.certificates._precision import certifying
from swiftsure.certificates._proof import SampleSlopes
from swiftsure.exits import exit_macs

LEVELS = 255
"""Slopes are kept in units of 1 / 255."""


class SampleBounds(Protocol):
    """Bounds over the ball around one image."""

    @property
    def logits(self) -> Sequence[Array]:
        """Of every exit at the image itself, (classes,) each."""

    def differences(self, technique: str, y: int, slopes: SampleSlopes | None) -> list[Box]:
        """Bounds of z_j - z_y at every exit; slopes are alpha-crown's, where some are kept."""


class Prover(Protocol):
    """A network that can be bounded, one image at a time."""

    @property
    def macs(self) -> Sequence[int]:
        """What an image costs that leaves at each exit."""

    @property
    def reads_slopes(self) -> bool:
        """Whether alpha-crown takes the slopes that were kept; else it climbs again."""

    def sample(self, image: Tensor, ball: Ball) -> SampleBounds:
        """For one image (channels, height, width)."""


class PlainProver:
    """The reference: `_plain_bounds` on the matrices of `_plain_network`."""

    reads_slopes = True

    def __init__(self, network: PlainNetwork) -> None:
        self.network, self.macs = network, network.macs

    def sample(self, image: Tensor, ball: Ball) -> SampleBounds:
        """For one image (channels, height, width)."""
        return _PlainSample(self.network, image.cpu().double().flatten().numpy(), ball)


class _PlainSample:
    def __init__(self, network: PlainNetwork, image: Array, ball: Ball) -> None:
        self.logits = network.values(image)
        self._bounds = PlainBounds(network, image, ball)

    def differences(self, technique: str, y: int, slopes: SampleSlopes | None) -> list[Box]:
        """Bounds of z_j - z_y at every exit."""
        given: Slopes = {
            (exit, int(j), above): (one.unit.numpy(), row.numpy() / LEVELS)
            for (exit, above), one in (slopes or {}).items()
            for j, row in zip(one.function, one.levels, strict=True)
        }
        return self._bounds.differences(technique, y, given)


class DoubleProver:
    """The bounds that certificates are made with, on a float64 copy of the network where it lies."""

    reads_slopes = False

    def __init__(self, net: nn.Module, shape: Sequence[int]) -> None:
        self.net = copy.deepcopy(net).double().eval()
        self.macs = exit_macs(net, shape)

    def sample(self, image: Tensor, ball: Ball) -> SampleBounds:
        """For one image (channels, height, width)."""
        weights = next(self.net.parameters(), torch.empty(0))
        return _DoubleSample(self.net, image[None].to(weights.device).double(), ball)


class _DoubleSample:
    def __init__(self, net: nn.Module, x: Tensor, ball: Ball) -> None:
        self.net, self.x, self.region = net, x, Region(x, ball)
        with certifying(net):
            self.logits = [z[0].cpu().numpy() for z in as_exits(net(x))]

    def differences(self, name: str, y: int, slopes: SampleSlopes | None) -> list[Box]:
        """Bounds of z_j - z_y at every exit; what overflowed bounds nothing."""
        boxes = []
        with certifying(self.net):
            graph = trace(self.net, self.x)
            about = torch.tensor([y], device=self.x.device)
            both = len(graph.outputs) > 1
            for lower, upper in difference_bounds(technique(name), graph, self.region, about, upper=both):
                low, high = -upper[0].cpu().numpy(), -lower[0].cpu().numpy()
                boxes.append(
                    (np.where(np.isfinite(low), low, -np.inf), np.where(np.isfinite(high), high, np.inf))
                )
        return boxes
