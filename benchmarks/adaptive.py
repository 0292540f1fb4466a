"""What leaving early costs beside the stages themselves: `net.adaptive` against the ideal, on RDI-Nets' networks.

    python benchmarks/adaptive.py [--networks rdi_smallcnn rdi_resnet38] [--runs runs/mine ...] [--rounds 15]
        [--threads 1] [--cpu-time] [--device cpu]

The ideal is the share of images that run each stage, times that stage's own time with its head, measured in passes that
run all stages on the same batches. What comes on top is the policy, picking out those who stay, and smaller batches.
Goals: 1.2 at batch 1, 1.1 at batch 256. Beside it, as measured, the time and the multiply-adds saved against the static
network, which is the trunk with its last exit alone.

Networks are as they are drawn, with batch norm settled, and thresholds by which equally many of the images leave at
each exit; runs have their own weights and thresholds. --cpu-time counts this process's own seconds instead of the
clock's: on one thread other programs then disturb little.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from subjects import Subject, trained, untrained
from swiftsure.exits import MultiExit, all_logits, equal_share
from swiftsure.exits.counting import as_state

GOALS = {1: 1.2, 256: 1.1}
IMAGES = {1: 64, 256: 512}
Clock = Callable[[], float]


@dataclass(frozen=True)
class Round:
    """Seconds for all images: the adaptive pass, each stage with its head, and the trunk with the last head."""

    adaptive: float
    stages: tuple[float, ...]
    static: float


@dataclass(frozen=True)
class Figures:
    """Milliseconds an image, and what is saved against the static network as a share of it."""

    adaptive: float
    ideal: float
    ratio: float
    time_saved: float
    macs_saved: float


def measure(net: MultiExit, x: Tensor, batch: int, rounds: int, clock: Clock) -> Figures:
    """The least seconds of all rounds, in which other programs disturbed least; the three ways are timed in turn.

    Args:
        net: in evaluation mode, with a policy.
        x: images (n, C, H, W) on its device, n a multiple of the batch.
        batch: images at a time.
        rounds: how many are timed.
        clock: seconds, once the device has done what it was given.
    """
    parts = x.split(batch)
    exit = torch.cat([net.adaptive(part).exit for part in parts])
    reached = [(exit >= number).double().mean().item() for number in range(net.exits)]
    found = [_round(net, parts, clock) for _ in range(rounds + 1)][1:]
    adaptive, static = min(one.adaptive for one in found), min(one.static for one in found)
    stages = [min(one.stages[number] for one in found) for number in range(net.exits)]
    ideal = sum(share * seconds for share, seconds in zip(reached, stages, strict=True))
    costs = torch.tensor(net.macs(x.shape[1:]), dtype=torch.float64)
    counts = net.counts(x.shape[1:])
    trunk = sum(stage.total for stage, _ in counts) + counts[-1][1].total
    return Figures(
        1000 * adaptive / len(x),
        1000 * ideal / len(x),
        adaptive / ideal,
        1 - adaptive / static,
        1 - costs[exit.cpu()].mean().item() / trunk,
    )


def _round(net: MultiExit, parts: tuple[Tensor, ...], clock: Clock) -> Round:
    begin = clock()
    for part in parts:
        net.adaptive(part)
    adaptive = clock() - begin
    stages = [0.0] * net.exits
    with torch.no_grad():
        for part in parts:
            state: tuple[Tensor, ...] = (part,)
            for number, (stage, head) in enumerate(zip(net.stages, net.heads, strict=True)):
                begin = clock()
                state = as_state(stage(*state))
                head(state[0])
                stages[number] += clock() - begin
        begin = clock()
        for part in parts:
            state = (part,)
            for stage in net.stages:
                state = as_state(stage(*state))
            net.heads[-1](state[0])
        return Round(adaptive, tuple(stages), clock() - begin)


def _clock(cpu_time: bool, device: str) -> Clock:
    tick = time.process_time if cpu_time else time.perf_counter

    def clock() -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return tick()

    return clock


def main() -> int:
    """Print a table; 1 where a goal was missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="*", default=["rdi_smallcnn", "rdi_resnet38"])
    parser.add_argument("--runs", nargs="*", type=Path, default=[])
    parser.add_argument("--batches", nargs="+", type=int, default=list(GOALS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--data", default="digits", help="whose test images are used (default: digits, enlarged)"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = Table(title=f"{options.device}, {options.threads} threads, {options.rounds} rounds")
    for name in (
        "network",
        "batch",
        "adaptive, ms an image",
        "ideal",
        "ratio",
        "goal",
        "time saved",
        "MACs saved",
    ):
        table.add_column(name, justify="left" if name == "network" else "right")
    missed = False
    for subject in [
        *(untrained(name, options.data, None, 0) for name in options.networks),
        *(trained(run, options.data, None) for run in options.runs),
    ]:
        for batch in options.batches:
            net, x = _ready(subject, IMAGES.get(batch, 2 * batch), options.device)
            found = measure(net, x, batch, options.rounds, _clock(options.cpu_time, options.device))
            goal = GOALS.get(batch)
            missed |= goal is not None and found.ratio > goal
            table.add_row(
                *(
                    subject.name,
                    str(batch),
                    f"{found.adaptive:.3f}",
                    f"{found.ideal:.3f}",
                    f"{found.ratio:.2f}",
                ),
                *("" if goal is None else str(goal), f"{found.time_saved:.0%}", f"{found.macs_saved:.0%}"),
            )
    Console().print(table)
    return int(missed)


def _ready(subject: Subject, count: int, device: str) -> tuple[MultiExit, Tensor]:
    """The network with thresholds, and images on its device."""
    net = subject.net.to(device)
    assert isinstance(net, MultiExit)
    images = subject.images.select(torch.arange(count) % len(subject.images))
    if subject.weights == "random":
        net.policy = equal_share(all_logits(net, images))
    return net, images.batch(slice(None), torch.device(device))[0]


if __name__ == "__main__":
    sys.exit(main())
