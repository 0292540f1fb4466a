"""The questions that guards ask: each of a few hundred samples, each with a verdict and its reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from swiftsure.attacks._apgd import apgd
from swiftsure.attacks._fab import fab_targeted
from swiftsure.attacks._gradient import GradientReport, GradientTally, attacking, looked_at
from swiftsure.attacks._pgd import pgd
from swiftsure.attacks._restarts import Found, worst_of
from swiftsure.attacks._square import square
from swiftsure.attacks.forms import transferred
from swiftsure.attacks.gates import deployed, gate_forcing
from swiftsure.attacks.objectives import (
    Judge,
    Objective,
    as_exits,
    cross_entropy,
    margin,
    single,
    targeted_margin,
)
from swiftsure.attacks.suite import SuiteResult
from swiftsure.ball import Ball
from swiftsure.exits.policies import Policy
from swiftsure.modes import evaluating

RELIABLE, SUSPICIOUS, NOT_EVALUATED = "reliable", "suspicious", "not evaluated"
CHECKS = ("randomness", "gradients", "steps", "restarts", "queries", "eps", "noise", "transfer")
"""What is asked; the names are part of results.json."""

SAMPLES = 200
"""How many samples are asked about: so many that 1% of them is more than one."""
LEAST = 20
"""With fewer, one sample is 5%, and no share below says anything."""
BLIND = 0.05
"""Share of unusable gradients from which on an attack counts as blind. Networks that hide nothing have exact zeros only
where a logit's probability underflows; on those of results/ the share was 0 at every step."""
AGREES = 0.5
"""Cosine from which on slopes tell the truth. On the networks of results/, in their own balls, it was .90 or more."""
_MOVES = 8
NEW = 0.01
"""Share of the samples that a further attack may break on its own. Two runs of one good attack differ by some tenths of
a point, so that of 200 samples one or two are chance, and three hardly ever are (2% where the truth is 0.3%)."""
RISE = 0.05
"""By how much accuracy may rise with the radius. It cannot where attacks are perfect; those of 40 steps waver more in
large balls."""
NOISES = 20
"""Random images of the ball tried per sample, half of them inside and half at its edge."""
QUERIES = 1000
"""Of square, where the suite has none."""
GATE_QUERIES = 300
"""Of square for each gate, on all samples that the suite left; it only has to see that a head is weak."""
GATE_SAMPLES, MORE_GATE_QUERIES = 10, 5000
"""Where gradients say nothing of a weak head, many queries see more than 300; on a few samples, as they are dear."""
ALONE = 4
"""Samples that are passed singly as well."""
_STEPS = {"standard": 100, "full": 200}
_QUICK_STEPS = 40
_DIFFERS = 1e-3
"""Logits of the same images that differ by this, relative to the largest, do so by more than rounding."""


@dataclass(frozen=True)
class Check:
    """What one guard says: its verdict, and why."""

    verdict: str
    reason: str


@dataclass
class Asked:
    """What the guards ask about: samples, and what a suite has broken of them."""

    net: nn.Module
    x: Tensor
    y: Tensor
    ball: Ball
    broken: Tensor
    """(n,) bool, by the suite; on the CPU."""
    judge: Judge
    over: Callable[[Objective], Objective]
    """An objective of one exit, at the exit that answers."""
    policy: Policy | None
    device: torch.device
    batch: int
    seed: int
    found: dict[int, Tensor] = field(default_factory=dict)
    """Images that break what the suite left, by sample; on the CPU."""

    @property
    def gates(self) -> list[Objective]:
        """What makes each exit answer wrongly that may answer; none where no policy says who does."""
        policy = self.policy
        if policy is None or policy.exits == 1:
            return []
        return [gate_forcing(policy, exit) for exit in range(policy.exits) if policy.may_answer(exit)]

    def logits(self, x: Tensor) -> tuple[Tensor, ...]:
        """Of all exits, in evaluation mode."""
        with evaluating(self.net), torch.no_grad():
            return as_exits(self.net(x))

    def breaks(self, attack: Callable[..., Tensor], which: Tensor, ball: Ball | None = None) -> Tensor:
        """Whether an attack breaks each of some samples, (n,) bool; judged by a fresh pass."""
        ball, generator = ball or self.ball, torch.Generator().manual_seed(self.seed)
        flags = []
        for index in which.nonzero().squeeze(1).split(self.batch):
            x, y = (
                self.x[index.to(self.x.device)].to(self.device),
                self.y[index.to(self.y.device)].to(self.device),
            )
            x_adv = attack(self.net, x, y, ball, generator=generator)
            broken = (self.judge(self.logits(x_adv), y) & ball.contains(x_adv, x)).cpu()
            flags.append(broken)
            if ball == self.ball:
                for place, image in zip(
                    index[broken].tolist(), x_adv[broken.to(x_adv.device)].cpu(), strict=True
                ):
                    if not self.broken[place]:
                        self.found.setdefault(place, image)
        return torch.cat(flags) if flags else torch.zeros(0, dtype=torch.bool)

    def further(self, attack: Callable[..., Tensor], what: str, most: int | None = None) -> Check:
        """The verdict on an attack that is tried on the samples that the suite left, or on at most so many of them."""
        every = ~self.broken
        which = every if most is None else every & (every.cumsum(0) <= most)
        new, asked = int(self.breaks(attack, which).sum()), int(which.sum())
        which_ones = "samples" if asked == int(every.sum()) else "first samples"
        n = len(self.broken) if most is None else min(most, len(self.broken))
        return _judged(new, n, what, f"of the {asked} {which_ones} that the suite left")


