"""What certificates of networks with exits miss, and what they cost.

    python benchmarks/exit_certificates.py missed [--samples 300] [--json FILE]
    python benchmarks/exit_certificates.py cost [--run RUN] [--samples 512] [--methods interval auto] [--rounds 9]
        [--thresholds 0.3 0.3] [--threads 1] [--json FILE]

missed: networks of two to four inputs and 36 ReLUs with three exits (`small_exits`), on whose balls a grid stands for
the truth. Of the samples that are right on the whole grid, the share that each technique does not certify; and how many
exits lie, on average, between the last one that the grid comes to and the one that is proven to be the last. A
certificate that the grid contradicts ends the program with code 2.

cost: seconds to certify a network with exits and its static twin, the same trunk with its last exit alone, in turn and
round after round; the ratio is the median of the rounds' ratios. Given no run, digits_small with two linear side exits,
trained for some seconds on interval bounds, at eps 0.06. The slack for rounding is given, not measured, in both.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import swiftsure as ss
from small_exits import images, network, sum_of, truth
from swiftsure.ball import Ball
from swiftsure.certificates import FLOOR, METHODS
from swiftsure.errors import InputError
from swiftsure.exits import MultiExit, Policy
from timing import Timed, in_turn, ratio

POINTS = {2: 61, 3: 21, 4: 11}
"""Of the grid, along each axis, by the number of inputs."""
BALLS = (Ball(0.05), Ball(0.07, "2"))
POLICIES = (Policy("entropy", [0.1, 0.1]), Policy("entropy", [0.5, 0.5]), Policy("confidence", [0.9, 0.9]))
DELTA = 1e-4
EPS = 0.06
GOAL = 1.3


def missed(samples: int) -> Iterator[dict[str, Any]]:
    """A record for each small network, ball and policy.

    Raises:
        SystemExit: a certificate is wrong.
    """
    for inputs, points in POINTS.items():
        x, y = images(samples, inputs)
        for proven in (0.0, 0.5):
            net = network(inputs, proven=proven)
            for ball in BALLS:
                for policy in POLICIES:
                    found = truth(net, x, y, ball, policy, points)
                    row: dict[str, Any] = {
                        "inputs": inputs, "proven": bool(proven), "norm": ball.norm, **policy.as_dict(),
                        "samples": samples, "safe": int(found.safe.sum()), "missed": {}, "exits_above": {},
                    }  # fmt: skip
                    for method in METHODS:
                        claim = ss.certify(net, x, y, ball, policy, method, delta=FLOOR)
                        wrong = (
                            (claim.certified & ~found.safe)
                            | (claim.max_exit < found.deepest)
                            | (found.leaves & ~claim.required).any(1)
                        )
                        if wrong.any():
                            print(f"{method}: the grid contradicts {int(wrong.sum())} certificates of {row}")
                            raise SystemExit(2)
                        row["missed"][method] = 1 - int(claim.certified.sum()) / row["safe"]
                        row["exits_above"][method] = (claim.max_exit - found.deepest).double().mean().item()
                    yield row


def table_of_missed(rows: list[dict[str, Any]]) -> Table:
    title = "Share of truly safe samples that are not certified (exits above the truth)"
    table = Table(title=title, title_justify="left")
    for name in ("inputs", "trained", "ball", "policy", "safe", *METHODS):
        table.add_column(name, justify="left" if name in ("trained", "policy") else "right")
    for row in rows:
        cells = [f"{row['missed'][m]:.1%} ({row['exits_above'][m]:.2f})" for m in METHODS]
        policy = f"{row['rule']} {row['thresholds'][0]:g}"
        trained = "for a proof" if row["proven"] else "plainly"
        table.add_row(
            str(row["inputs"]),
            trained,
            f"L{row['norm']}",
            policy,
            f"{row['safe']} of {row['samples']}",
            *cells,
        )
    total = sum(row["safe"] for row in rows)
    means = [sum(row["missed"][m] * row["safe"] for row in rows) / total for m in METHODS]
    table.add_row("all", "", "", "", f"{total}", *[f"{mean:.1%}" for mean in means])
    return table


class Static(nn.Module):
    """The trunk and the last head of a network with exits."""

    def __init__(self, net: MultiExit) -> None:
        super().__init__()
        self.stages, self.head = net.stages, net.heads[-1]

    def forward(self, x: Tensor) -> Tensor:
        state: Any = (x,)
        for stage in self.stages:
            state = stage(*state)
            state = state if isinstance(state, tuple) else (state,)
        return self.head(state[0])


def trained() -> MultiExit:
    """digits_small with two linear side exits, each exit with a loss on interval bounds."""
    torch.manual_seed(0)
    train, generator = ss.data.load("digits").train, torch.Generator().manual_seed(0)
    net = ss.attach(ss.models.build("digits_small"), {"2": side(16 * 64), "4": side(32 * 16)})
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    steps = 600
    for step in range(steps):
        x, y = train.batch(torch.randint(len(train), (64,), generator=generator))
        share = min(1.0, step / (0.6 * steps))
        loss = sum_of(net(x), y) + share * sum_of(ss.margins(net, x, y, Ball(1.1 * EPS * share)), y, -1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def side(features: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(features, 10))


def cost(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A record for each method: seconds of each round, with exits and without."""
    if options.run is None:
        net, ball, data = trained(), Ball(EPS), "digits"
    else:
        loaded, config = ss.load(options.run), ss.models.read_config(options.run)
        if not isinstance(loaded, MultiExit):
            raise InputError(f"{options.run} has one exit; a run with several is needed")
        net, ball, data = loaded, Ball(**config["ball"]), config["data"]["name"]
    policy = net.policy
    if options.thresholds is not None:
        policy = Policy("entropy", options.thresholds)
    elif policy is None:
        policy = Policy("entropy", [0.3] * (net.exits - 1))
    test = ss.data.load(data).test
    x, y = test.batch(torch.arange(min(options.samples, len(test))))
    backbone = getattr(net, "backbone", None)
    static = backbone if isinstance(backbone, nn.Module) else Static(net)
    rows = []
    for method in options.methods:

        def with_exits(method: str = method) -> Tensor:
            return ss.certify(net, x, y, ball, policy, method, delta=DELTA).certified

        def alone(method: str = method) -> Tensor:
            return ss.certify(static, x, y, ball, method=method, delta=DELTA).certified

        ours, theirs = Timed(with_exits), Timed(alone)
        for timed in (ours, theirs):
            timed.probe(options.rounds, options.limit)
        in_turn((ours, theirs), options.rounds)
        rows.append(
            {
                "network": str(options.run or "digits_small"), "method": method, "samples": len(x),
                "thresholds": list(policy.thresholds), "seconds": ours.seconds, "static_seconds": theirs.seconds,
                "ratio": ratio(ours, theirs), "goal": GOAL,
                "certified": int(with_exits().sum()), "static_certified": int(alone().sum()),
            }
        )  # fmt: skip
    return rows


