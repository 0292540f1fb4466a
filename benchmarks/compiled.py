"""What torch.compile gives the interval loss: forward, and forward with backward, compiled and not, in turn.

    python benchmarks/compiled.py [--networks cnn7 ...] [--batch 16] [--rounds 9] [--threads 2] [--device cpu]

The loss of one shape of batch is traced into a single graph. Compiling costs once what the last column says.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from subjects import NETWORKS, Subject, untrained
from swiftsure import bounds
from swiftsure.bounds import Region
from timing import Timed, in_turn, ratio


def losses(subject: Subject, batch: int, device: str) -> list[tuple[str, Timed, Timed, float]]:
    """Name, forward and both ways, of the plain, the interval and the compiled interval loss; seconds to compile."""
    net = subject.net.to(device)
    x, y = (part.to(device) for part in subject.batch(batch))
    graph = bounds.trace(net, x)

    def interval(x: Tensor, y: Tensor) -> Tensor:
        (lower,) = bounds.lower_margins(bounds.interval, graph, Region(x, subject.ball), y)
        return F.cross_entropy(-lower, y)

    def plain(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(net(x), y)

    compiled = torch.compile(interval, fullgraph=True, dynamic=False)
    started = time.perf_counter()
    compiled(x, y).backward()
    seconds = time.perf_counter() - started

    def timed(loss: object) -> tuple[Timed, Timed]:
        assert callable(loss)

        def forward() -> Tensor:
            with torch.no_grad():
                return _awaited(loss(x, y))

        def both() -> Tensor:
            net.zero_grad()
            value = loss(x, y)
            value.backward()
            return _awaited(value.detach())

        return Timed(forward), Timed(both)

    return [
        ("plain", *timed(plain), 0.0),
        ("interval", *timed(interval), 0.0),
        ("interval, compiled", *timed(compiled), seconds),
    ]


def _awaited(value: Tensor) -> Tensor:
    if value.is_cuda:
        torch.cuda.synchronize()
    return value


def main() -> int:
    """Print one table for each network."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for all rounds of one call")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", default="digits")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.networks:
        subject = untrained(name, options.data, None, 0)
        found = losses(subject, options.batch, options.device)
        calls = [timed for _, forward, both, _ in found for timed in (forward, both)]
        for call in calls:
            call.probe(options.rounds, options.limit)
        in_turn(calls, options.rounds)
        table = Table(title=f"{name}, batch {options.batch}, {options.device}, {options.threads} threads")
        for column in ("loss", "forward, x plain", "with backward, x plain", "seconds to compile"):
            table.add_column(column, justify="left" if column == "loss" else "right")
        for loss, forward, both, seconds in found:
            ratios = [
                ratio(timed, plain) for timed, plain in zip((forward, both), found[0][1:3], strict=True)
            ]
            words = ["-" if value is None else f"{value:.2f}" for value in ratios]
            table.add_row(loss, *words, f"{seconds:.0f}" if seconds else "")
        Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