def _judged(new: int, n: int, what: str, left: str) -> Check:
    """Suspicious where an attack alone breaks more of n samples than chance would."""
    reason = f"{what} {f'breaks {new}' if new else 'breaks none'} {left}"
    return Check(SUSPICIOUS if new > max(1, NEW * n) else RELIABLE, reason)


def randomness(asked: Asked) -> Check:
    """Adaptive attacks on random networks average over their draws, which ours do not."""
    largest = mixed = 0.0
    for x in asked.x.split(asked.batch):
        x = x.to(asked.device)
        first, again = asked.logits(x), asked.logits(x)
        turned = tuple(z.flip(0) for z in asked.logits(x.flip(0)))
        largest = max(largest, _difference(first, again), _difference(first, turned))
        # What depends on a batch's mean is blind to its order.
        half = asked.logits(x[: (len(x) + 1) // 2])
        mixed = max(mixed, _difference(first, half))
        for place in range(min(ALONE, len(x))):
            alone = asked.logits(x[place : place + 1])
            mixed = max(mixed, _difference(tuple(z[place:] for z in first), alone))
    if largest > _DIFFERS:
        reason = (
            "two passes over the same images differ: the network draws random numbers, or reads its batch"
        )
        return Check(SUSPICIOUS, reason)
    if mixed > _DIFFERS:
        return Check(
            SUSPICIOUS, "the same images in smaller batches get other answers: the network reads its batch"
        )
    return Check(RELIABLE, "two passes over the same images agree")


def _difference(batch: tuple[Tensor, ...], part: tuple[Tensor, ...]) -> float:
    """How far logits of the first images of a batch are from those of the same images passed otherwise; relative."""
    largest = 0.0
    for one, other in zip(batch, part, strict=True):
        difference = (one[: len(other)] - other).abs() / one.abs().amax().clamp_min(1e-30)
        largest = max(largest, torch.nan_to_num(difference, nan=0.0).amax().item())
    return largest


def gradients(asked: Asked, found: SuiteResult) -> Check:
    """Of the suite's attacks as a whole, and of each exit that may answer: are they there, and are they true?"""
    policy = asked.policy
    if policy is None or policy.exits == 1:
        named: dict[str, Objective] = {"the network": margin}
    else:
        named = {
            f"exit {exit + 1}, which may answer,": single(exit, margin)
            for exit in range(policy.exits)
            if policy.may_answer(exit)
        }
    for name, objective in named.items():
        unusable, agreement = _slopes(asked, objective)
        if unusable > BLIND and len(named) > 1:
            reason = (
                f"{name} has {unusable:.1%} of its gradients zero or no number at random points of the ball"
            )
            return Check(SUSPICIOUS, reason)
        if agreement < AGREES and unusable <= BLIND:
            reason = f"{name} does not change as its gradients say (median cosine {agreement:.2f})"
            return Check(SUSPICIOUS, reason)
    return _of_the_suite(found)


def _slopes(asked: Asked, objective: Objective) -> tuple[float, float]:
    """Of an objective's gradients at random points of the balls.

    Returns:
        The share that is zero or no number; and the median over samples of the cosine between the changes along
        `_MOVES` random moves, each a quarter as long as the ball is wide, and what the mean of the gradients at both
        ends says of them. A network of flat pieces, as ReLUs make, has nearly 1; rounding hides steps from its slopes.
    """
    generator, report = torch.Generator().manual_seed(asked.seed), GradientReport()
    tally, cosines = GradientTally(report), []
    with attacking(asked.net):
        for x, y in zip(asked.x.split(asked.batch), asked.y.split(asked.batch), strict=True):
            x, y = x.to(asked.device), y.to(asked.device)
            here = asked.ball.sample(x, generator)
            _, value, slope = looked_at(asked.net, here, y, objective)
            tally.add(slope)
            said, seen = [], []
            for _ in range(_MOVES):
                there = asked.ball.project(here + (asked.ball.sample(x, generator) - x) / 4, x)
                _, moved, other = looked_at(asked.net, there, y, objective)
                said.append(((slope + other).double() / 2 * (there - here)).flatten(1).sum(1))
                seen.append((moved - value).double())
            one, two = (torch.nan_to_num(torch.stack(part)) for part in (said, seen))
            lengths = one.norm(dim=0) * two.norm(dim=0)
            # Where nothing moves and nothing was said to, both are right.
            idle = (one == 0).all(0) & (two == 0).all(0)
            cosines.append(torch.where(idle, 1.0, (one * two).sum(0) / lengths.clamp_min(1e-300)))
    tally.close()
    return report.zero_share + report.nonfinite_share, torch.cat(cosines).median().item()


def _of_the_suite(found: SuiteResult) -> Check:
    # One gradient a sample, at x itself, says nothing of where a climb leads.
    once = int((~found.misclassified).sum())
    shares = {
        name: (report.zero + report.nonfinite) / report.samples
        for name, report in found.gradients.items()
        if report.samples > once
    }
    if not shares:
        if once == 0:
            return Check(RELIABLE, "nothing was right, so nothing was attacked")
        return Check(NOT_EVALUATED, "no attack of the suite climbed along gradients")
    best = min(shares, key=lambda name: shares[name])
    worst = max(shares, key=lambda name: shares[name])
    reason = f"{shares[best]:.1%} of the gradients of {best} are zero or no number"
    if shares[best] > BLIND:
        return Check(SUSPICIOUS, f"even {reason}")
    if shares[worst] > BLIND:
        reason += f", though {shares[worst]:.1%} of {worst}'s"
    return Check(RELIABLE, reason)


def steps(asked: Asked, suite: str) -> Check:
    """Twice as many as the suite's."""
    steps, method = 2 * _STEPS.get(suite, _QUICK_STEPS), apgd if suite in _STEPS else pgd
    attack = partial(method, objective=asked.over(cross_entropy), judge=asked.judge, steps=steps)
    return asked.further(attack, f"twice as many steps ({method.__name__}, {steps})")


def restarts(asked: Asked, suite: str) -> Check:
    """Of apgd on the margin, and towards each gate."""
    steps = _STEPS.get(suite, _QUICK_STEPS)
    attacks = [
        partial(apgd, objective=objective, judge=asked.judge, steps=steps, restarts=restarts)
        for objective, restarts in ((asked.over(margin), 5), *((gate, 2) for gate in asked.gates))
    ]
    towards = " and 2 towards each gate" if asked.gates else ""
    if asked.ball.norm != "inf":
        # There the nearest boundary is another question than the highest point.
        aim = targeted_margin if asked.policy is None else deployed(asked.policy, targeted_margin)
        attacks.append(
            partial(fab_targeted, objective=aim, judge=asked.judge, steps=steps, random_start=True)
        )
        towards += " and fab-t from another start"
    return asked.further(
        partial(_one_after_another, attacks, asked.judge),
        f"apgd with 5 restarts on the margin{towards} ({steps} steps)",
    )


def _one_after_another(
    attacks: Sequence[Callable[..., Tensor]],
    judge: Judge,
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    **options: Any,
) -> Tensor:
    """Several attacks, each on what those before it left."""

    def run(number: int, x: Tensor, y: Tensor) -> Found:
        x_adv = attacks[number](net, x, y, ball, **options)
        with evaluating(net), torch.no_grad():
            broken = judge(as_exits(net(x_adv)), y)
        return Found(x_adv, x.new_zeros(len(x)), broken)

    return worst_of(x, y, len(attacks), run)


def queries(asked: Asked, found: SuiteResult) -> Check:
    """AutoAttack warns of the same: a search without gradients should have nothing left to find."""
    for count, most in ((GATE_QUERIES, len(asked.broken)), (MORE_GATE_QUERIES, GATE_SAMPLES)):
        by_gate = [partial(square, objective=gate, judge=asked.judge, steps=count) for gate in asked.gates]
        if by_gate:
            attack = partial(_one_after_another, by_gate, asked.judge)
            forced = asked.further(attack, f"square forcing each gate ({count} queries)", most)
            if forced.verdict == SUSPICIOUS:
                return forced
    n = len(asked.broken)
    by_queries = {name: flags[:n] for name, flags in found.broken.items() if name.startswith("square")}
    by_gradients = [flags[:n] for name, flags in found.broken.items() if name not in by_queries]
    if not by_queries:
        attack = partial(square, objective=asked.over(margin), judge=asked.judge, steps=QUERIES)
        return asked.further(attack, f"square ({QUERIES} queries)")
    left = ~torch.stack([found.misclassified[:n], *by_gradients]).any(0)
    new = int((torch.stack(list(by_queries.values())).any(0) & left).sum())
    return _judged(
        new, n, f"{' and '.join(by_queries)}", f"of the {int(left.sum())} samples that gradients left"
    )


def eps(asked: Asked) -> Check:
    """From the ball's radius in up to four steps to the one whose ball holds every image."""
    ball, every = asked.ball, torch.ones_like(asked.broken)
    side = {"inf": 0.0, "2": 0.5, "1": 1.0}[ball.norm]
    whole = (ball.high - ball.low) * asked.x[0].numel() ** side
    if ball.radius <= 0:
        return Check(NOT_EVALUATED, "the radius is 0")
    ratio = max(whole / ball.radius, 1.0)
    attack = partial(apgd, objective=asked.over(margin), judge=asked.judge, steps=_QUICK_STEPS)
    radii = [ball.radius * ratio ** (step / 4) for step in range(4)] + [max(whole, ball.radius)]
    accuracy = []
    for radius in radii:
        accuracy.append(1 - asked.breaks(attack, every, ball.with_eps(radius)).double().mean().item())
        if accuracy[-1] == 0:
            break
    shown = ", ".join(f"{value:.0%} at {radius:.3g}" for value, radius in zip(accuracy, radii, strict=False))
    # The best that an answer which no attack can change may have.
    chance = asked.y.bincount().max().item() / len(asked.y)
    if accuracy[-1] > chance + 1e-9:
        return Check(SUSPICIOUS, f"accuracy stays above chance where the ball holds every image: {shown}")
    rise = max([later - min(accuracy[:place]) for place, later in enumerate(accuracy) if place] or [0.0])
    if rise > RISE:
        return Check(SUSPICIOUS, f"accuracy rises with the radius: {shown}")
    return Check(RELIABLE, f"accuracy falls with the radius: {shown}")


def noise(asked: Asked) -> Check:
    """Random images of the ball, inside and at its edge."""

    def attack(net: nn.Module, x: Tensor, y: Tensor, ball: Ball, *, generator: torch.Generator) -> Tensor:
        worst = x.clone()
        for number in range(NOISES):
            tried = ball.sample(x, generator)
            if number % 2:
                direction = torch.randn(x.shape, generator=generator).to(x)
                tried = ball.maximiser(x, direction)
            broken = asked.judge(asked.logits(tried), y)
            worst[broken] = tried[broken]
        return worst

    return asked.further(attack, f"plain noise ({NOISES} random images each)")


def transfer(asked: Asked, sources: Mapping[str, nn.Module]) -> Check:
    """What breaks other networks."""
    if not sources:
        return Check(NOT_EVALUATED, "no other network was given to attack from")

    def attack(net: nn.Module, x: Tensor, y: Tensor, ball: Ball, *, generator: torch.Generator) -> Tensor:
        worst = x.clone()
        for source in sources.values():
            tried = transferred(net, x, y, ball, source=source, generator=generator)
            broken = asked.judge(asked.logits(tried), y)
            worst[broken] = tried[broken]
        return worst

    return asked.further(attack, f"what breaks {' and '.join(sources)}")
