"""A fixed set of attacks on the same samples, each success checked again, and their per-sample union."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from swiftsure.attacks._apgd import apgd, apgd_targeted
from swiftsure.attacks._eight_bits import eight_bits
from swiftsure.attacks._fab import fab_targeted
from swiftsure.attacks._fgsm import fgsm
from swiftsure.attacks._gradient import GradientReport, assert_inside, check_count, checked_inputs
from swiftsure.attacks._interval import interval_attack
from swiftsure.attacks._pgd import pgd
from swiftsure.attacks._square import square
from swiftsure.attacks.objectives import Judge, as_exits, dlr, margin, misclassified
from swiftsure.ball import Ball
from swiftsure.errors import InputError, UnsupportedError
from swiftsure.exits.multi_exit import Answer
from swiftsure.modes import evaluating
from swiftsure.precision import in_full_precision

# An entry of a suite: (net, x, y, ball, *, judge, generator, report) -> adversarial images shaped like x.
Attack = Callable[..., Tensor]
# Called after each batch with the attack's name, the samples done and all samples.
Progress = Callable[[str, int, int], None]


def _apgd_ce(net: nn.Module, x: Tensor, y: Tensor, ball: Ball, **options: Any) -> Tensor:
    """In L1 with five restarts, as in AutoAttack: there much hangs on the start."""
    return apgd(net, x, y, ball, restarts=5 if ball.norm == "1" else 1, **options)


_QUICK: dict[str, Attack] = {"fgsm": fgsm, "pgd40": partial(pgd, steps=40)}
_STANDARD: dict[str, Attack] = {
    **_QUICK,
    "apgd_ce": _apgd_ce,
    "apgd_t": apgd_targeted,
    "fab_t": fab_targeted,
    "square5000": partial(square, steps=5000),
}
# Names are part of results.json and samples.csv: the method, its steps where they are not AutoAttack's, x<restarts>,
# and the objective where there is a choice.
SUITES: dict[str, dict[str, Attack]] = {
    "quick": _QUICK,
    "standard": _STANDARD,
    "full": {
        **_STANDARD,
        "pgd200x10": partial(pgd, steps=200, restarts=10),
        "pgd200x10_margin": partial(pgd, steps=200, restarts=10, objective=margin),
        "apgd_cex5": partial(apgd, restarts=5),
        "fab_tx3": partial(fab_targeted, restarts=3),
        "apgd_dlrx5": partial(apgd, restarts=5, objective=dlr),
        "apgd_marginx5": partial(apgd, restarts=5, objective=margin),
        "interval40x5": partial(interval_attack, steps=40, restarts=5),
    },
}
"""The attacks of each suite, all on all samples that are right without attack: the figure of each is its own.

