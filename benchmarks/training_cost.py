"""Seconds a training step on mnist_small at eps 0.1: plain, PGD-40 adversarial, MixTrain, its bound on all, interval.

    python benchmarks/training_cost.py [--rounds 15] [--threads 2] [--run results/mnist_small_mixtrain_0.1]

Every kind of step is timed in turn, round after round, on the same batches of 50, once with the weights of the run
and once with plainly trained ones (two epochs, made here). A step is forward, backward and the optimiser. Printed are
medians over the rounds and their ratios, beside the goals.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import swiftsure as ss
from swiftsure.training import Loss, Mixing, Optimizer, Schedule, three_term_loss, worst_case_loss

BATCH, EPS, PGD_STEPS, PGD_STEP_SIZE = 50, 0.1, 40, 0.01

Step = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]


def plain(net: nn.Module, x: Tensor, y: Tensor, draws: torch.Generator) -> Tensor:
    return three_term_loss(net, x, y, ss.Ball(EPS), Loss(proven=False), 0.0)


def adversarial(net: nn.Module, x: Tensor, y: Tensor, draws: torch.Generator) -> Tensor:
    def attack(net: nn.Module, x: Tensor, y: Tensor, ball: ss.Ball) -> Tensor:
        return ss.attacks.pgd(
            net, x, y, ball,
            judge=ss.attacks.never, steps=PGD_STEPS, step_size=PGD_STEP_SIZE, generator=draws,
        )  # fmt: skip

    return three_term_loss(
        net, x, y, ss.Ball(EPS), Loss(clean=0.0, attacked=1.0, proven=False), 0.0, attack=attack
    )


def mixtrain(net: nn.Module, x: Tensor, y: Tensor, draws: torch.Generator) -> Tensor:
    return three_term_loss(net, x, y, ss.Ball(EPS), Loss(k=1, bound="symbolic"), 1.0, generator=draws)


def whole_batch(net: nn.Module, x: Tensor, y: Tensor, draws: torch.Generator) -> Tensor:
    return three_term_loss(net, x, y, ss.Ball(EPS), Loss(k=None, bound="symbolic"), 1.0)


def interval_training(net: nn.Module, x: Tensor, y: Tensor, draws: torch.Generator) -> Tensor:
    return three_term_loss(net, x, y, ss.Ball(EPS), Loss(k=None, bound="interval"), 1.0)


def interval_term(net: nn.Module, x: Tensor, y: Tensor, draws: torch.Generator) -> Tensor:
    return worst_case_loss(net, x, y, ss.Ball(EPS), "interval")


STEPS: dict[str, Step] = {
    "plain": plain,
    "PGD-40 adversarial": adversarial,
    "MixTrain, k = 1 of 50": mixtrain,
    "the same bound on all 50": whole_batch,
    "interval training": interval_training,
    "interval term alone": interval_term,
}
RATIOS = [
    ("MixTrain / PGD-40 adversarial", "MixTrain, k = 1 of 50", "PGD-40 adversarial", "at most 0.333"),
    ("MixTrain / bound on all", "MixTrain, k = 1 of 50", "the same bound on all 50", "at most 0.067"),
    ("interval term / plain", "interval term alone", "plain", "at most 2.2"),
    ("MixTrain / plain", "MixTrain, k = 1 of 50", "plain", ""),
    ("PGD-40 adversarial / plain", "PGD-40 adversarial", "plain", ""),
]


def measure(net: nn.Module, data: ss.data.ImageSet, rounds: int) -> dict[str, list[float]]:
    """Seconds of each kind of step, round after round. The weights move by nothing: the learning rate is 0."""
    optimizer = torch.optim.Adam(net.parameters(), 0.0)
    draws = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {name: [] for name in STEPS}
    net.train()
    for number in range(-2, rounds):
        x, y = data.batch(torch.randperm(len(data), generator=draws)[:BATCH])
        for name, step in STEPS.items():
            start = time.perf_counter()
            optimizer.zero_grad()
            step(net, x, y, draws).backward()
            optimizer.step()
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds a training step, and their ratios.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--run", type=Path, default=Path("results/mnist_small_mixtrain_0.1"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    splits = ss.data.load("mnist")
    torch.manual_seed(0)
    trained_plainly = ss.models.build("mnist_small")
    ss.fit(
        trained_plainly, splits.train, splits.val, loss=Loss(proven=False, mixing=Mixing("constant")),
        optimizer=Optimizer(), schedule=Schedule(epochs=2, ramp=0),
    )  # fmt: skip
    console = Console(width=110)
    console.print(
        f"mnist_small, eps {EPS}, batch {BATCH}, {options.rounds} rounds in turn, {options.threads} threads, "
        f"torch {torch.__version__}, {platform.machine()}"
    )
    for title, net in {str(options.run): ss.load(options.run), "plainly trained": trained_plainly}.items():
        seconds = measure(net, splits.train, options.rounds)
        table = Table(title=f"weights: {title}", title_justify="left")
        for column in ("step", "median ms", "min", "max"):
            table.add_column(column, justify="left" if column == "step" else "right")
        for name, values in seconds.items():
            table.add_row(name, *(f"{1000 * f(values):.1f}" for f in (statistics.median, min, max)))
        console.print(table)
        ratios = Table()
        for column in ("ratio (median of the rounds' ratios)", "reached", "goal"):
            ratios.add_column(column)
        for name, above, below, goal in RATIOS:
            pairs = zip(seconds[above], seconds[below], strict=True)
            ratios.add_row(name, f"{statistics.median(a / b for a, b in pairs):.3f}", goal)
        console.print(ratios)


if __name__ == "__main__":
    main()
