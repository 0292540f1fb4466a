"""Attacks on the cost of a network with several exits, judged by the multiply-adds that they force."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from swiftsure.attacks._apgd import apgd
from swiftsure.attacks._gradient import assert_inside, at_once, checked_inputs
from swiftsure.attacks._square import square
from swiftsure.attacks._suites import Attack
from swiftsure.attacks.questions import NEW, NOT_EVALUATED, RELIABLE, SUSPICIOUS, Check
from swiftsure.attacks.slowdown import above_thresholds, deepsloth, delayed, one_by_one
from swiftsure.attacks.suite import Progress
from swiftsure.ball import Ball
from swiftsure.errors import InputError
from swiftsure.exits.multi_exit import Answer, MultiExit
from swiftsure.exits.policies import Policy
from swiftsure.precision import in_full_precision

SLOWDOWNS = ("deepsloth", "above_thresholds", "one_by_one", "one_by_onex5", "square1000")
"""Their names, which are part of results.json."""
_QUERIES = SLOWDOWNS[-1]


@dataclass
class SlowdownResult:
    """What was forced on n samples; all tensors on the CPU.

    Attributes:
        ball: the threat model.
        clean: the answers on the clean images.
        slowed: per attack name, the answers on the images that it made.
        seconds: per attack name, on all samples.
        images: (n, C, H, W), of each sample the dearest image found, x itself where nothing was dearer.
    """

    ball: Ball
    clean: Answer
    images: Tensor
    slowed: dict[str, Answer] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def guard(self) -> Check:
        """Suspicious where queries force more than all gradients do: on more than 1% of the samples."""
        if _QUERIES not in self.slowed or len(self.slowed) == 1:
            return Check(NOT_EVALUATED, f"it needs {_QUERIES} and an attack by gradients")
        by_gradients = torch.stack([answer.macs for name, answer in self.slowed.items() if name != _QUERIES])
        left = torch.maximum(by_gradients.amax(0), self.clean.macs)
        new = int((self.slowed[_QUERIES].macs > left).sum())
        reason = f"{_QUERIES} makes {new or 'none'} of {len(left)} samples dearer than gradients did"
        return Check(SUSPICIOUS if new > max(1, NEW * len(left)) else RELIABLE, reason)

    @property
    def dearest(self) -> Answer:
        """Of each sample the dearest answer: the clean one, or one that an attack forced."""
        best = self.clean
        for one in self.slowed.values():
            best = _dearer(one, best)
        return best


def slowdown_attacks(policy: Policy, steps: int = 100) -> dict[str, Attack]:
    """The attacks of `SLOWDOWNS`; each rests on a sample once all its side exits are silent.

    APGD on each slowdown objective from the image itself, on the last one from five random starts as well, and 1,000
    queries of square on it, which need no gradient.
    """
    judge = delayed(policy)
    objectives = {
        "deepsloth": deepsloth,
        "above_thresholds": above_thresholds(policy),
        "one_by_one": one_by_one(policy),
    }
    attacks: dict[str, Attack] = {
        name: partial(apgd, objective=objective, judge=judge, steps=steps, random_start=False)
        for name, objective in objectives.items()
    }
    climbs = objectives["one_by_one"]
    attacks["one_by_onex5"] = partial(apgd, objective=climbs, judge=judge, steps=steps, restarts=5)
    attacks["square1000"] = partial(square, objective=climbs, judge=judge, steps=10 * steps)
    return attacks


@in_full_precision
def run_slowdown(
    net: MultiExit,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    policy: Policy | None = None,
    *,
    attacks: Mapping[str, Attack] | None = None,
    steps: int = 100,
    batch: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> SlowdownResult:
    """Attack the cost of all samples with every slowdown attack.

    What an image costs is what a fresh `net.adaptive` pass over it says; every image must lie in the ball and the
    pixel range. Samples that are wrong as they are take part as well: they cost no less.

    Args:
        net: with several exits; its modes are left as found.
        x: images, (n, C, H, W), n >= 1, on any device; batches move to the network's.
        y: labels, (n,), integers.
        ball: the threat model.
        policy: when inputs leave; None: ``net.policy``.
        attacks: by name; None: `slowdown_attacks` of the policy and the steps.
        steps: of each gradient attack; square has ten times as many queries.
        batch: how many samples are attacked at a time; None: 500, on a CPU 100, of
            tiny images 500.
        seed: of random starts.
        progress: called after each batch with (attack name, samples done, n).
        clock: what seconds are read from.

    Raises:
        InputError: no policy, one of another number of exits, no samples, or images or labels that do not fit.
    """
    policy = policy if policy is not None else net.policy
    if policy is None:
        raise InputError("the network has no thresholds; set net.policy, or pass policy=")
    policy.require(net.exits)
    x, y = checked_inputs(net, x, y, ball)
    if len(x) == 0:
        raise InputError("there is no sample to attack; at least 1 is needed")
    device = next((parameter.device for parameter in net.parameters()), x.device)
    batch = at_once(batch, x, device)
    starts = range(0, len(x), batch)

    def answers(images: Tensor) -> Answer:
        return _on_cpu([net.adaptive(images[start : start + batch].to(device), policy) for start in starts])

    result = SlowdownResult(ball, answers(x), x.cpu().clone())
    for name, attack in (slowdown_attacks(policy, steps) if attacks is None else attacks).items():
        began, found = clock(), []
        for start in starts:
            images, labels = (t[start : start + batch].to(device) for t in (x, y))
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name} {start}".encode()))
            found.append(
                assert_inside(
                    attack(net, images.clone(), labels, ball, generator=generator), images, ball
                ).cpu()
            )
            if progress is not None:
                progress(name, start + len(images), len(x))
        x_adv = torch.cat(found)
        answer, dearest = answers(x_adv), result.dearest
        dearer = answer.macs > dearest.macs
        result.images[dearer] = x_adv[dearer]
        result.slowed[name] = answer
        result.seconds[name] = clock() - began
    return result


def _dearer(one: Answer, other: Answer) -> Answer:
    """Of each sample the answer that cost more; the other's where they cost the same."""
    more = one.macs > other.macs
    return Answer(
        label=one.label.where(more, other.label),
        exit=one.exit.where(more, other.exit),
        macs=one.macs.where(more, other.macs),
        logits=one.logits.where(more[:, None], other.logits),
    )


def _on_cpu(parts: list[Answer]) -> Answer:
    columns = ("label", "exit", "macs", "logits")
    return Answer(**{name: torch.cat([getattr(part, name) for part in parts]).cpu() for name in columns})