standard: AutoAttack's four, apgd-ce (100 steps; in L1 five restarts), apgd-t and fab-t (100 steps towards each of nine
classes) and square (5,000 queries), and two plain gradient attacks. full: many restarts and other losses, and the
interval attack where bounds can read the network.
"""


@dataclass
class SuiteResult:
    """What a suite found on n samples; all tensors on the CPU.

    Attributes:
        suite: its name.
        ball: the threat model.
        misclassified: (n,) bool, wrong without any attack; these count as broken by every attack, as x itself
            lies in the ball, and are not attacked.
        broken: per attack name, (n,) bool.
        broken_8bit: per attack name, (n,) bool: whether the attack's image breaks the sample once its pixels are
            rounded to multiples of 1/255. Such an image lies in the ball, so `broken` holds these as well.
        worst: (n, C, H, W), the most harmful image found per sample: a broken one before any other, then the
            largest margin of a wrong class at the exit that answers; x itself where nothing was worse.
        seconds: per attack name, on all samples, checks included.
        gradients: per attack name, what its gradients were worth.
        exits: per attack name, (n,) int64, by which exit, from 0, its image of each sample leaves; empty where
            `run_suite` was not given what answers.
        costs: the same for multiply-adds.
        misclassified_last: (n,) bool, whether the last exit alone is wrong without attack; empty where not known.
        broken_last: of networks with several exits that answer by a policy: per attack name, (n,) bool, whether the
            last exit alone would be wrong on the same images (or on x itself); else empty. It says what the other exits
            cost in robustness, as far as the attacks do not know the policy.
        skipped: per attack name, why it could not be run on this network; such an attack has no other entry.
    """

    suite: str
    ball: Ball
    misclassified: Tensor
    worst: Tensor
    broken: dict[str, Tensor] = field(default_factory=dict)
    broken_8bit: dict[str, Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, GradientReport] = field(default_factory=dict)
    exits: dict[str, Tensor] = field(default_factory=dict)
    costs: dict[str, Tensor] = field(default_factory=dict)
    misclassified_last: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    broken_last: dict[str, Tensor] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def join(self, index: Tensor, more: SuiteResult) -> None:
        """Add what other attacks found on some of the samples; on the rest they count as having found nothing.

        Exits, costs and seconds of those attacks are not noted.

        Args:
            index: (m,), the places of those samples.
            more: what was found on them, (m,).
        """
        new = more.union & ~self.union[index]
        self.worst[index[new]] = more.worst[new]
        for name in more.broken:
            self.broken[name] = self.misclassified.index_copy(0, index, more.broken[name])
            self.broken_8bit[name] = self.misclassified.index_copy(0, index, more.broken_8bit[name])
            if name in more.broken_last:
                self.broken_last[name] = self.misclassified_last.index_copy(0, index, more.broken_last[name])

    @property
    def n(self) -> int:
        """How many samples were passed."""
        return len(self.misclassified)

    @property
    def union(self) -> Tensor:
        """Whether any attack broke each sample: (n,) bool."""
        return torch.stack([self.misclassified, *self.broken.values()]).any(0)

    @property
    def union_8bit(self) -> Tensor:
        """Whether any attack broke each sample with an image of 8 bits: (n,) bool."""
        return torch.stack([self.misclassified, *self.broken_8bit.values()]).any(0)

    @property
    def macs(self) -> dict[str, float]:
        """Mean multiply-adds per attack, where they are known."""
        return {name: cost.double().mean().item() for name, cost in self.costs.items()}

    @property
    def accuracy(self) -> dict[str, float]:
        """Robust accuracy per attack name and for their "union", fractions of n."""
        return _left({**self.broken, "union": self.union})

    @property
    def accuracy_last(self) -> dict[str, float]:
        """What the last exit alone would get right of the same images; empty where that is not known."""
        if not self.broken_last:
            return {}
        return _left({**self.broken_last, "union": torch.stack([*self.broken_last.values()]).any(0)})

    @property
    def accuracy_8bit(self) -> dict[str, float]:
        """The same against images of 8 bits."""
        return _left({**self.broken_8bit, "union": self.union_8bit})


def _left(broken: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float((~flags).double().mean()) for name, flags in broken.items()}


@in_full_precision
def run_suite(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    suite: str = "quick",
    *,
    batch: int = 500,
    seed: int = 0,
    judge: Judge = misclassified,
    answer: Callable[[Tensor], Answer] | None = None,
    attacks: Mapping[str, Attack] | None = None,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> SuiteResult:
    """Attack all samples with every attack of a suite.

    A sample counts as broken only by a fresh forward pass over the finished image in evaluation mode, and every
    finished image must lie in the ball and the pixel range. Then its pixels are rounded to 8 bits, as a file would
    hold it, and it is judged once more. All of it in full precision: no autocast, no TF32. Each attack draws from
    generators of its own, seeded by `seed`, its name and the batch: what it finds does not depend on the suite's other
    attacks.

    Args:
        net: returns logits (B, classes), or a tuple of them, one per exit; its modes are left as found.
        x: images, (n, C, H, W), n >= 1, on any device; batches move to the network's.
        y: labels, (n,), integers.
        ball: the threat model.
        suite: "quick", "standard" or "full"; `SUITES` names the attacks of each.
        batch: how many samples are attacked at a time.
        seed: of all random starts.
        judge: what counts as broken, (tuple of logits, y) -> (B,) bool; by default the last exit's label.
        answer: the network as it is deployed, such as ``net.adaptive``: its labels then decide in the fresh pass, and
            its costs are noted. None: the judge decides on the logits of all exits.
        attacks: by name, in place of those of `SUITES`; `suite` is then what the result is called.
        progress: called after each batch with (attack name, samples done, n).
        clock: what seconds are read from.

    Raises:
        InputError: unknown suite, no samples, a batch below 1, images or labels that do not fit, or options that an
            attack refuses.
        UnsupportedError: no attack can read the network. If some can, the others are in `skipped`.
    """
    if attacks is None:
        if suite not in SUITES:
            raise InputError(
                f"suite is {suite!r}; allowed: {', '.join(SUITES)}, or any name with attacks=attacks_for(...)"
            )
        attacks = SUITES[suite]
    check_count("batch", batch, 1)
    x, y = checked_inputs(net, x, y, ball)
    if len(x) == 0:
        raise InputError("there is no sample to attack; at least 1 is needed")
    device = next((parameter.device for parameter in net.parameters()), x.device)
    starts = range(0, len(x), batch)
    several = answer is not None and getattr(net, "exits", 1) > 1

    def verdict(images: Tensor, labels: Tensor) -> _Verdict:
        """One fresh forward pass."""
        with evaluating(net), torch.no_grad():
            if answer is not None:
                found = _Verdict.of(answer(images), labels)
                if several:
                    found.last = misclassified(as_exits(net(images)), labels).cpu()
                return found
            logits = as_exits(net(images))
            return _Verdict(judge(logits, labels).cpu(), margin(logits, labels).cpu())

    before = [verdict(x[i : i + batch].to(device), y[i : i + batch].to(device)) for i in starts]
    wrong = torch.cat([part.broken for part in before])
    clean_macs = torch.cat([part.macs for part in before if part.macs is not None] or [torch.empty(0)])
    clean_exit = torch.cat([part.exit for part in before if part.exit is not None] or [torch.empty(0)])
    result = SuiteResult(suite, ball, wrong, x.cpu().clone())
    if several:
        result.misclassified_last = torch.cat([part.last for part in before if part.last is not None])
    worst = _Worst(result.worst, wrong.clone(), torch.cat([part.margin for part in before]))
    for name, attack in attacks.items():
        began = clock()
        report, broken, broken_8bit = GradientReport(), wrong.clone(), wrong.clone()
        macs, exit, broken_last = clean_macs.clone(), clean_exit.clone(), result.misclassified_last.clone()
        for start in starts:
            index = start + (~wrong[start : start + batch]).nonzero().squeeze(1)
            if len(index):
                clean, labels = x[index.to(x.device)].to(device), y[index.to(y.device)].to(device)
                generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name} {start}".encode()))
                try:
                    # A copy: what an attack writes into its input must not become what it is held against.
                    x_adv = attack(
                        net, clean.clone(), labels, ball, judge=judge, generator=generator, report=report
                    )
                except UnsupportedError as error:
                    result.skipped[name] = str(error)
                    break
                found = verdict(assert_inside(x_adv, clean, ball), labels)
                rounded, inside = eight_bits(x_adv, clean, ball)
                found_8bit = verdict(rounded, labels)
                found_8bit.broken &= inside.cpu()
                broken[index], broken_8bit[index] = found.broken | found_8bit.broken, found_8bit.broken
                if found.last is not None and found_8bit.last is not None:
                    broken_last[index] |= found.last | (found_8bit.last & inside.cpu())
                if found.macs is not None and found.exit is not None:
                    macs[index], exit[index] = found.macs, found.exit
                worst.offer(index, x_adv.cpu(), found)
                # An image that was rounded out of the ball is no image of it, however wrong.
                worst.offer(index[inside.cpu()], rounded[inside].cpu(), found_8bit.where(inside.cpu()))
            if progress is not None:
                progress(name, min(start + batch, len(x)), len(x))
        if name in result.skipped:
            if progress is not None:
                progress(name, len(x), len(x))
            continue
        result.broken[name], result.broken_8bit[name], result.gradients[name] = broken, broken_8bit, report
        if len(broken_last):
            result.broken_last[name] = broken_last
        if len(macs):
            result.costs[name], result.exits[name] = macs, exit
        result.seconds[name] = clock() - began
    if attacks and not result.broken:
        raise UnsupportedError(f"no attack of the suite can read this network: {result.skipped}")
    return result


@dataclass
class _Verdict:
    """What a fresh pass says of some images; on the CPU."""

    broken: Tensor
    """(B,) bool."""
    margin: Tensor
    """(B,), of the worst wrong class."""
    macs: Tensor | None = None
    """(B,), multiply-adds, where they are known."""
    exit: Tensor | None = None
    """(B,), by which each sample left, where that is known."""
    last: Tensor | None = None
    """(B,) bool, whether the last exit is wrong, where there are others."""

    @classmethod
    def of(cls, answer: Answer, labels: Tensor) -> _Verdict:
        """A wrong label breaks a sample; an answer with a NaN is no answer."""
        broken = (answer.label != labels) | answer.logits.isnan().any(1)
        return cls(broken.cpu(), margin((answer.logits,), labels).cpu(), answer.macs.cpu(), answer.exit.cpu())

    def where(self, some: Tensor) -> _Verdict:
        """Of some of the images, (B,) bool."""
        return _Verdict(self.broken[some], self.margin[some])


@dataclass
class _Worst:
    """The most harmful image of each sample so far: images (n, C, H, W), whether broken, and its margin."""

    images: Tensor
    broken: Tensor
    margin: Tensor

    def offer(self, index: Tensor, images: Tensor, found: _Verdict) -> None:
        """Keep those of some samples' images that are worse than what is there."""
        there, margin = self.broken[index], self.margin[index]
        worse = (found.broken & ~there) | ((found.broken == there) & (found.margin > margin))
        self.images[index[worse]], self.margin[index[worse]] = images[worse], found.margin[worse]
        self.broken[index] |= found.broken
