"""Bounds a second: each technique, forward alone and with backward, beside a plain pass and beside auto_LiRPA.

    python benchmarks/bounds.py [--networks mnist_small ...] [--runs results/mnist_small_mixtrain_0.1 ...]
        [--batches 1 128] [--techniques interval ...] [--forward] [--rounds 9] [--threads 2] [--limit 60]
        [--peer FOLDER]

Timed are lower bounds of the class margins of one batch, and "with backward" also the gradient of their worst-case
cross-entropy; plain is the network's own pass, and the gradient of its cross-entropy. All calls run in turn, round
after round, in evaluation mode; ratios are medians of the rounds' ratios. Short calls are repeated within a round, long
ones get fewer rounds, and what does not end within the limit is left out, as its row says.

auto_LiRPA computes the same bounds. Its crown takes the l, u of hidden units by another rule: it is timed as it comes,
and given ours for the column "apart" (in units of the larger of 1 and the image's largest bound).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import swiftsure as ss
from peers import METHODS, Peer, difference, find, others, worst_case_loss
from subjects import NETWORKS, Subject, trained, untrained
from swiftsure.bounds import TECHNIQUES
from swiftsure.errors import InputError
from timing import MEMORY, NEVER, Call, Timed, TooLong, in_turn, limit_memory, ratio, within

PLAIN = "plain"
FORWARD, BACKWARD = "forward", "with backward"
FORWARD_ONLY = {"alpha-crown"}
"""Techniques whose bounds carry no gradient."""
PEER_GOALS = {
    ("interval", FORWARD): 1.7, ("interval", BACKWARD): 1.25, ("crown-ibp", FORWARD): 4.0,
    ("crown-ibp", BACKWARD): 4.0, ("crown", FORWARD): 10.0, ("crown", BACKWARD): 10.0,
}  # fmt: skip
PLAIN_GOALS = {("interval", BACKWARD): 2.2, ("crown-ibp", BACKWARD): 12.0}
TRIALS = (1, 4)
"""Batches that are tried first, to tell what a larger one will take."""
Key = tuple[str, str]
"""A technique and a way."""


@dataclass
class Cell:
    """A technique one way: our call, theirs if they have it, and both sides' bounds by the same rule."""

    technique: str
    way: str
    ours: Timed
    theirs: Timed | None = None
    bounds: tuple[Call, Call] | None = None
    apart: float | None = None

    @property
    def key(self) -> Key:
        """What is measured, whatever the batch."""
        return self.technique, self.way

    def compare(self, limit: float) -> None:
        """Fill `apart`, if both sides can within the limit."""
        if self.bounds is None or self.theirs is None or not (self.ours.seconds and self.theirs.seconds):
            return

        def compute() -> None:
            assert self.bounds is not None
            mine, peers = (bounds() for bounds in self.bounds)
            self.apart = float(difference(mine, peers).abs().max())

        try:
            within(2 * limit, torch.no_grad()(compute))
        except (TooLong, MemoryError, RuntimeError):
            self.apart = None


def cells(
    subject: Subject, x: Tensor, y: Tensor, techniques: list[str], package: ModuleType | None
) -> Iterator[Cell]:
    """Plain first, then each technique."""
    net, ball = subject.net, subject.ball
    yield Cell(PLAIN, FORWARD, Timed(forward_of(lambda: net(x))))
    yield Cell(PLAIN, BACKWARD, Timed(backward_of(lambda: net(x), lambda z: F.cross_entropy(z, y), net)))
    for technique in techniques:

        def ours(technique: str = technique) -> Tensor:
            margins = ss.margins(net, x, y, ball, technique)
            assert isinstance(margins, Tensor)
            return others(margins, y)

        ways = [Cell(technique, FORWARD, Timed(forward_of(ours)))]
        if technique not in FORWARD_ONLY:
            ways.append(Cell(technique, BACKWARD, Timed(backward_of(ours, worst_case_loss, net))))
        if package is not None and technique in METHODS:
            # One for each technique: what was stopped half-way is not used for another.
            peer = Peer(package, net)

            def theirs(our_rule: bool = False, peer: Peer = peer, technique: str = technique) -> Tensor:
                return peer.margins(x, y, ball, technique, our_rule=our_rule)

            ways[0].theirs = Timed(forward_of(theirs), foreign=True)
            ways[0].bounds = ours, lambda theirs=theirs: theirs(our_rule=True)
            for cell in ways[1:]:
                cell.theirs = Timed(backward_of(theirs, worst_case_loss, peer.bounded), foreign=True)
        yield from ways


