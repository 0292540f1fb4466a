"""Our attacks against torchattacks' and AutoAttack's at the same budget: what each leaves standing, and its seconds.

    python benchmarks/compare_attacks.py [--runs results/*0.1 ...] [--images 1000] [--attacks pgd apgd_ce ...]

torchattacks is looked for as an installed package; AutoAttack as one, and in ../peers/auto-attack beside this
repository. Never needed: what is not there is left out. Ours and theirs run in turn, seed by seed, on the images that
the network gets right; seconds and their ratio are medians. Every adversarial is checked by our ball, and judged by one
fresh pass. Below the table: how many samples a peer's attacks of the table break, with any seed, that ours leave with
all, and the other way round.
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
from statistics import median
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
COLUMNS = ("attack", "ours", "seconds", "peer", "theirs", "seconds", "ours - theirs", "times as long")


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


def standing(net: nn.Module, attack: Attack, x: Tensor, y: Tensor, ball: ss.Ball) -> tuple[Tensor, float]:
    """(n,) bool, which samples the attack leaves; and its seconds."""
    began = CLOCK()
    x_adv = torch.cat([attack(net, *part) for part in zip(x.split(BATCH), y.split(BATCH), strict=True)])
    seconds = CLOCK() - began
    if not bool(ball.contains(x_adv, x, slack=1e-4).all()):
        raise AssertionError("an attack left the ball")
    with torch.no_grad():
        return net(x_adv).argmax(1) == y, seconds


def compare(
    net: nn.Module, x: Tensor, y: Tensor, ball: ss.Ball, options: argparse.Namespace, table: Table
) -> float:
    """Fill the table; the most by which ours was the weaker, in points, on the average of the seeds."""
    with torch.no_grad():
        right = net(x).argmax(1) == y
    total, x, y = len(x), x[right], y[right]
    table.title = f"{table.title}; {total} images, {100 * len(x) / total:.2f}% right without attack"
    every, worst = torch.ones(len(x), dtype=torch.bool), 0.0
    packages = peers(options.peers)
    left_by_ours, left_by_peer = every, dict.fromkeys(packages, every)

    def points(left: Tensor) -> float:
        return 100 * float(left.double().sum(-1).mean()) / total

    for name in options.attacks:
        makers = {"ours": ours} | {
            peer: partial(PEER_ATTACKS[peer], package)
            for peer, package in packages.items()
            if knows(peer, name, ball)
        }
        runs: dict[str, list[tuple[Tensor, float]]] = {who: [] for who in makers}
        for seed in range(options.seeds):
            # One after another, so that other work on the machine slows all of them.
            for who, make in makers.items():
                runs[who].append(standing(net, make(name, ball, options.queries, seed), x, y, ball))
        left = {who: torch.stack([one for one, _ in found]) for who, found in runs.items()}
        seconds = {who: [one for _, one in found] for who, found in runs.items()}
        left_by_ours = left_by_ours & left["ours"].all(0)
        for peer in list(makers)[1:]:
            left_by_peer[peer] = left_by_peer[peer] & left[peer].all(0)
            difference = points(left["ours"]) - points(left[peer])
            worst = max(worst, difference)
            ratios = [one / other for one, other in zip(seconds["ours"], seconds[peer], strict=True)]
            table.add_row(
                name, f"{points(left['ours']):.2f}", f"{median(seconds['ours']):.1f}", f"{peer} {name}",
                f"{points(left[peer]):.2f}", f"{median(seconds[peer]):.1f}", f"{difference:+.2f}",
                f"{median(ratios):.2f}",
            )  # fmt: skip
    said = [f"all of ours leave {points(left_by_ours):.2f}"]
    for peer, its in left_by_peer.items():
        alone, ours_alone = int((left_by_ours & ~its).sum()), int((its & ~left_by_ours).sum())
        said.append(f"{peer} {points(its):.2f}, {alone} broken by it alone, {ours_alone} by ours alone")
    table.caption = "; ".join(said)
    return worst


PEER_ATTACKS: dict[str, Callable[..., Attack]] = {
    "torchattacks": from_torchattacks,
    "autoattack": from_autoattack,
}


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
