"""Verdicts: which samples no image of the ball can take the label from, and what the ball can cost at most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from swiftsure.attacks import pgd
from swiftsure.attacks.gates import deployed
from swiftsure.attacks.objectives import as_exits, average, cross_entropy, margin
from swiftsure.ball import Ball
from swiftsure.bounds import (
    TECHNIQUES,
    Graph,
    Kept,
    Region,
    Slopes,
    alpha_crown,
    class_count,
    difference_bounds,
    memory,
    technique,
    trace,
)
from swiftsure.certificates._precision import certifying, place
from swiftsure.certificates._rounding import FLOOR, rounding_slack
from swiftsure.certificates._walk import Walk, walk
from swiftsure.data import check_batch
from swiftsure.errors import InputError
from swiftsure.exits import MultiExit, Policy, exit_macs, static_macs

METHODS = (*TECHNIQUES, "auto")
"""What certificates may be asked for: one technique of `bounds`, or all of them in turn, cheap ones first."""

UNPROVEN = "none"

CHEAPEST = "interval"
DEAR = ("symbolic", "crown", "alpha-crown")
"""With "auto", only what withstands an attack is asked of these."""
ATTACK_STEPS = 20
LARGEST_CHUNK = {"interval": 256, "alpha-crown": 256}
"""Samples bounded at once, however much memory there is: beyond, nothing gets faster."""
LARGEST_ROW_CHUNK = 64

SampleSlopes = Mapping[tuple[int, bool], Slopes]
"""Of one sample: slopes by (exit, whether z_y - z_j is bounded from above), their functions being the classes j."""


@dataclass(frozen=True, eq=False)
class Certificate:
    """What is proven of each of B samples. Tensors lie on the device of the images.

    Label and cost are two promises: a sample whose label is not proven has a proven cost all the same.

    Attributes:
        certified: (B,) bool: for every image of the ball the deployed network answers the label.
        margin: (B,) the smallest of the lower bounds of z_label - z_j that a proof needs: those of the exits that can
            fire and of the classes that could be their answer. -inf where none was computed (the sample is
            misclassified as it is) or none is a number, +inf where none is needed.
        required: (B, K) bool: the exits by which an image of the ball may leave.
        max_exit: (B,) int64, the last exit, from 0, that an image of the ball can reach.
        max_macs: (B,) int64, the most multiply-adds that an image of the ball can cost.
        method: B names, the technique that proved the label; "none" where none did.
        label: (B,) int64, the label that the verdict is about.
        ball: the threat model.
        policy: when inputs leave; None for one exit.
        asked: the method that was asked for.
        delta: what a margin has to exceed, and how much every box of logit differences is widened; see
            `rounding_slack`.
        slopes: B, or none at all: what alpha-CROWN found where it proved the label or lowered the cost, so that it can
            be computed again without a search; None for other samples.
    """

    certified: Tensor
    margin: Tensor
    required: Tensor
    max_exit: Tensor
    max_macs: Tensor
    method: list[str]
    label: Tensor
    ball: Ball
    policy: Policy | None
    asked: str
    delta: float
    slopes: Sequence[SampleSlopes | None] = ()

    def __len__(self) -> int:
        return len(self.method)

    @property
    def by(self) -> dict[str, int]:
        """How many samples each technique proved."""
        count = Counter(self.method)
        return {name: count[name] for name in _techniques(self.asked)}

    def certified_slowdown(self, macs: float) -> float:
        """The share of samples, in [0, 1], that no image of the ball can make cost more than so many multiply-adds."""
        return (self.max_macs <= macs).double().mean().item()


def certify(
    net: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    ball: Ball | None = None,
    policy: Policy | None = None,
    method: str = "auto",
    *,
    delta: float | None = None,
    batch: int | None = None,
) -> Certificate:
    """Prove, sample by sample, that the deployed network answers y to every image of the ball, and what it may cost.

    A network of several exits answers by the first one that fires; `_walk` has what must hold at which exit. One exit
    is the case in which it always fires. A sample whose own image is misclassified is never certified. Bounds of
    several techniques are intersected. With "auto" a sample that a cheap technique proves costs no dearer one, and one
    that PGD breaks none of the dear ones; costs are sought by intervals, and by the others only where they are run
    for the label. Computed in evaluation semantics and in full float32 (or float64, as the weights are),
    without TF32 and autocast, and valid for networks that run so; nothing of the network changes.

    Args:
        net: returns logits (B, classes), or a tuple of K of them.
        x: images (B, channels, height, width) in [0, 1] and in the ball's pixel range.
        y: labels (B,), integers; None: the deployed network's own answers on x.
        ball: the threat model.
        policy: when inputs leave; None: ``net.policy``, and nothing for one exit.
        method: a technique of `bounds`, or "auto".
        delta: what a margin must exceed to count as a proof; None: measured by `rounding_slack` on the first images.
            Two calls with the same delta agree on a sample whatever else is in the batch, but for margins within
            a rounding error of delta.
        batch: samples that are bounded at once; None: as many as `bounds.memory` allows.

    Raises:
        InputError: images, labels or a ball that do not fit, an unknown method, several exits without a policy or
            with one for another number of exits, a negative delta, a batch below 1, an operation without a bound
            rule, or weights coarser than float32.
    """
    return certify_by(_techniques(method), net, x, y, ball, policy, asked=method, delta=delta, batch=batch)


def certify_by(
    names: Sequence[str],
    net: nn.Module,
    x: Tensor,
    y: Tensor | None,
    ball: Ball | None,
    policy: Policy | None,
    *,
    asked: str,
    delta: float | None = None,
    batch: int | None = None,
    frugal: bool | None = None,
) -> Certificate:
    """`certify` by these techniques in turn, whose bounds are intersected.

    Args:
        names: techniques, cheap ones first.
        frugal: whether only what is undecided goes on to the next technique; None: where the method is "auto".

    Other args, result and errors as of `certify`.
    """
    frugal = asked == "auto" if frugal is None else frugal
    ball = _checked_options(ball, delta, batch)
    device, dtype = place(net)
    config = getattr(net, "config", None)
    config = config if isinstance(config, dict) else {}
    check_batch(x, y, config.get("classes"), config.get("input_shape"))
    if len(x) and not (x.amin() >= ball.low - 1e-6 and x.amax() <= ball.high + 1e-6):
        raise InputError(f"pixels leave the ball's range; allowed: [{ball.low}, {ball.high}]")
    with certifying(net):
        graph = trace(net, x)
        classes = class_count(graph)
        if classes < 2:
            raise InputError("the network has one class; certificates need at least 2")
        policy = _policy_of(net, policy, len(graph.outputs))
        check_batch(x, y, classes)
        if delta is None:
            delta = rounding_slack(net, x, ball, asked)
        images = x.detach().to(device, dtype)
        proof = _Proof(net, graph, images, None if y is None else y.detach().to(device, torch.int64), policy)
        for name in names:
            chosen = torch.arange(len(x), device=device)
            if frugal:
                proof.drop_dear(name, ball)
                chosen = proof.undecided(name)
            size = batch or _chunk(graph, images, name)
            if frugal and name != CHEAPEST:
                proof.settle(name, chosen, ball, delta, size)
            else:
                for part in chosen.split(size):
                    proof.add(name, part, ball, delta)
        costs = torch.tensor(_costs(net, x, len(graph.outputs)), device=device)
    return Certificate(
        certified=proof.certified.to(x.device),
        margin=proof.margin.to(x.device),
        required=proof.required.to(x.device),
        max_exit=proof.max_exit.to(x.device),
        max_macs=costs[proof.max_exit].to(x.device),
        method=proof.method,
        label=proof.label.to(x.device),
        ball=ball,
        policy=policy if len(graph.outputs) > 1 else None,
        asked=asked,
        delta=delta,
        slopes=proof.slopes,
    )


class _Proof:
    """What is known of each sample so far: boxes of logit differences at every exit, and what the walk makes of it."""

    def __init__(
        self, net: nn.Module, graph: Graph, images: Tensor, y: Tensor | None, policy: Policy
    ) -> None:
        self.net, self.graph, self.images, self.policy = net, graph, images, policy
        self.exits, self.classes = len(graph.outputs), class_count(graph)
        self.logits = _logits(net, images, self.exits, self.classes)
        answer = policy.logits_of(self.logits)
        said = answer.argmax(1)
        self.exit = policy.exit_of(self.logits)
        self.label = said if y is None else y
        finite = torch.stack([z.isfinite().all(1) for z in self.logits]).all(0)
        self.right = (said == self.label) & finite
        # Differences to the class that the network answers bound its entropy best.
        self.about = self.label.where(self.right, said)
        shape = (len(images), self.classes)
        self.low = [images.new_full(shape, -torch.inf) for _ in self.logits]
        self.high = [images.new_full(shape, torch.inf) for _ in self.logits]
        self.margin = images.new_full((len(images),), -torch.inf)
        self.certified = torch.zeros_like(self.right)
        self.broken = torch.zeros_like(self.right)
        self.max_exit = torch.full_like(self.label, self.exits - 1)
        self.required, self.open, self.failing = (
            torch.ones(len(images), self.exits, dtype=torch.bool, device=images.device) for _ in range(3)
        )
        self.method = [UNPROVEN] * len(images)
        self.slopes: list[SampleSlopes | None] = [None] * len(images)
        self._climbed: dict[int, dict[tuple[int, bool], Slopes]] = {}

    def undecided(self, name: str) -> Tensor:
        """Which samples are worth a technique: those whose label it may prove; intervals bound the cost of all.

        (Tighter bounds of the cost alone are not: on mnist_small with two side exits at eps .1 crown-ibp on every
        sample lowers the mean from 457 to 447 thousand multiply-adds, for five times the time.)
        """
        label = self.right & ~self.certified & ~self.broken
        # The image itself leaves by its exit: no proof can promise less.
        cost = self.max_exit > self.exit
        return (label | cost if name == CHEAPEST else label).nonzero()[:, 0]

    def drop_dear(self, name: str, ball: Ball) -> None:
        """Before the first dear technique: what an attack breaks cannot be proven, and would cost most."""
        if name == DEAR[0]:
            asked = (self.right & ~self.certified).nonzero()[:, 0]
            self.broken[asked] = ~_withstands(
                self.net, self.images[asked], self.label[asked], ball, self.policy
            )

    def settle(self, name: str, chosen: Tensor, ball: Ball, delta: float, size: int) -> None:
        """A technique asked about one exit of a sample at a time, and no further where an exit fails.

        First those up to where the image itself leaves, the last one first: where one of them fails, no other helps.
        Then those behind, which only count where the walk cannot be shown to end before them. alpha-CROWN begins
        with these: an ascent on margins alone is much the cheapest. (On mnist_small with two side exits this loses 2
        verdicts of 10,000, and takes a third of the time.)
        """
        leaves = self.exit[chosen] if name != "alpha-crown" else torch.full_like(chosen, self.exits - 1)
        numbers = torch.arange(self.exits, device=chosen.device)
        first = numbers <= leaves[:, None]
        for turn in (first, ~first):
            for exit in reversed(range(self.exits)):
                before = (turn & (numbers > exit)) | (first & ~turn)
                hopeful = turn[:, exit] & self.open[chosen, exit] & ~(before & self.failing[chosen]).any(1)
                for part in chosen[hopeful].split(size):
                    self.add(name, part, ball, delta, exit)

    def add(self, name: str, part: Tensor, ball: Ball, delta: float, exit: int | None = None) -> None:
        """Intersect the boxes of some samples, at one exit or at all, with a technique's, and walk again."""
        if self.exits == 1:
            # Whatever it costs is known, and the label of a wrong answer cannot be proven.
            part = part[self.right[part]]
        if not len(part):
            return
        about, last = self.about[part], self.exits - 1
        region = Region(self.images[part], ball)
        kept: Kept = {}
        bound, graph = technique(name), self.graph
        if name == "alpha-crown":
            # An ascent is dear: it goes to exits that stand between the label and its proof. At the last one there is
            # no threshold, and so nothing but the margins to prove.
            climb = self.open[part][..., None].repeat(1, 1, 2)
            climb[:, -1, 1] = False
            bound = partial(alpha_crown, kept=kept, climb=climb, only=exit, give_up=exit is not None)
        elif exit is not None:
            graph = graph.only(exit)
        found = difference_bounds(bound, graph, region, about, upper=last > 0 and exit != last)
        for number in range(self.exits) if exit is None else (exit,):
            lower, upper = found[number if len(found) > 1 else 0]
            # What overflowed bounds nothing, on either side. z_j - z_y is the negative.
            low = (-upper).where(upper.isfinite(), -torch.inf)
            high = (-lower).where(lower.isfinite(), torch.inf)
            self.low[number][part] = torch.maximum(self.low[number][part], low)
            self.high[number][part] = torch.minimum(self.high[number][part], high)
        boxes = [(low[part], high[part]) for low, high in zip(self.low, self.high, strict=True)]
        walked = walk(boxes, about, self.policy, delta, [z[part] for z in self.logits])
        right = self.right[part]
        self.margin[part] = torch.where(right, walked.margin.to(self.margin), self.margin[part])
        proven = right & (walked.margin > delta) & ~self.certified[part]
        for index in part[proven].tolist():
            self.method[index] = name
        cheaper = (walked.max_exit < self.max_exit[part]) | (walked.required != self.required[part]).any(1)
        if kept:
            self._keep(kept, part, proven | cheaper, walked, exit)
        self.certified[part] |= proven
        self.max_exit[part] = walked.max_exit
        self.required[part], self.open[part] = walked.required, walked.open
        self.failing[part] = walked.failing

    def _keep(self, kept: Kept, part: Tensor, gained: Tensor, walked: Walk, exit: int | None) -> None:
        """Slopes of those samples of a part that gained by them, at the exits that the walk visited.

        Those of an exit that was settled alone wait until the next one is.
        """
        waits = torch.zeros_like(gained) if exit is None else ~walked.open[:, exit]
        for sample in (gained | waits).nonzero()[:, 0].tolist():
            index = int(part[sample])
            about, own = int(self.about[index]), self._climbed.setdefault(index, {})
            for number, above in product(range(self.exits), (False, True)):
                slopes = kept.get((sample, number, above))
                if slopes is not None:
                    # Functions leave out the class that they are about.
                    classes = slopes.function + (slopes.function >= about)
                    own[number, above] = replace(slopes, function=classes)
            if gained[sample]:
                last = int(walked.max_exit[sample])
                self.slopes[index] = {key: slopes for key, slopes in own.items() if key[0] <= last} or None


