"""Our attacks against torchattacks' and AutoAttack's at the same budget: what each leaves standing, and its seconds.

    python benchmarks/compare_attacks.py [--runs results/*0.1 ...] [--images 1000] [--attacks pgd apgd_ce ...]

torchattacks is looked for as an installed package; AutoAttack as one, and in ../peers/auto-attack beside this
repository. Never needed: what is not there is left out. Each pair is attacked in turn, on the images that the network
gets right; every adversarial is checked by our ball, and judged by one fresh pass. Below the table: how many samples a
peer's attacks of the table break, with any seed, that ours leave with all, and the other way round.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import swiftsure as ss
from swiftsure import attacks
from swiftsure.errors import InputError

BESIDE = Path(__file__).resolve().parents[2] / "peers" / "auto-attack"
TOLERANCE = 0.3
"""Points by which ours may be the weaker, on the average of the seeds: one run's random start is worth as much."""
BATCH = 500
CLOCK = time.process_time
"""This process's own seconds, on one thread: other work beside it does not count."""
NORMS = {"inf": "Linf", "2": "L2", "1": "L1"}
PGD_STEPS, STEPS, TARGETS = 40, 100, 9

# (network, images, labels) -> adversarial images.
Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]
RUNS = [Path("results/mnist_small_mixtrain_0.1"), Path("results/mnist_small_mixtrain_0.3")]
NAMES = ("pgd", "apgd_ce", "apgd_dlr", "apgd_t", "fab_t", "square")
PEERS = ("torchattacks", "autoattack")
COLUMNS = ("attack", "ours", "seconds", "peer", "theirs", "seconds", "ours - theirs")


def peers(wanted: list[str]) -> dict[str, ModuleType]:
    """Those of the packages that are there."""
    if str(BESIDE) not in sys.path:
        sys.path.append(str(BESIDE))
    found = {}
    for name in wanted:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found[name] = importlib.import_module(name)
            except ImportError:
                continue
    return found


def ours(name: str, ball: ss.Ball, queries: int, seed: int) -> Attack:
    """Our attack of that name."""
    generator = torch.Generator().manual_seed(seed)
    calls: dict[str, Callable[..., Tensor]] = {
        "pgd": partial(attacks.pgd, steps=PGD_STEPS, step_size=pgd_step(ball)),
        "apgd_ce": partial(attacks.apgd, steps=STEPS),
        "apgd_dlr": partial(attacks.apgd, steps=STEPS, objective=attacks.dlr),
        "apgd_t": partial(attacks.apgd_targeted, steps=STEPS, targets=TARGETS),
        "fab_t": partial(attacks.fab_targeted, steps=STEPS, targets=TARGETS),
        "square": partial(attacks.square, steps=queries),
    }
    return lambda net, x, y: calls[name](net, x, y, ball, generator=generator)


def pgd_step(ball: ss.Ball) -> float:
    """The same step for both: a whole path of 2.5 eps in L-inf, as published for 40 steps."""
    return 2.5 * ball.radius / PGD_STEPS


