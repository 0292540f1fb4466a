"""Slowdown on networks with several exits: shares at each exit and mean multiply-adds before and after, as markdown.

    python benchmarks/slowdown.py RUN ... [--images 1000]

For each run two sets of thresholds: its own, and thresholds set with the worst case in mind: those of `swiftsure
calibrate RUN --forced-macs N --attacked`, where N is what clean held-out images cost under its own: whatever attacks on
the cost find on held-out images then costs no more than clean images did. Attacked are the first test images; each
counts with the dearest image that any slowdown attack found. Accuracy under attack is the union of the quick suite,
which knows the thresholds. How long fitting took goes to stderr.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from swiftsure import data
from swiftsure.attacks import attacks_for, run_slowdown, run_suite
from swiftsure.ball import Ball
from swiftsure.certificates import certifying
from swiftsure.errors import InputError
from swiftsure.exits import Answer, MultiExit, Policy
from swiftsure.modes import channels_last
from swiftsure.recipe import Exits
from swiftsure.run_exits import fit_forced
from swiftsure.subject import Subject, open_subject

COLUMNS = (
    "run",
    "thresholds",
    "clean",
    "attacked",
    "clean leave at",
    "slowed leave at",
    "clean cost",
    "slowed cost",
)
BATCH = 500


def worst_case_policy(subject: Subject, net: MultiExit, policy: Policy) -> Policy:
    """Thresholds by which slowed held-out images cost what clean ones cost by the policy."""
    images = data.load(subject.recipe.data.name, None, subject.recipe.seed).calibration
    x, _ = images.batch(slice(None))
    budget = torch.cat([net.adaptive(part, policy).macs for part in x.split(BATCH)]).double().mean().item()
    choice = Exits(policy=policy.rule, forced_macs=budget, attacked=True)  # type: ignore[arg-type]
    began = time.process_time()
    found = fit_forced(net, choice, images, subject.ball)
    print(f"{budget:,.0f}: {found}, {time.process_time() - began:.0f} s", file=sys.stderr, flush=True)
    return found.policy


def row(name: str, what: str, net: MultiExit, policy: Policy, x: Tensor, y: Tensor, ball: Ball) -> str:
    """A line of the markdown table."""
    attacks = attacks_for("quick", net.exits, x.shape[1], policy)
    found = run_suite(
        net, x, y, ball, "quick",
        judge=policy.misclassified, answer=lambda images: net.adaptive(images, policy), attacks=attacks,
    )  # fmt: skip
    slowed = run_slowdown(net, x, y, ball, policy)
    clean, dearest = slowed.clean, slowed.dearest
    right = (clean.label == y).double().mean().item()
    cells = (
        name,
        f"{what} ({', '.join(f'{value:.3g}' for value in policy.thresholds)})",
        f"{100 * right:.2f}",
        f"{100 * found.accuracy['union']:.2f}",
        _shares(clean, net.exits),
        _shares(dearest, net.exits),
        f"{clean.macs.double().mean():,.0f}",
        f"{dearest.macs.double().mean():,.0f}",
    )
    return "| " + " | ".join(cells) + " |"


def _shares(answer: Answer, exits: int) -> str:
    shares = answer.exit.bincount(minlength=exits).double() / len(answer.exit)
    return " / ".join(f"{100 * share:.0f}" for share in shares.tolist())


def main() -> int:
    parser = argparse.ArgumentParser(description="Slowdown: shares at each exit and mean multiply-adds.")
    parser.add_argument("runs", nargs="+", type=Path, help="run directories with several exits")
    parser.add_argument("--images", type=int, default=1000, help="the first so many test images")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    try:
        for folder in options.runs:
            subject = open_subject(folder, limit=options.images, device="cpu")
            net = subject.net
            if not isinstance(net, MultiExit) or net.policy is None:
                raise InputError(f"{folder} has one exit, or no thresholds")
            own, (x, y) = net.policy, subject.images.batch(slice(None))
            with certifying(net), channels_last(net, x[:2]):
                print(row(folder.name, "its own", net, own, x, y, subject.ball), flush=True)
                policy = worst_case_policy(subject, net, own)
                print(row(folder.name, "worst case", net, policy, x, y, subject.ball), flush=True)
            whole = net.macs(subject.images.shape)[-1]
            print(f"| {folder.name} | all exits run | | | | | {whole:,} | {whole:,} |", flush=True)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
