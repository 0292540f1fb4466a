"""The tables of docs/evaluation.md: networks of results/ before a suite of attacks, its guards and attacks on the cost.

    python benchmarks/evaluation.py [RUN ...] [--images 1000] [--skip 0] [--suite full] [--guards 200]
        [--threads 1] [--cpu-time] [--device cpu] [--only fab_t ...]

What `swiftsure attack RUN --suite full --limit 1000` measures, of several runs and as markdown; no run is written to.
With --only, some attacks of the suite alone, without guards, or all attacks on the cost (`--only slowdown`). With
--skip, the images after the first so many: hours of one network can be cut in pieces.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swiftsure import run, run_attacks
from swiftsure.attacks import SUITE_NAMES, SlowdownResult, attacks_for, run_slowdown, run_suite
from swiftsure.certificates import certifying
from swiftsure.errors import InputError
from swiftsure.modes import channels_last
from swiftsure.run_attacks import Attacked
from swiftsure.subject import Subject, open_subject

RESULTS = Path(__file__).resolve().parents[1] / "results"


def table(subject: Subject, attacked: Attacked, suite: str) -> list[str]:
    """Lines of markdown: a row an attack, and what suite full adds to standard."""
    found, slowed = attacked.found, attacked.slowed
    several = slowed is not None
    columns = ["attack", "accuracy", "8-bit", "seconds", *(["multiply-adds"] if several else [])]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    rounded, clean = found.accuracy_8bit, float((~found.misclassified).double().mean())

    def row(
        name: str, left: float | None, left_8bit: float | None, seconds: float | None, macs: float | None
    ) -> None:
        cells = [name, _percent(left), _percent(left_8bit), "" if seconds is None else f"{seconds:.1f}"]
        lines.append(
            "| " + " | ".join([*cells, *(["" if macs is None else f"{macs:,.0f}"] if several else [])]) + " |"
        )

    row("none", clean, clean, None, slowed.clean.macs.double().mean().item() if slowed else None)
    for name, left in found.accuracy.items():
        row(name, left, rounded[name], found.seconds.get(name), found.macs.get(name))
    if suite == "full":
        names = [name for name in _attacks_of("standard", subject) if name in found.broken]
        left, left_8bit = (
            float((~torch.stack([found.misclassified, *(by[name] for name in names)]).any(0)).double().mean())
            for by in (found.broken, found.broken_8bit)
        )
        row("union of standard's attacks", left, left_8bit, None, None)
    if slowed is not None:
        for name, answer in slowed.slowed.items():
            row(name, None, None, slowed.seconds[name], answer.macs.double().mean().item())
        row("slowdown, all together", None, None, None, slowed.dearest.macs.double().mean().item())
    lines += [f"\n{name} was left out: {reason}" for name, reason in found.skipped.items()]
    return lines


def guards(attacked: Attacked) -> list[str]:
    """Lines of markdown: the verdict and every check."""
    said = attacked.guards
    lines = [f"Guards: **{said.verdict}** ({said.seconds:.1f} s). {said.reason}.", ""]
    return lines + [f"- {name}: {check.verdict}; {check.reason}" for name, check in said.checks.items()]


def usage(subject: Subject, attacked: Attacked) -> list[str]:
    """Lines of markdown: the share of images at each exit, and mean multiply-adds, before and after."""
    slowed = attacked.slowed
    if slowed is None:
        return []
    answers = {"clean": slowed.clean, "attacked": attacked.worst, **slowed.slowed, "slowed": slowed.dearest}
    exits = range(subject.exits)
    lines = [f"| images | {' | '.join(f'exit {exit + 1}' for exit in exits)} | multiply-adds |"]
    lines.append("|---" + "|---" * subject.exits + "|---|")
    for name, answer in answers.items():
        shares = answer.exit.bincount(minlength=subject.exits).double() / subject.n
        cells = [
            name,
            *(f"{100 * share:.1f}" for share in shares.tolist()),
            f"{answer.macs.double().mean():,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def some(subject: Subject, suite: str, names: Sequence[str], clock: Callable[[], float]) -> list[str]:
    """Lines of markdown: a row for each of those attacks that the suite has for this network."""
    net: Any = subject.net
    suites = _attacks_of(suite, subject)
    x, y = subject.images.batch(slice(None))
    with certifying(net), channels_last(net, x[:2]):
        if "slowdown" in names:
            return slowdown(run_slowdown(net, x, y, subject.ball, seed=subject.recipe.seed, clock=clock))
        found = run_suite(
            net, x, y, subject.ball, suite, seed=subject.recipe.seed, judge=subject.judge, answer=net.adaptive,
            attacks={name: attack for name, attack in suites.items() if name in names}, clock=clock,
        )  # fmt: skip
    clean = float((~found.misclassified).double().mean())
    lines = [f"| {subject.n:,} images | accuracy | seconds | multiply-adds |", "|---" * 4 + "|"]
    lines.append(f"| none | {_percent(clean)} | | |")
    for name, seconds in found.seconds.items():
        macs = f"{found.macs[name]:,.0f}" if subject.exits > 1 else ""
        lines.append(f"| {name} | {_percent(found.accuracy[name])} | {seconds:.1f} | {macs} |")
    return lines


def slowdown(found: SlowdownResult) -> list[str]:
    """Lines of markdown: a row for each attack on the cost, and whether they can be believed."""
    lines = ["| attack | seconds | multiply-adds |", "|---" * 3 + "|"]
    answers = {"none": found.clean, **found.slowed, "all together": found.dearest}
    for name, answer in answers.items():
        seconds = f"{found.seconds[name]:.1f}" if name in found.seconds else ""
        lines.append(f"| {name} | {seconds} | {answer.macs.double().mean():,.0f} |")
    return [*lines, "", f"{found.guard.verdict}: {found.guard.reason}"]


def _attacks_of(suite: str, subject: Subject) -> dict[str, Callable[..., Tensor]]:
    net: Any = subject.net
    return attacks_for(
        suite, subject.exits, subject.images.shape[0], net.policy if subject.exits > 1 else None
    )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Runs before a suite of attacks and its guards, as markdown."
    )
    parser.add_argument("runs", nargs="*", type=Path, help="run directories (default: all of results/)")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--skip", type=int, default=0, help="leave out the first so many of these images")
    parser.add_argument("--suite", default="full", choices=SUITE_NAMES)
    parser.add_argument("--guards", type=int, default=200)
    parser.add_argument(
        "--transfer", action="append", default=[], type=Path, help="a run to attack from as well"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--cpu-time", action="store_true", help="count this process's own seconds, beside other work"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="*", default=[], help="names of attacks of the suite, or slowdown")
    options = parser.parse_args()
    if not 0 <= options.skip < options.images:
        parser.error(f"--skip is {options.skip}; allowed: 0 to {options.images - 1}, below --images")
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    for folder in options.runs or sorted(RESULTS.iterdir()):
        try:
            subject = open_subject(folder, limit=options.images, device=options.device)
            subject = replace(subject, images=subject.images.select(slice(options.skip, None)))
            began = clock()
            if options.only:
                print(
                    "\n".join([f"### {folder.name}\n", *some(subject, options.suite, options.only, clock)])
                    + "\n"
                )
                continue
            attacked = run_attacks.attack(subject, options.suite, options.transfer, options.guards, clock)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        seconds = clock() - began
        on_cpu = subject.device.type == "cpu"
        where = f"{options.threads} thread(s)" if on_cpu else run.device_name(subject.device)
        print(
            f"### {folder.name}\n\nTest images {options.skip:,} to {options.skip + subject.n:,}, "
            f"L{subject.ball.norm} eps {subject.ball.radius:g}, suite {options.suite}, {where}, "
            f"{seconds:.0f} s{' of its own' if options.cpu_time else ''}.\n"
        )
        for part in (table(subject, attacked, options.suite), guards(attacked), usage(subject, attacked)):
            print("\n".join(part) + "\n", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