def forward_of(bounds: Call) -> Call:
    return torch.no_grad()(bounds)


def backward_of(bounds: Call, loss: Callable[[Tensor], Tensor], net: nn.Module) -> Call:
    def step() -> Tensor:
        net.zero_grad()
        value = loss(bounds())
        value.backward()
        return value

    return step


def measure(
    found: list[Cell], batch: int, rounds: int, limit: float, known: dict[Any, list[tuple[int, float]]]
) -> None:
    """Time all cells of one network and batch; none of the rounds where only a trial is wanted.

    ``known`` holds seconds a call at smaller batches: what they promise to be over the limit is not tried.
    """
    for cell in found:
        for who, timed in enumerate((cell.ours, cell.theirs)):
            if timed is not None:
                expected = expect(known.get((*cell.key, who), []), batch)
                if known.get((cell.technique, FORWARD, who), [(0, 0.0)])[-1][1] == NEVER:
                    expected = NEVER
                seconds = timed.probe(rounds, limit, expected)
                known.setdefault((*cell.key, who), []).append((batch, seconds))
    in_turn((timed for cell in found for timed in (cell.ours, cell.theirs) if timed is not None), rounds)
    for cell in found:
        cell.compare(limit)


def expect(points: list[tuple[int, float]], batch: int) -> float:
    """Seconds a call at this batch: on the line through the last two (batch, seconds), or no less than the last."""
    if not points:
        return 0.0
    last, seconds = points[-1]
    if seconds == NEVER or len(points) == 1:
        return seconds
    before, less = points[-2]
    return seconds + max(0.0, seconds - less) / (last - before) * (batch - last)


def rows_of(subject: Subject, batch: int, found: list[Cell]) -> list[dict[str, Any]]:
    """One record for each technique and way: what the table and the JSON file say."""
    plain = {cell.way: cell.ours for cell in found if cell.technique == PLAIN}
    return [
        {
            "network": subject.name, "weights": subject.weights, "eps": subject.ball.radius, "batch": batch,
            "technique": cell.technique, "way": cell.way,
            "seconds": cell.ours.seconds, "note": cell.ours.note,
            "times_plain": ratio(cell.ours, plain[cell.way]), "times_plain_goal": PLAIN_GOALS.get(cell.key),
            "peer_seconds": cell.theirs.seconds if cell.theirs else [],
            "peer_note": cell.theirs.note if cell.theirs else "",
            "times_faster": ratio(cell.theirs, cell.ours) if cell.theirs else None,
            "times_faster_goal": PEER_GOALS.get(cell.key) if cell.theirs else None,
            "apart": cell.apart,
        }
        for cell in found
    ]  # fmt: skip


