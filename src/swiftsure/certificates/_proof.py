"""What is known of each sample while techniques are tried in turn: boxes at every exit, and the walk through them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from swiftsure.attacks import pgd
from swiftsure.attacks.gates import deployed
from swiftsure.attacks.objectives import as_exits, average, cross_entropy, margin
from swiftsure.ball import Ball
from swiftsure.bounds import (
    Graph,
    Kept,
    Region,
    Slopes,
    alpha_crown,
    class_count,
    difference_bounds,
    memory,
    technique,
)
from swiftsure.certificates._walk import Walk, walk
from swiftsure.exits import Policy

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


class Proof:
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
                net, x[part], label[part], ball,
                objective=objective, judge=policy.misclassified, steps=ATTACK_STEPS, random_start=False,
            )  # fmt: skip
            withstands[part] = ~policy.misclassified(as_exits(net(found)), label[part])
    return withstands


def chunk(graph: Graph, images: Tensor, name: str) -> int:
    """How many samples to bound at once: as many as fit into memory, up to a limit."""
    values = sum(torch.Size(node.shape).numel() for node in graph.nodes)
    return min(LARGEST_CHUNK.get(name, LARGEST_ROW_CHUNK), memory.samples_at_once(values, images))