def from_torchattacks(package: ModuleType, name: str, ball: ss.Ball, queries: int, seed: int) -> Attack:
    """The same attack of torchattacks."""
    common = {"eps": ball.radius, "norm": NORMS[ball.norm], "seed": seed}

    def build(net: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        made: Callable[[Tensor, Tensor], Tensor]
        if name == "pgd":
            made = package.PGD(net, ball.radius, pgd_step(ball), PGD_STEPS, random_start=True)
        elif name == "apgd_t":
            made = package.APGDT(net, steps=STEPS, n_classes=TARGETS + 1, **common)
        elif name == "square":
            made = package.Square(net, n_queries=queries, **common)
        else:
            made = package.APGD(net, steps=STEPS, loss="dlr" if name == "apgd_dlr" else "ce", **common)
        return made

    def attack(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        torch.manual_seed(seed)
        return build(net)(x, y)

    return attack


def from_autoattack(package: ModuleType, name: str, ball: ss.Ball, queries: int, seed: int) -> Attack:
    """The same attack of AutoAttack, with the settings of its standard version."""

    def attack(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        whole = package.AutoAttack(
            net, norm=NORMS[ball.norm], eps=ball.radius, seed=seed, verbose=False, device=str(x.device)
        )
        whole.apgd.use_largereps = whole.apgd_targeted.use_largereps = ball.norm == "1"
        whole.apgd.n_restarts, whole.apgd.n_iter = 1, STEPS
        whole.apgd.loss = "dlr" if name == "apgd_dlr" else "ce"
        whole.apgd_targeted.n_restarts, whole.apgd_targeted.n_iter = 1, STEPS
        whole.apgd_targeted.n_target_classes = whole.fab.n_target_classes = TARGETS
        whole.fab.n_restarts, whole.fab.targeted = 1, True
        whole.square.n_queries = queries
        for one in (whole.apgd, whole.apgd_targeted, whole.fab, whole.square):
            one.seed = seed
        chosen = {"apgd_t": whole.apgd_targeted, "square": whole.square, "fab_t": whole.fab}.get(
            name, whole.apgd
        )
        adversarial: Tensor = chosen.perturb(x, y)
        # FAB looks for the nearest adversarial, wherever it lies.
        outside = ~ball.contains(adversarial, x, slack=1e-4)
        adversarial[outside] = x[outside]
        return adversarial

    return attack


def standing(
    net: nn.Module, attack: Callable[[int], Attack], x: Tensor, y: Tensor, ball: ss.Ball, seeds: int
) -> tuple[Tensor, float]:
    """(seeds, n) bool, which samples the attack leaves with each seed; and its seconds for one."""
    left, seconds = [], 0.0
    for seed in range(seeds):
        began = CLOCK()
        parts = zip(x.split(BATCH), y.split(BATCH), strict=True)
        x_adv = torch.cat([attack(seed)(net, *part) for part in parts])
        seconds += CLOCK() - began
        if not bool(ball.contains(x_adv, x, slack=1e-4).all()):
            raise AssertionError("an attack left the ball")
        with torch.no_grad():
            left.append(net(x_adv).argmax(1) == y)
    return torch.stack(left), seconds / seeds


def compare(
    net: nn.Module, x: Tensor, y: Tensor, ball: ss.Ball, options: argparse.Namespace, table: Table
) -> float:
    """Fill the table; the most by which ours was the weaker, in points, on the average of the seeds."""
    with torch.no_grad():
        right = net(x).argmax(1) == y
    total, x, y = len(x), x[right], y[right]
    table.title = f"{table.title}; {total} images, {100 * len(x) / total:.2f}% right without attack"
    every, worst = torch.ones(len(x), dtype=torch.bool), 0.0
    left_by_ours, left_by_peer = every, dict.fromkeys(peers(options.peers), every)
    makers = {"torchattacks": from_torchattacks, "autoattack": from_autoattack}

    def points(left: Tensor) -> float:
        return 100 * float(left.double().sum(-1).mean()) / total

    for name in options.attacks:
        left, seconds = standing(net, partial(ours, name, ball, options.queries), x, y, ball, options.seeds)
        left_by_ours = left_by_ours & left.all(0)
        for peer, package in peers(options.peers).items():
            if not knows(peer, name, ball):
                continue
            make = partial(makers[peer], package, name, ball, options.queries)
            their, their_seconds = standing(net, make, x, y, ball, options.seeds)
            left_by_peer[peer] = left_by_peer[peer] & their.all(0)
            difference = points(left) - points(their)
            worst = max(worst, difference)
            table.add_row(
                name, f"{points(left):.2f}", f"{seconds:.1f}",
                f"{peer} {name}", f"{points(their):.2f}", f"{their_seconds:.1f}", f"{difference:+.2f}",
            )  # fmt: skip
    said = [f"all of ours leave {points(left_by_ours):.2f}"]
    for peer, left in left_by_peer.items():
        alone, ours_alone = int((left_by_ours & ~left).sum()), int((left & ~left_by_ours).sum())
        said.append(f"{peer} {points(left):.2f}, {alone} broken by it alone, {ours_alone} by ours alone")
    table.caption = "; ".join(said)
    return worst


def knows(peer: str, name: str, ball: ss.Ball) -> bool:
    """Whether a peer has that attack in that norm."""
    if peer == "autoattack":
        return name != "pgd"
    return ball.norm != "1" and name != "fab_t" and (name != "pgd" or ball.norm == "inf")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Our attacks against torchattacks' and AutoAttack's.")
    parser.add_argument("--runs", nargs="*", type=Path, default=RUNS, help="run directories")
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--eps", help="default: the run's own")
    parser.add_argument("--norm", default="inf", choices=list(NORMS))
    parser.add_argument("--attacks", nargs="*", default=list(NAMES), choices=NAMES)
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument("--queries", type=int, default=5000, help="of square")
    parser.add_argument(
        "--seeds", type=int, default=3, help="runs of each attack, of which the mean is compared"
    )
    return parser.parse_args()


def main() -> int:
    options = read_options()
    torch.set_num_threads(1)
    if not peers(options.peers):
        print(f"{' and '.join(options.peers)} cannot be imported; nothing to compare")
        return 0
    console, worst = Console(width=130), 0.0
    try:
        x, y = ss.data.load(options.data).test.batch(slice(0, options.images))
        for run in options.runs:
            net, own = ss.load(run), ss.models.read_config(run)["ball"]["eps"]
            ball = ss.Ball(options.eps or own, options.norm)
            table = Table(title=f"{run.name}, L{options.norm}, eps {ball.radius:g}")
            for column in COLUMNS:
                table.add_column(column)
            worst = max(worst, compare(net, x, y, ball, options, table))
            console.print(table)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console.print(f"ours was the weaker by {worst:.2f} points at most; allowed: {TOLERANCE}")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    raise SystemExit(main())