def table_of_cost(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Certifying with exits against the static twin", title_justify="left")
    for name in (
        "network",
        "method",
        "thresholds",
        "samples/s",
        "static",
        "ratio",
        "goal",
        "certified",
        "static",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        speeds = [
            f"{row['samples'] / sorted(seconds)[len(seconds) // 2]:.0f}" if seconds else "left out"
            for seconds in (row["seconds"], row["static_seconds"])
        ]
        found = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        thresholds = " ".join(f"{value:g}" for value in row["thresholds"])
        counts = [str(row[key]) for key in ("certified", "static_certified")]
        table.add_row(row["network"], row["method"], thresholds, *speeds, found, f"{row['goal']}", *counts)
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("missed", "cost"))
    parser.add_argument("--run", type=Path, help="a run with exits; only for cost")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--methods", nargs="+", default=["interval", "auto"], choices=METHODS)
    parser.add_argument(
        "--thresholds", nargs="+", type=float, help="of the entropy rule, one for each side exit"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds that a call may take")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write the records")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    console = Console(width=180)
    try:
        if options.what == "missed":
            rows = list(missed(options.samples or 300))
            console.print(table_of_missed(rows))
        else:
            options.samples = options.samples or 512
            rows = cost(options)
            console.print(table_of_cost(rows))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
