"""Defences that are broken on purpose: what plain PGD-40 says of each, what the standard suite does, and its guards.

    python benchmarks/broken_defences.py [--images 200]

The defences are those of tests/defences.py, on the digits. Prints the table of docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swiftsure.attacks import attacks_for, misclassified, run_suite
from swiftsure.attacks.guards import guard
from swiftsure.exits import MultiExit

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
defences: Any = importlib.import_module("defences")
trained: Any = importlib.import_module("trained")

BALL = defences.BALL
COLUMNS = ("defence", "clean", "PGD-40", "standard suite", "with guards", "the least by", "guards", "why")


def row(name: str, net: nn.Module, x: Tensor, y: Tensor) -> str:
    """A line of the markdown table."""
    policy = net.policy if isinstance(net, MultiExit) else None
    exits = net.exits if isinstance(net, MultiExit) else 1
    found = run_suite(
        net, x, y, BALL, "standard",
        judge=misclassified if policy is None else policy.misclassified,
        attacks=attacks_for("standard", exits, x.shape[1], policy),
    )  # fmt: skip
    said, accuracy = guard(net, x, y, BALL, found, policy=policy), found.accuracy
    union = accuracy.pop("union")
    left = ~found.union
    left[list(said.broken)] = False
    least = min(accuracy, key=lambda attack: accuracy[attack])
    clean = 1 - float(found.misclassified.double().mean())
    figures = (clean, accuracy["pgd40"], union, float(left.double().mean()))
    cells = (name, *(f"{100 * value:.1f}" for value in figures), least, said.verdict, said.reason)
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description="Broken defences before the standard suite and its guards.")
    parser.add_argument("--images", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    x, y = trained.held_out(options.images).batch(slice(None))
    print(f"{len(x)} images of the digits, Linf, eps {BALL.radius:g}\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    print(row("none", trained.network(0).eval(), x, y), flush=True)
    for name, build in defences.DEFENCES.items():
        print(row(name, build(), x, y), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
