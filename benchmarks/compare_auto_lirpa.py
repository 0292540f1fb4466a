"""Our lower bounds of class margins against auto_LiRPA's on the same images: how far apart, and how often looser.

    python benchmarks/compare_auto_lirpa.py [--peer FOLDER] [--networks mnist_small ...] [--runs results/*0.1 ...]

Differences are in units of the larger of 1 and the image's largest bound. "random" images are uniform pixels. For
crown the same numbers are printed twice: with hidden l, u by our rule on both sides (the same relaxation: the bounds
must agree), and with auto_LiRPA as it comes, whose l, u of hidden units are at times looser.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import swiftsure as ss
from peers import METHODS, Peer, difference, find, others
from subjects import NETWORKS, Subject, trained, untrained
from swiftsure.bounds import TECHNIQUES
from swiftsure.errors import InputError
from timing import MEMORY, TooLong, limit_memory, within

TOLERANCE = 1e-5
RUNS = [Path("results/mnist_small_mixtrain_0.1"), Path("results/mnist_small_mixtrain_0.3")]
COLUMNS = (
    "network",
    "weights",
    "eps",
    "images",
    "technique",
    "rule",
    "n",
    "largest |difference|",
    "looser",
    "tighter",
)


def batches(subject: Subject, count: int, size: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The subject's own images and as many of uniform pixels, in small batches."""
    x, y = subject.batch(count)
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
    for kind, images in ((subject.images.name, x), ("random", noise)):
        for a, b in zip(images.split(size), y.split(size), strict=True):
            yield kind, a, b


def compare(
    found: dict[tuple[str, str], list[Tensor]],
    subject: Subject,
    peer: Peer,
    technique: str,
    count: int,
    size: int,
) -> None:
    """Fill in, by kind of image and rule: our bounds less theirs, (images, classes - 1)."""
    rules = {"same": True, "as it comes": False} if technique == "crown" else {"same": False}
    for kind, x, y in batches(subject, count, size):
        ours = ss.margins(subject.net, x, y, subject.ball, technique)
        assert isinstance(ours, Tensor)
        for rule, our_rule in rules.items():
            theirs = peer.margins(x, y, subject.ball, technique, our_rule=our_rule)
            found.setdefault((kind, rule), []).append(difference(others(ours, y), theirs))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Our bounds against auto_LiRPA's.")
    parser.add_argument("--peer", type=Path, help="the folder that holds auto_LiRPA")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), help="untrained ones, by name")
    parser.add_argument("--runs", nargs="*", type=Path, default=RUNS, help="trained ones, by run directory")
    techniques = [name for name in TECHNIQUES if name in METHODS]
    parser.add_argument("--techniques", nargs="*", default=techniques, choices=techniques)
    parser.add_argument(
        "--eps", help="for all networks; default 0.1 (grey), 2/255 (colours), or the run's own"
    )
    parser.add_argument("--data", default="digits", help="images, enlarged to the networks' size")
    parser.add_argument("--images", type=int, default=4, help="of each kind")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for a technique on a network")
    parser.add_argument("--memory", type=float, default=MEMORY, help=f"GB; default {MEMORY:.3g}")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> int:
    options = read_options()
    limit_memory(options.memory)
    try:
        package, words = find(options.peer)
        if package is None:
            print(f"{words}; nothing to compare")
            return 0
        subjects = [trained(run, options.data, options.eps) for run in options.runs]
        subjects += [untrained(name, options.data, options.eps, options.seed) for name in options.networks]
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console(width=140)
    table = Table(title=f"{words}; looser, tighter: ours by more than {TOLERANCE:g}")
    for column in COLUMNS:
        table.add_column(column)
    worst = 0.0
    for subject in subjects:
        for technique in options.techniques:
            found: dict[tuple[str, str], list[Tensor]] = {}
            peer = Peer(package, subject.net)
            call = partial(compare, found, subject, peer, technique, options.images, options.batch)
            about = f"{subject.name}, {subject.weights} weights, {technique}:"
            try:
                console.print(f"{about} {within(options.limit, torch.no_grad()(call)):.1f} s")
            except TooLong:
                console.print(f"{about} stopped after {options.limit:g} s; what was done by then is compared")
            except (MemoryError, RuntimeError) as error:
                if "memory" not in str(error):
                    raise
                console.print(f"{about} out of memory; what was done by then is compared")
            for (kind, rule), parts in found.items():
                gap = torch.cat(parts)
                if rule == "same":
                    worst = max(worst, float(gap.abs().max()))
                table.add_row(
                    subject.name, subject.weights, f"{subject.ball.radius:.4g}", kind, technique, rule,
                    str(gap.numel()), f"{float(gap.abs().max()):.1e}",
                    str(int((gap < -TOLERANCE).sum())), str(int((gap > TOLERANCE).sum())),
                )  # fmt: skip
    console.print(table)
    console.print(f"largest |difference| by the same rule: {worst:.1e}; allowed: {TOLERANCE:g}")
    return int(not worst <= TOLERANCE)


if __name__ == "__main__":
    raise SystemExit(main())
