"""How images use the exits: shares, multiply-adds, and what an attack on the cost achieves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from swiftsure.exits import Answer, paper_macs
from swiftsure.subject import Subject


def shares(exit: Tensor, exits: int) -> list[float]:
    """The share of samples that leave at each of K exits, given the exit of each, (n,) int64 from 0."""
    return (exit.bincount(minlength=exits).double() / len(exit)).tolist()


def p95(macs: Tensor) -> float:
    """What 95% of samples do not cost more than; macs (n,)."""
    return macs.double().quantile(0.95, interpolation="higher").item()


def parts(
    subject: Subject, clean: Answer, attacked: Answer | None = None, slowed: Answer | None = None
) -> dict[str, Any]:
    """The "exits" and "macs" of results.json; nothing for one exit.

    Args:
        subject: what was measured.
        clean: the answers on the n clean images.
        attacked: on the worst image of the union of attacks, for each sample.
        slowed: on the dearest image that attacks on the cost found, for each sample.
    """
    if subject.exits == 1:
        return {}
    answers = {"clean": clean, "attacked": attacked, "slowdown": slowed}
    known = {name: answer for name, answer in answers.items() if answer is not None}
    paper = torch.tensor(paper_macs(subject.net, subject.images.shape), dtype=torch.float64)
    return {
        "exits": {name: shares(answer.exit, subject.exits) for name, answer in known.items()},
        "macs": {
            **{name: answer.macs.double().mean().item() for name, answer in known.items()},
            "clean_p95": p95(clean.macs),
            "paper": paper[clean.exit].mean().item(),
        },
    }
