"""How wide our bounds are against auto_LiRPA's where relaxations differ: smooth activations, clamps, max pooling.

    python benchmarks/compare_widths.py [--peer FOLDER] [--networks tanh pool-relu ...]

Small networks of random weights (scaled by 1.5, so that units bend), two smooth images. A cell holds the ratio of mean
widths of the logits' bounds, ours to theirs, and the share of logits on which ours are looser on some side.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import swiftsure as ss
from peers import METHODS, find
from swiftsure.bounds import output_bounds
from swiftsure.errors import InputError

RADII = (0.01, 0.05, 0.2)
TECHNIQUES = ("crown-ibp", "crown")
Make = Callable[[], nn.Module]


def plain(act: Make) -> nn.Module:
    """Two strided convolutions and two linear layers."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), act(), nn.Conv2d(8, 8, 3, 2, 1), act(),
        nn.Flatten(), nn.Linear(32, 16), act(), nn.Linear(16, 5),
    )  # fmt: skip


def pooled(act: Make, *, pool_first: bool) -> nn.Module:
    """The same with max pooling for strides, before or behind the activations."""
    layers: list[nn.Module] = []
    for channels in (3, 8):
        after = [nn.MaxPool2d(2), act()] if pool_first else [act(), nn.MaxPool2d(2)]
        layers += [nn.Conv2d(channels, 8, 3, padding=1), *after]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 16), act(), nn.Linear(16, 5))


NETWORKS: dict[str, Make] = {
    "relu": lambda: plain(nn.ReLU),
    "leaky-relu": lambda: plain(nn.LeakyReLU),
    "tanh": lambda: plain(nn.Tanh),
    "sigmoid": lambda: plain(nn.Sigmoid),
    "silu": lambda: plain(nn.SiLU),
    "pool-relu": lambda: pooled(nn.ReLU, pool_first=True),
    "relu-pool": lambda: pooled(nn.ReLU, pool_first=False),
    "pool-tanh": lambda: pooled(nn.Tanh, pool_first=True),
    "tanh-pool": lambda: pooled(nn.Tanh, pool_first=False),
}


def images() -> Tensor:
    """(2, 3, 8, 8), away from the ends of the pixel range."""
    coarse = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, size=8, mode="bilinear") * 0.5 + 0.25


def network(name: str) -> nn.Module:
    """By name, with the weights of seed 0."""
    torch.manual_seed(0)
    net = NETWORKS[name]().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)
    return net


def main() -> int:
    parser = argparse.ArgumentParser(description="Widths of our bounds against auto_LiRPA's.")
    parser.add_argument("--peer", type=Path, help="the folder that holds auto_LiRPA")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    options = parser.parse_args()
    try:
        package, words = find(options.peer)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if package is None:
        print(f"{words}; nothing to compare")
        return 0
    table = Table("network", *(f"{name} at {eps}" for name in TECHNIQUES for eps in RADII), title=words)
    x = images()
    for name in options.networks:
        net, cells = network(name), []
        peer = package.BoundedModule(net, x)
        for technique in TECHNIQUES:
            for eps in RADII:
                ball = ss.Ball(eps)
                lower, upper = ball.box(x)
                norm = package.PerturbationLpNorm(norm=float("inf"), x_L=lower, x_U=upper)
                with torch.no_grad():
                    low, high = peer.compute_bounds(
                        x=(package.BoundedTensor(x, norm),), method=METHODS[technique]
                    )
                    ours = output_bounds(net, x, ball, technique)
                assert isinstance(ours[0], Tensor) and isinstance(ours[1], Tensor)
                ratio = float((ours[1] - ours[0]).mean() / (high - low).mean())
                looser = ((ours[0] < low - 1e-5) | (ours[1] > high + 1e-5)).double().mean()
                cells.append(f"{ratio:.3f}, {float(looser):.0%}")
        table.add_row(name, *cells)
    Console(width=140).print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