def verified_accuracy(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    method: str = "auto",
    batch: int | None = None,
    delta: float = FLOOR,
) -> float:
    """The share of samples that are certified with their true labels, in [0, 1]: a figure to follow training by.

    The slack for rounding is given, not measured; figures to report come from `certify`.

    Args and errors as in `certify`; at least one image is needed.
    """
    if len(x) == 0:
        raise InputError("there is no image; a verified accuracy needs at least one")
    return certify(net, x, y, ball, method=method, delta=delta, batch=batch).certified.double().mean().item()


def _techniques(method: str) -> Sequence[str]:
    if method not in METHODS:
        raise InputError(f"unknown method {method!r} of certificates; allowed: {', '.join(METHODS)}")
    return tuple(TECHNIQUES) if method == "auto" else (method,)


def _checked_options(ball: Any, delta: float | None, batch: int | None) -> Ball:
    if not isinstance(ball, Ball):
        raise InputError(f"ball is {ball!r}; a certificate needs one, such as Ball(eps=0.1, norm='inf')")
    if delta is not None and not 0 <= delta < torch.inf:
        raise InputError(f"delta is {delta!r}; allowed: a finite number >= 0, or None to measure it")
    if batch is not None and (not isinstance(batch, int) or batch < 1):
        raise InputError(f"batch is {batch!r}; allowed: an integer >= 1, or None")
    return ball


