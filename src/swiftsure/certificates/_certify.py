"""Verdicts: which samples no image of the ball can take the label from, and what the ball can cost at most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swiftsure.ball import Ball
from swiftsure.bounds import TECHNIQUES, class_count, trace
from swiftsure.certificates._precision import certifying, place
from swiftsure.certificates._proof import CHEAPEST, Proof, SampleSlopes, chunk
from swiftsure.certificates._rounding import FLOOR, rounding_slack
from swiftsure.data import check_batch
from swiftsure.errors import InputError
from swiftsure.exits import MultiExit, Policy, exit_macs, static_macs

METHODS = (*TECHNIQUES, "auto")
"""What certificates may be asked for: one technique of `bounds`, or all of them in turn, cheap ones first."""


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
        proof = Proof(net, graph, images, None if y is None else y.detach().to(device, torch.int64), policy)
        for name in names:
            chosen = torch.arange(len(x), device=device)
            if frugal:
                proof.drop_dear(name, ball)
                chosen = proof.undecided(name)
            size = batch or chunk(graph, images, name)
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
