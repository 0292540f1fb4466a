"""How images use the exits: shares, multiply-adds, and what an attack on the cost achieves."""

from __future__ import annotations

from typing import Any

import torch

from swiftsure.attacks import SLOWDOWNS, SlowdownResult, run_slowdown
from swiftsure.certificates import certifying
from swiftsure.data.progress import progress
from swiftsure.exits import Answer, MultiExit, paper_macs
from swiftsure.subject import Subject


def parts(
    subject: Subject, clean: Answer, attacked: Answer | None = None, slowed: SlowdownResult | None = None
) -> dict[str, Any]:
    """The "exits" and "macs" of results.json; nothing for one exit.

    Args:
        subject: what was measured.
        clean: the answers on the n clean images.
        attacked: on the worst image of the union of attacks, for each sample.
        slowed: what attacks on the cost forced; each sample counts with its dearest image.
    """
    if subject.exits == 1:
        return {}
    dearest = slowed.dearest if slowed is not None else None
    answers = {"clean": clean, "attacked": attacked, "slowdown": dearest}
    known = {name: answer for name, answer in answers.items() if answer is not None}
    shares = {
        name: (answer.exit.bincount(minlength=subject.exits).double() / len(answer.exit)).tolist()
        for name, answer in known.items()
    }
    paper = torch.tensor(paper_macs(subject.net, subject.images.shape), dtype=torch.float64)
    return {
        "exits": shares,
        "macs": {
            **{name: answer.macs.double().mean().item() for name, answer in known.items()},
            "clean_p95": clean.macs.double().quantile(0.95, interpolation="higher").item(),
            "paper": paper[clean.exit].mean().item(),
        },
    }


def slowed(subject: Subject) -> SlowdownResult | None:
    """Attack the cost of every sample with all of `swiftsure.attacks.SLOWDOWNS`; None for one exit."""
    net = subject.net
    if not isinstance(net, MultiExit) or net.policy is None or subject.exits == 1:
        return None
    x, y = subject.images.batch(slice(None))
    with progress("slow down", subject.n * len(SLOWDOWNS)) as advance, certifying(net):
        done: dict[str, int] = {}

        def step(name: str, count: int, total: int) -> None:
            advance(count - done.get(name, 0))
            done[name] = count

        return run_slowdown(net, x, y, subject.ball, seed=subject.recipe.seed, progress=step)