def _policy_of(net: nn.Module, policy: Policy | None, exits: int) -> Policy:
    """When inputs leave: what was passed, or what the network has."""
    if policy is None:
        own = getattr(net, "policy", None)
        policy = own if isinstance(own, Policy) else None
    if policy is None:
        if exits > 1:
            raise InputError(
                f"the network has {exits} exits and no thresholds; set net.policy, pass policy=, or use "
                "swiftsure.exits.calibrate (`swiftsure calibrate RUN`)"
            )
        return Policy("entropy", ())
    if not isinstance(policy, Policy):
        raise InputError(f"policy is {policy!r}; allowed: a Policy such as Policy('entropy', [0.1]), or None")
    policy.require(exits)
    return policy


def _costs(net: nn.Module, x: Tensor, exits: int) -> list[int]:
    """Multiply-adds of an image that leaves at each exit; whoever cannot leave early runs everything."""
    return (
        exit_macs(net, x.shape[1:]) if isinstance(net, MultiExit) else [static_macs(net, x.shape[1:])] * exits
    )


def _logits(net: nn.Module, x: Tensor, exits: int, classes: int) -> list[Tensor]:
    """What every exit says of the images: K of (B, classes)."""
    if not len(x):
        return [x.new_empty(0, classes)] * exits
    chunks = [as_exits(net(part)) for part in x.split(LARGEST_CHUNK["interval"])]
    return [torch.cat(parts) for parts in zip(*chunks, strict=True)]


def _withstands(net: nn.Module, x: Tensor, label: Tensor, ball: Ball, policy: Policy) -> Tensor:
    """Whether PGD, started at the image itself, leaves each sample its label: (batch,) bool.

    With several exits on all of them, and then, for what is left, on the one that answers.
    """
    objectives = [cross_entropy] if policy.exits == 1 else [average(), deployed(policy, margin)]
    withstands = torch.ones_like(label, dtype=torch.bool)
    for objective in objectives:
        for part in withstands.nonzero()[:, 0].split(256):
            found = pgd(
                net, x[part], label[part], ball, objective=objective, steps=ATTACK_STEPS, random_start=False
            )
            withstands[part] = ~policy.misclassified(as_exits(net(found)), label[part])
    return withstands


def _chunk(graph: Graph, images: Tensor, name: str) -> int:
    """How many samples to bound at once: as many as fit into memory, up to a limit."""
    values = sum(torch.Size(node.shape).numel() for node in graph.nodes)
    return min(LARGEST_CHUNK.get(name, LARGEST_ROW_CHUNK), memory.samples_at_once(values, images))
