"""RDI-Nets' comparison of an adaptive network with static ones, each before as many attacks, on the same images.

    python benchmarks/equal_attacks.py ADAPTIVE STATIC ... [--images 1000] [--threads 1] [--cpu-time]

A network with K exits meets K + 9 attacks of suite `rdi`, one with a single exit only three, and a union falls with the
number of attacks. So a network that has fewer of them meets PGD from further random starts until all have had as many.
Beside each union: how many images this network gets right under all attacks and the first one does not, and the other
way round. No run is written to.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swiftsure.attacks import attacks_for, run_suite
from swiftsure.errors import InputError
from swiftsure.subject import Subject, open_subject

COLUMNS = (
    "run",
    "attacks",
    "clean",
    "PGD on the last exit",
    "union",
    "multiply-adds",
    "gains",
    "loses",
    "seconds",
)


def attacks_of(subject: Subject, count: int) -> dict[str, Any]:
    """Suite rdi, and PGD on the last exit from other random starts until there are `count` attacks."""
    attacks: dict[str, Any] = attacks_for("rdi", subject.exits, subject.images.shape[0])
    pgd = next(iter(attacks))
    more = {f"{pgd}_start{number}": attacks[pgd] for number in range(2, 2 + max(0, count - len(attacks)))}
    return attacks | more


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs before as many attacks each, as markdown.")
    parser.add_argument(
        "runs", nargs="+", type=Path, help="run directories; the first is what others are held against"
    )
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count this process's own seconds, beside other work"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    try:
        subjects = [
            open_subject(folder, limit=options.images, device=options.device) for folder in options.runs
        ]
        count = max(len(attacks_of(subject, 0)) for subject in subjects)
        print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|", flush=True)
        first: Tensor | None = None
        for subject in subjects:
            attacks = attacks_of(subject, count)
            net: Any = subject.net
            x, y = subject.images.batch(slice(None))
            began = clock()
            found = run_suite(
                net, x, y, subject.ball, "rdi", seed=subject.recipe.seed, judge=subject.judge, answer=net.adaptive,
                attacks=attacks, clock=clock,
            )  # fmt: skip
            right = ~found.union
            first = right if first is None else first
            cells = [
                subject.folder.name,
                str(len(attacks)),
                f"{100 * (~found.misclassified).double().mean():.2f}",
                f"{100 * found.accuracy[next(iter(attacks))]:.2f}",
                f"{100 * right.double().mean():.2f}",
                f"{subject.answers().macs.double().mean():,.0f}",
                str(int((right & ~first).sum())),
                str(int((first & ~right).sum())),
                f"{clock() - began:.0f}",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
