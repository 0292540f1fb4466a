"""The attacks on a run: its suite, the guards that judge it, attacks on the cost; as columns and parts of its files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from swiftsure import models, run, usage
from swiftsure.attacks import SLOWDOWNS, SlowdownResult, SuiteResult, attacks_for, run_slowdown, run_suite
from swiftsure.attacks.guards import Guards, guard, not_evaluated
from swiftsure.attacks.questions import CHECKS
from swiftsure.certificates import certifying
from swiftsure.data.progress import progress
from swiftsure.errors import InputError
from swiftsure.exits import Answer, MultiExit, Policy
from swiftsure.modes import channels_last
from swiftsure.samples import Table
from swiftsure.subject import Subject

GUARDS = "guards"
"""What the images that only guards found are called among the attacks."""


@dataclass(frozen=True)
class Attacked:
    """What attacks found.

    Attributes:
        found: by the suite.
        guards: whether that can be believed.
        slowed: by attacks on the cost; None for one exit.
        worst: the deployed network's answers to the worst images.
    """

    found: SuiteResult
    guards: Guards
    slowed: SlowdownResult | None
    worst: Answer


def attack(
    subject: Subject,
    suite: str,
    transfer: Sequence[str | Path] = (),
    guards: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Attacked:
    """Run a suite, its guards and, with several exits, the attacks on the cost.

    All is computed in the precision of the certificates, which hold for sums in any order: an attack in another one
    would break what was never promised.

    Args:
        subject: what is attacked, as it is deployed.
        suite: one of `swiftsure.attacks.SUITE_NAMES`.
        transfer: run directories of other networks for the same images; what breaks them is tried on this one.
        guards: samples that the guards ask about; 0 for no guards.
        clock: what seconds are read from.

    Raises:
        InputError: several exits and no thresholds, or another network that cannot be used.
    """
    sources = _sources(subject, transfer)
    policy = _policy(subject)
    attacks = attacks_for(suite, subject.exits, subject.images.shape[0], policy, sources)
    x, y = subject.images.batch(slice(None))
    seed, judge, net = subject.recipe.seed, subject.judge, subject.net
    deployed: Any = net
    with certifying(net), channels_last(net, x[:2]):
        with _steps("attack", subject.n * len(attacks)) as step:
            found = run_suite(
                net, x, y, subject.ball, suite,
                seed=seed, judge=judge, answer=deployed.adaptive, attacks=attacks, progress=step, clock=clock,
            )  # fmt: skip
        if guards:
            with progress("guards", len(CHECKS)) as advance:
                said = guard(
                    net, x, y, subject.ball, found,
                    policy=policy, sources=sources, samples=guards, seed=seed,
                    progress=lambda _: advance(1), clock=clock,
                )  # fmt: skip
            if said.broken:
                _join(found, said, subject)
        else:
            said = not_evaluated("no guards were asked for")
        slowed = None
        if isinstance(net, MultiExit) and policy is not None:
            with _steps("slow down", subject.n * len(SLOWDOWNS)) as step:
                slowed = run_slowdown(net, x, y, subject.ball, seed=seed, progress=step, clock=clock)
    return Attacked(found, said, slowed, subject.answers(found.worst))


def _join(found: SuiteResult, said: Guards, subject: Subject) -> None:
    """What guards break is broken: it counts in the union, as an attack of the name `GUARDS`."""
    deployed: Any = subject.net
    x, y = subject.images.batch(list(said.broken))
    # By image: of a network that draws random numbers some may be wrong by now, and drop out.
    images = {_bytes(clean): image for clean, image in zip(x, said.broken.values(), strict=True)}

    def replayed(net: nn.Module, x: Tensor, *_: object, **__: object) -> Tensor:
        return torch.stack([images[_bytes(clean)] for clean in x]).to(x)

    more = run_suite(
        deployed, x, y, subject.ball, found.suite,
        batch=len(x), judge=subject.judge, answer=deployed.adaptive, attacks={GUARDS: replayed},
    )  # fmt: skip
    found.join(torch.tensor(list(said.broken)), more)


def _bytes(image: Tensor) -> bytes:
    """What tells an image from all others."""
    return image.cpu().contiguous().numpy().tobytes()


def columns(attacked: Attacked) -> Table:
    """The columns of samples.csv."""
    found = attacked.found
    flags = {f"attack:{name}": broken for name, broken in {**found.broken, "union": found.union}.items()}
    rounded = {**found.broken_8bit, "union": found.union_8bit}
    flags |= {f"attack_8bit:{name}": broken for name, broken in rounded.items()}
    table: Table = {name: broken.numpy().astype(np.int64) for name, broken in flags.items()}
    if attacked.slowed is not None:
        dearest = attacked.slowed.dearest
        costs = list(found.costs.values())
        table["forced_macs"] = torch.stack(costs).amax(0).numpy()
        table |= {"slow_exit": dearest.exit.numpy(), "slow_macs": dearest.macs.numpy()}
    return table


def parts(subject: Subject, attacked: Attacked) -> dict[str, Any]:
    """The parts of results.json, but for those on how exits are used."""
    found, slowed = attacked.found, attacked.slowed
    seconds = dict(found.seconds)
    known: dict[str, Any] = {
        "attacked": {
            "n": subject.n,
            "ball": subject.ball.as_dict(),
            "suite": found.suite,
            "accuracy": found.accuracy,
            "accuracy_8bit": found.accuracy_8bit,
            "guards": attacked.guards.as_dict(),
        }
    }
    if found.accuracy_last:
        known["attacked"]["accuracy_last"] = found.accuracy_last
    if slowed is not None:
        seconds |= slowed.seconds
        costs = found.costs | {name: answer.macs for name, answer in slowed.slowed.items()}
        exits = found.exits | {name: answer.exit for name, answer in slowed.slowed.items()}
        known["macs"] = {
            "by_attack": {name: cost.double().mean().item() for name, cost in costs.items()},
            "slowdown_guard": {"verdict": slowed.guard.verdict, "reason": slowed.guard.reason},
            "p95_by_attack": {name: usage.p95(cost) for name, cost in costs.items()},
        }
        known["exits"] = {
            "by_attack": {name: usage.shares(exit, subject.exits) for name, exit in exits.items()}
        }
    whole = sum(seconds.values())
    known["seconds"] = {"attack": whole, "by_attack": seconds, "guards": attacked.guards.seconds}
    return known


def _policy(subject: Subject) -> Policy | None:
    net = subject.net
    return net.policy if isinstance(net, MultiExit) and subject.exits > 1 else None


def _sources(subject: Subject, folders: Sequence[str | Path]) -> Mapping[str, nn.Module]:
    """Other networks by the names of their runs, known to take the same images.

    Raises:
        InputError: no trained run, or one for other images or classes.
    """
    found: dict[str, nn.Module] = {}
    wanted = (list(subject.images.shape), len(subject.images.classes))
    for folder in map(Path, folders):
        if folder.resolve() == subject.folder.resolve():
            raise InputError(
                f"--transfer {folder} is the run itself; allowed: another network for the same images"
            )
        net = run.read_network(folder, subject.device)
        described = models.read_config(folder).get("model") or {}
        takes = (list(described.get("input_shape", wanted[0])), described.get("classes", wanted[1]))
        if takes != wanted:
            raise InputError(
                f"--transfer {folder} takes images of {takes[0]} in {takes[1]} classes; allowed: a network for "
                f"{wanted[0]} in {wanted[1]}"
            )
        name = folder.resolve().name
        if name in found:
            raise InputError(f"--transfer names two runs {name!r}; allowed: each name once")
        found[name] = net.eval()
    return found


@contextmanager
def _steps(what: str, total: int) -> Iterator[Callable[[str, int, int], None]]:
    """Progress of several attacks on the same samples, one after another."""
    done: dict[str, int] = {}
    with progress(what, total) as advance:

        def step(name: str, count: int, _: int) -> None:
            advance(count - done.get(name, 0))
            done[name] = count

        yield step
