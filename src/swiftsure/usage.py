"""How images use the exits: shares, multiply-adds, and what an attack on the cost achieves."""

from __future__ import annotations

from typing import Any

import torch

from swiftsure.exits import Answer, paper_macs
from swiftsure.subject import Subject


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
