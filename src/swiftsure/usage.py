"""How images use the exits: shares, multiply-adds, and what an attack on the cost achieves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from swiftsure.attacks import Judge, Objective, above_thresholds, deepsloth, delayed, never, pgd
from swiftsure.certificates import certifying
from swiftsure.data.progress import progress
from swiftsure.exits import Answer, MultiExit, paper_macs
from swiftsure.subject import BATCH, Subject

_STEPS = 40


def parts(
    subject: Subject, clean: Answer, attacked: Answer | None = None, slowed: Answer | None = None
) -> dict[str, Any]:
    """The "exits" and "macs" of results.json; nothing for one exit.

    Args:
        subject: what was measured.
        clean: the answers on the n clean images.
        attacked: on the worst image of the union of attacks, for each sample.
        slowed: on images made to be slow.
    """
    if subject.exits == 1:
        return {}
    answers = {"clean": clean, "attacked": attacked, "slowdown": slowed}
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


def slowed(subject: Subject, clean: Answer) -> Answer | None:
    """Attack the cost: keep every image of the ball inside as long as PGD can; None for one exit.

    Each sample keeps the dearer of its clean and its slowed image. With entropy each side exit is pushed just above its
    own threshold, with confidence towards uniform answers (DeepSloth).

    Args:
        subject: what is measured.
        clean: the answers on the clean images.
    """
    net = subject.net
    if not isinstance(net, MultiExit) or net.policy is None or subject.exits == 1:
        return None
    objective: Objective = deepsloth
    judge: Judge = never
    if net.policy.rule == "entropy":
        objective = above_thresholds(net.policy.thresholds)
        judge = delayed(net.policy.thresholds)
    generator = torch.Generator().manual_seed(subject.recipe.seed)
    found: list[Tensor] = []
    with progress("slow down", subject.n) as advance, certifying(net):
        for start in range(0, subject.n, BATCH):
            x, y = subject.images.batch(slice(start, start + BATCH), subject.device)
            slow = pgd(
                net, x, y, subject.ball, objective=objective, judge=judge, steps=_STEPS, generator=generator
            )
            found.append(slow.cpu())
            advance(len(x))
    answer = subject.answers(torch.cat(found))
    dearer = answer.macs > clean.macs
    return Answer(
        label=answer.label.where(dearer, clean.label),
        exit=answer.exit.where(dearer, clean.exit),
        macs=answer.macs.where(dearer, clean.macs),
        logits=answer.logits.where(dearer[:, None], clean.logits),
    )
