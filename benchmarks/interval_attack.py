"""MixTrain's interval attack against PGD-40 at the same number of gradients: violations, sample by sample, and seconds.

    swiftsure train recipes/mnist_small_pgd_0.3.yaml --out runs/mnist_small_pgd_0.3
    python benchmarks/interval_attack.py [--run runs/mnist_small_pgd_0.3] [--images 1000] [--restarts 5]

One restart of the interval attack takes two runs of 40 gradients with bounds between them, so that PGD-40 gets two
restarts for each of its. Both attack the images that the network gets right, in the same batches, and drop a sample as
soon as it is broken: the gradients that were really taken are counted. What PGD finds in the interval attack's seconds
is shown as well, as bounds are not free.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import swiftsure as ss
from swiftsure import attacks
from swiftsure.errors import InputError

RUN = Path("runs/mnist_small_pgd_0.3")
BATCH = 250
STEPS = 40
CLOCK = time.process_time
"""This process's own seconds: other work beside it does not count."""
# (network, images, labels, generator, report) -> adversarial images.
Call = Callable[[nn.Module, Tensor, Tensor, torch.Generator, attacks.GradientReport], Tensor]


class Tried:
    """What an attack broke of some samples, its gradients a sample, and its seconds."""

    def __init__(self, net: nn.Module, x: Tensor, y: Tensor, ball: ss.Ball, call: Call, seed: int) -> None:
        generator, report = torch.Generator().manual_seed(seed), attacks.GradientReport()
        began, parts = CLOCK(), []
        for images, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
            x_adv = call(net, images, labels, generator, report)
            if not bool(ball.contains(x_adv, images).all()):
                raise AssertionError("an attack left the ball")
            with torch.no_grad():
                parts.append(net(x_adv).argmax(1) != labels)
        self.broken, self.seconds = torch.cat(parts), CLOCK() - began
        self.gradients = report.samples / max(len(x), 1)


def pgd(ball: ss.Ball, restarts: int) -> Call:
    """PGD-40 with the step of the paper's runs, as the interval attack has it."""
    run = partial(attacks.pgd, steps=STEPS, step_size=ball.radius / 30, restarts=restarts)
    return lambda net, x, y, generator, report: run(net, x, y, ball, generator=generator, report=report)


def interval(ball: ss.Ball, restarts: int, refine: bool) -> Call:
    run = partial(attacks.interval_attack, steps=STEPS, restarts=restarts, refine=refine)
    return lambda net, x, y, generator, report: run(net, x, y, ball, generator=generator, report=report)


def pgd_for(ball: ss.Ball, seconds: float, n: int) -> Call:
    """PGD-40 restarted until its share of those seconds is over."""

    def call(
        net: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator, report: attacks.GradientReport
    ) -> Tensor:
        best, left, began = x.clone(), torch.arange(len(x)), CLOCK()
        while len(left) and CLOCK() - began < seconds * len(x) / n:
            x_adv = pgd(ball, 1)(net, x[left], y[left], generator, report)
            with torch.no_grad():
                broken = net(x_adv).argmax(1) != y[left]
            best[left[broken]] = x_adv[broken]
            left = left[~broken]
        return best

    return call


def compare(net: nn.Module, x: Tensor, y: Tensor, ball: ss.Ball, restarts: int, seed: int) -> Table:
    with torch.no_grad():
        right = net(x).argmax(1) == y
    total, x, y = len(x), x[right], y[right]
    once, many = (
        Tried(net, x, y, ball, pgd(ball, 1), seed),
        Tried(net, x, y, ball, pgd(ball, 2 * restarts), seed),
    )
    bounds = Tried(net, x, y, ball, interval(ball, restarts, refine=False), seed)
    refined = Tried(net, x, y, ball, interval(ball, restarts, refine=True), seed)
    long = Tried(net, x, y, ball, pgd_for(ball, bounds.seconds, len(x)), seed)
    table = Table(
        title=f"Linf, eps {ball.radius:g}: {total} images, {len(x)} right without attack; {restarts} restarts"
    )
    for column in ("attack", "violations", "by it alone", "missed by it", "gradients a sample", "seconds"):
        table.add_column(column)
    rows = {
        "PGD-40": once,
        f"PGD-40, {2 * restarts} restarts": many,
        "PGD-40 in the interval attack's seconds": long,
        f"interval attack, {restarts} restarts": bounds,
        f"interval attack, {restarts} restarts, hidden units refined": refined,
    }
    for name, tried in rows.items():
        # Against the interval attack; for that, against PGD at the same number of gradients.
        other = many.broken if tried in (bounds, refined) else bounds.broken
        alone, missed = int((tried.broken & ~other).sum()), int((other & ~tried.broken).sum())
        table.add_row(
            name,
            f"{int(tried.broken.sum())}",
            f"{alone}",
            f"{missed}",
            f"{tried.gradients:.0f}",
            f"{tried.seconds:.1f}",
        )
    more = int(bounds.broken.sum()) / max(int(many.broken.sum()), 1) - 1
    first = int(bounds.broken.sum()) / max(int(once.broken.sum()), 1) - 1
    table.caption = (
        f"the interval attack finds {100 * more:+.1f}% violations relative to PGD-40 at the same number of gradients, "
        f"{100 * first:+.1f}% relative to one run of PGD-40"
    )
    return table


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The interval attack against PGD-40.")
    parser.add_argument("--run", type=Path, default=RUN, help="a run directory")
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--restarts", type=int, default=5, help="of the interval attack")
    parser.add_argument("--eps", help="default: the run's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> int:
    options = read_options()
    torch.set_num_threads(options.threads)
    try:
        net = ss.load(options.run)
        ball = ss.Ball(options.eps or ss.models.read_config(options.run)["ball"]["eps"])
        x, y = ss.data.load(options.data).test.batch(slice(0, options.images))
        table = compare(net, x, y, ball, options.restarts, options.seed)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Console(width=130).print(f"{options.run.name}", table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