def table_of(subject: Subject, batch: int, found: list[Cell], with_peer: bool) -> Table:
    title = f"{subject.name}, {subject.weights} weights, eps {subject.ball.radius:.4g}, batch {batch}"
    table = Table(title=title, title_justify="left")
    for column in ("technique", "way"):
        table.add_column(column)
    columns = ["ms", "images/s", "x plain", "goal", "rounds"]
    for column in columns + (["auto_LiRPA ms", "x faster", "goal", "rounds", "apart"] if with_peer else []):
        table.add_column(column, justify="right")

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    def milliseconds(timed: Timed) -> str:
        return f"{1000 * timed.median:.2f}" if timed.seconds else timed.note

    for cell, row in zip(found, rows_of(subject, batch, found), strict=True):
        plain_goal, peer_goal = row["times_plain_goal"], row["times_faster_goal"]
        line = [
            milliseconds(cell.ours), f"{batch / cell.ours.median:.1f}" if cell.ours.seconds else "",
            number(row["times_plain"], ".2f"), f"at most {plain_goal:g}" if plain_goal else "",
            str(len(cell.ours.seconds)),
        ]  # fmt: skip
        if with_peer and cell.theirs is not None:
            line += [
                milliseconds(cell.theirs), number(row["times_faster"], ".2f"),
                f"at least {peer_goal:g}" if peer_goal else "", str(len(cell.theirs.seconds)),
                number(cell.apart, ".0e"),
            ]  # fmt: skip
        table.add_row(cell.technique, cell.way, *line)
    return table


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Bounds a second, and their ratios.")
    parser.add_argument(
        "--networks", nargs="*", help=f"untrained ones; default {' '.join(NETWORKS)}, none with --runs"
    )
    parser.add_argument("--runs", nargs="*", type=Path, default=[], help="trained ones, by run directory")
    parser.add_argument("--techniques", nargs="*", default=list(TECHNIQUES), choices=list(TECHNIQUES))
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 128])
    parser.add_argument(
        "--eps", help="for all networks; default 0.1 (grey), 2/255 (colours), or the run's own"
    )
    parser.add_argument("--data", default="digits", help="images, enlarged to the networks' size")
    parser.add_argument("--forward", action="store_true", help="leave out what is timed with backward")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for one cell, all its rounds")
    parser.add_argument("--memory", type=float, default=MEMORY, help=f"GB; default {MEMORY:.3g}")
    parser.add_argument(
        "--flush-denormal", action="store_true", help="numbers below 1e-38 become 0: faster, not exact"
    )
    parser.add_argument("--peer", type=Path, help="the folder that holds auto_LiRPA")
    parser.add_argument("--no-peer", action="store_true", help="leave auto_LiRPA out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write all timings here as well")
    return parser.parse_args()


def main() -> int:
    options = read_options()
    limit_memory(options.memory)
    # Before there are other threads: they take over the mode of this one.
    if options.flush_denormal and not torch.set_flush_denormal(True):
        print("error: this processor cannot flush denormal numbers", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    names = options.networks if options.networks is not None else [] if options.runs else list(NETWORKS)
    try:
        package, peer = (None, "auto_LiRPA is left out") if options.no_peer else find(options.peer)
        subjects = [trained(run, options.data, options.eps) for run in options.runs]
        subjects += [untrained(name, options.data, options.eps, options.seed) for name in names]
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    header = {
        "torch": torch.__version__, "machine": platform.machine(), "threads": options.threads,
        "rounds": options.rounds, "limit": options.limit, "flush_denormal": options.flush_denormal,
        "images": options.data, "seed": options.seed, "peer": package.__version__ if package else None,
    }  # fmt: skip
    console = Console(width=160)
    console.print(
        f"{options.data} images, {options.rounds} rounds in turn, {options.threads} threads, {platform.machine()}, "
        f"torch {torch.__version__}, denormal numbers {'flushed' if options.flush_denormal else 'kept'}; {peer}"
    )
    records: list[dict[str, Any]] = []
    for subject in subjects:
        known: dict[Any, list[tuple[int, float]]] = {}
        for batch in sorted({*options.batches, *(size for size in TRIALS if size < max(options.batches))}):
            x, y = subject.batch(batch)
            found = list(cells(subject, x, y, options.techniques, package))
            if options.forward:
                found = [cell for cell in found if cell.way == FORWARD]
            if batch not in options.batches:
                measure(found, batch, 0, options.limit, known)
                continue
            measure(found, batch, options.rounds, options.limit, known)
            console.print(table_of(subject, batch, found, package is not None))
            records += rows_of(subject, batch, found)
            if options.json:
                options.json.write_text(json.dumps({**header, "cells": records}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
