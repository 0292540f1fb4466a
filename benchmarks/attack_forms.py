"""Seconds a batch of RDI-Nets' attack forms on a network with exits, against K separate attacks done naively.

    python benchmarks/attack_forms.py [--net rdi_smallcnn] [--steps 40] [--batch 256] [--rounds 5] [--threads 1]
        [--channels-last]

All forms are PGD with as many steps. Done naively, an attack on one exit runs the whole network with all its heads,
whichever exit it is on, and max-average is K of those. Timed in turn, round after round, on the same images; weights
are as drawn, which changes no operation. With --channels-last all networks are laid out as training lays them out.
Printed are medians over the rounds, and the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import swiftsure as ss
from subjects import untrained
from swiftsure.attacks import at_exit, average, max_average, never, pgd, single
from swiftsure.exits import MultiExit
from swiftsure.recipe import Attack
from swiftsure.training.adversary import adversary
from timing import Timed, in_turn, ratio

LIMIT = 600.0
STATIC, NAIVE, ALL_NAIVE = "static network", "one exit, naively", "K exits, naively"


def calls(
    net: MultiExit, static: torch.nn.Module, x: Tensor, y: Tensor, ball: ss.Ball, steps: int
) -> dict[str, Timed]:
    """What is timed, by name."""
    # All samples to the last step, as in training.
    ascent = partial(pgd, judge=never)

    def each_exit() -> Tensor:
        return torch.stack(
            [ascent(net, x, y, ball, objective=single(exit), steps=steps) for exit in range(net.exits)]
        )

    half = adversary(Attack("max_average", steps=steps, precision="bfloat16"), ball, net.exits)
    # The layout in which training has it.
    laid_out = copy.deepcopy(net).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return {
        STATIC: Timed(lambda: ascent(static, x, y, ball, steps=steps)),
        NAIVE: Timed(lambda: ascent(net, x, y, ball, objective=single(-1), steps=steps)),
        ALL_NAIVE: Timed(each_exit),
        **{
            name: Timed(partial(at_exit, net, x, y, ball, exit=exit, steps=steps))
            for exit, name in enumerate([*(f"exit{number}" for number in range(1, net.exits)), "main"])
        },
        "average": Timed(lambda: ascent(net, x, y, ball, objective=average(), steps=steps)),
        "max_average": Timed(lambda: max_average(net, x, y, ball, steps=steps)),
        "max_average, bfloat16": Timed(lambda: half(laid_out, x, y, ball)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Seconds a batch of attack forms over exits, and their ratios."
    )
    parser.add_argument("--net", default="rdi_smallcnn")
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--channels-last", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    subject = untrained(options.net, options.data, "0.3" if options.data == "mnist" else "8/255", 0)
    layout = torch.channels_last if options.channels_last else torch.preserve_format
    net = subject.net.to(options.device).to(memory_format=layout)  # type: ignore[call-overload]
    assert isinstance(net, MultiExit)
    static = ss.models.build(f"{options.net}_static").eval().to(options.device)
    static = static.to(memory_format=layout)  # type: ignore[call-overload]
    x, y = (part.to(options.device) for part in subject.batch(options.batch))
    timed = calls(net, static, x, y, subject.ball, options.steps)
    for call in timed.values():
        call.probe(options.rounds, LIMIT)
    in_turn(timed.values(), options.rounds)
    console = Console(width=110)
    console.print(
        f"{options.net} ({net.exits} exits), PGD of {options.steps} steps, batch {options.batch}, "
        f"{options.rounds} rounds in turn, {options.threads} threads, {options.device}, "
        f"{'channels last, ' if options.channels_last else ''}torch {torch.__version__}, "
        f"{platform.machine()}"
    )
    table = Table()
    below = {"/ static": timed[STATIC], "/ one, naively": timed[NAIVE], "/ K, naively": timed[ALL_NAIVE]}
    for column in ("attack", "seconds", *below):
        table.add_column(column, justify="left" if column == "attack" else "right")
    for name, call in timed.items():
        ratios = [f"{ratio(call, other) or 0:.2f}" for other in below.values()]
        table.add_row(name, f"{call.median:.3f}", *ratios)
    console.print(table)
    console.print("goals: average at most 1.1 / one, naively; max_average at most 0.7 / K, naively")


if __name__ == "__main__":
    main()
