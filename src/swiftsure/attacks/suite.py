"""A fixed set of attacks on the same samples, each success checked again, and their per-sample union."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from swiftsure.attacks._eight_bits import eight_bits
from swiftsure.attacks._gradient import GradientReport, assert_inside, at_once, checked_inputs
from swiftsure.attacks._suites import Attack
from swiftsure.attacks.forms import attacks_for
from swiftsure.attacks.objectives import Judge, as_exits, margin, misclassified
from swiftsure.ball import Ball
from swiftsure.errors import InputError, UnsupportedError
from swiftsure.exits.multi_exit import Answer, MultiExit
from swiftsure.modes import evaluating
from swiftsure.precision import in_full_precision

# Called after each batch with the attack's name, the samples done and all samples.
Progress = Callable[[str, int, int], None]


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
            last exit alone would be wrong on the same images (or on x itself); else empty. Where the deployed answer is
            wrong without attack and the last exit's is not, the attack is run against the last exit. It says what the
            other exits cost in robustness, as far as the attacks do not know the policy.
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
    batch: int | None = None,
    seed: int = 0,
    judge: Judge | None = None,
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
        suite: "quick", "standard", "full" or "rdi"; `attacks_for` has the attacks of each.
        batch: how many samples are attacked at a time; None: 500, on a CPU 100, of
            tiny images 500.
        seed: of all random starts.
        judge: what counts as broken, (tuple of logits, y) -> (B,) bool; None: a wrong label, of a `MultiExit` with
            several exits that of the exit that answers, and then `answer` is ``net.adaptive`` where it is None.
        answer: the network as it is deployed, such as ``net.adaptive``: its labels then decide in the fresh pass, and
            its costs are noted. None: the judge decides on the logits of all exits.
        attacks: by name, in place of the suite's; `suite` is then what the result is called.
        progress: called after each batch with (attack name, samples done, n).
        clock: what seconds are read from.

    Raises:
        InputError: unknown suite, no samples, a batch below 1, images or labels that do not fit, options that an
            attack refuses, or several exits without thresholds and no judge.
        UnsupportedError: no attack can read the network. If some can, the others are in `skipped`.
    """
    x, y = checked_inputs(net, x, y, ball)
    if len(x) == 0:
        raise InputError("there is no sample to attack; at least 1 is needed")
    device = next((parameter.device for parameter in net.parameters()), x.device)
    batch = at_once(batch, x, device)
    exits, policy = getattr(net, "exits", 1), getattr(net, "policy", None)
    if judge is None:
        judge = misclassified
        if isinstance(net, MultiExit) and exits > 1:
            if policy is None:
                raise InputError(
                    f"the network has {exits} exits and no thresholds; set net.policy, or pass a judge, such as "
                    "swiftsure.attacks.misclassified for the last exit"
                )
            judge, answer = policy.misclassified, answer or net.adaptive
    if attacks is None:
        attacks = attacks_for(suite, exits, x.shape[1], None if judge is misclassified else policy)
    starts = range(0, len(x), batch)
    several = answer is not None and exits > 1

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

    def attempt(attack: Attack, index: Tensor, judge: Judge, stream: str, report: GradientReport) -> _Tried:
        """One batch, judged; random starts come from that stream."""
        clean, labels = x[index.to(x.device)].to(device), y[index.to(y.device)].to(device)
        generator = torch.Generator().manual_seed(zlib.crc32(stream.encode()))
        # A copy: what an attack writes into its input must not become what it is held against.
        x_adv = attack(net, clean.clone(), labels, ball, judge=judge, generator=generator, report=report)
        found = verdict(assert_inside(x_adv, clean, ball), labels)
        rounded, inside = eight_bits(x_adv, clean, ball)
        # An image that was rounded out of the ball is no image of it, however wrong.
        return _Tried(x_adv.cpu(), found, rounded.cpu(), verdict(rounded, labels), inside.cpu())

    # Copies: a network that normalises in place would write into the caller's images.
    before = [verdict(x[i : i + batch].to(device, copy=True), y[i : i + batch].to(device)) for i in starts]
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
            part, stream = slice(start, start + batch), f"{seed} {name} {start}"
            try:
                if len(index := start + (~wrong[part]).nonzero().squeeze(1)):
                    tried = attempt(attack, index, judge, stream, report)
                    found, found_8bit, inside = tried.found, tried.found_8bit, tried.inside
                    broken_8bit[index] = found_8bit.broken & inside
                    broken[index] = found.broken | broken_8bit[index]
                    if several:
                        broken_last[index] |= tried.broken_last
                    if found.macs is not None and found.exit is not None:
                        macs[index], exit[index] = found.macs, found.exit
                    worst.offer(index, tried.images, found)
                    worst.offer(index[inside], tried.rounded[inside], found_8bit.where(inside))
                # What is wrong as it is deployed has not been attacked; its last exit may be right, and breakable.
                if several and len(
                    index := start + (wrong & ~result.misclassified_last)[part].nonzero().squeeze(1)
                ):
                    tried = attempt(attack, index, misclassified, f"{stream} last", GradientReport())
                    broken_last[index] |= tried.broken_last
            except UnsupportedError as error:
                result.skipped[name] = str(error)
                break
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
class _Tried:
    """What an attack made of a batch, and what fresh passes say of it; on the CPU."""

    images: Tensor
    """(B, C, H, W)."""
    found: _Verdict
    rounded: Tensor
    """The same with pixels of 8 bits."""
    found_8bit: _Verdict
    inside: Tensor
    """(B,) bool, whether the rounded image is in the ball."""

    @property
    def broken_last(self) -> Tensor:
        """(B,) bool, whether the last exit is wrong on either; for networks with several."""
        assert self.found.last is not None and self.found_8bit.last is not None
        return self.found.last | (self.found_8bit.last & self.inside)


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
