"""Verdicts: which samples no image of the ball can take the label from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swiftsure.attacks import pgd
from swiftsure.attacks.objectives import as_exits
from swiftsure.ball import Ball
from swiftsure.bounds import TECHNIQUES, Graph, margins, memory, trace
from swiftsure.certificates._precision import certifying, place
from swiftsure.certificates._rounding import FLOOR, rounding_slack
from swiftsure.data import check_batch
from swiftsure.errors import InputError
from swiftsure.exits.cost import static_macs

METHODS = (*TECHNIQUES, "auto")
"""What certificates may be asked for: one technique of `bounds`, or all of them in turn, cheap ones first."""

UNPROVEN = "none"

DEAR = "symbolic"
"""With "auto", the first technique that is worth an attack before it: only what withstands one is asked about."""
ATTACK_STEPS = 20
LARGEST_CHUNK = {"interval": 256}
"""Samples bounded at once, however much memory there is: beyond, nothing gets faster."""
LARGEST_ROW_CHUNK = 64


@dataclass(frozen=True, eq=False)
class Certificate:
    """What is proven of each of B samples. Tensors lie on the device of the images.

    Attributes:
        certified: (B,) bool: every image of the ball gets the label.
        margin: (B,) the smallest of the lower bounds of z_label - z_j that a proof needs; -inf where none was computed
            (the sample is misclassified as it is) or none is a number.
        max_exit: (B,) int64, the last exit, from 0, that an image of the ball can reach.
        max_macs: (B,) int64, the most multiply-adds that an image of the ball can cost.
        method: B names, the technique that proved the sample; "none" where none did.
        label: (B,) int64, the label that the verdict is about.
        ball: the threat model.
        asked: the method that was asked for.
        delta: what a margin has to exceed; see `rounding_slack`.
    """

    certified: Tensor
    margin: Tensor
    max_exit: Tensor
    max_macs: Tensor
    method: list[str]
    label: Tensor
    ball: Ball
    asked: str
    delta: float

    def __len__(self) -> int:
        return len(self.method)

    @property
    def by(self) -> dict[str, int]:
        """How many samples each technique proved."""
        count = Counter(self.method)
        return {name: count[name] for name in _techniques(self.asked)}


def certify(
    net: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    ball: Ball | None = None,
    policy: None = None,
    method: str = "auto",
    *,
    delta: float | None = None,
    batch: int | None = None,
) -> Certificate:
    """Prove, sample by sample, that no image of the ball around x gets another label than y.

    A sample whose own image is misclassified is never certified and costs no bound. With "auto" a sample that a
    cheap technique proves costs no dearer one, and one that PGD breaks none of the dear ones. Computed in evaluation
    semantics and in full float32 (or float64, as the weights are), without TF32 and autocast, and valid for networks
    that run so; nothing of the network changes.

    Args:
        net: returns logits (B, classes).
        x: images (B, channels, height, width) in [0, 1] and in the ball's pixel range.
        y: labels (B,), integers; None: the network's own answers on x.
        ball: the threat model.
        policy: None; policies of exits have no meaning for one exit.
        method: a technique of `bounds`, or "auto".
        delta: what a margin must exceed to count as a proof; None: measured by `rounding_slack` on the first images.
            Two calls with the same delta agree on a sample whatever else is in the batch, but for margins within
            a rounding error of delta.
        batch: samples that are bounded at once; None: as many as `bounds.memory` allows.

    Raises:
        InputError: images, labels or a ball that do not fit, an unknown method, a policy, a negative delta, a batch
            below 1, an operation without a bound rule, several exits, or weights coarser than float32.
    """
    names = _techniques(method)
    ball = _checked_options(ball, policy, delta, batch)
    device, dtype = place(net)
    config = getattr(net, "config", None)
    config = config if isinstance(config, dict) else {}
    check_batch(x, y, config.get("classes"), config.get("input_shape"))
    if len(x) and not (x.amin() >= ball.low - 1e-6 and x.amax() <= ball.high + 1e-6):
        raise InputError(f"pixels leave the ball's range; allowed: [{ball.low}, {ball.high}]")
    with certifying(net):
        graph = trace(net, x)
        classes = _single_exit_classes(graph)
        check_batch(x, y, classes)
        if delta is None:
            delta = rounding_slack(net, x, ball, method)
        images = x.detach().to(device, dtype)
        answers, finite = _answers(net, images, classes)
        label = answers if y is None else y.detach().to(device, torch.int64)
        margin = torch.full((len(x),), -torch.inf, dtype=dtype, device=device)
        proven_by = [UNPROVEN] * len(x)
        undecided = ((answers == label) & finite).nonzero()[:, 0]
        for name in names:
            if method == "auto" and name == DEAR:
                # What an attack breaks cannot be proven, and would cost most.
                undecided = undecided[_withstands(net, images[undecided], label[undecided], ball)]
            for part in undecided.split(batch or _chunk(graph, images, name)):
                found = _worst(as_exits(margins(net, images[part], label[part], ball, name))[-1], label[part])
                margin[part] = torch.maximum(margin[part], found)
            proven = margin[undecided].double() > delta
            for index in undecided[proven].tolist():
                proven_by[index] = name
            undecided = undecided[~proven]
        macs = static_macs(net, x.shape[1:])
    margin, label = margin.to(x.device), label.to(x.device)
    return Certificate(
        certified=margin.double() > delta,
        margin=margin,
        max_exit=torch.zeros_like(label),
        max_macs=torch.full_like(label, macs),
        method=proven_by,
        label=label,
        ball=ball,
        asked=method,
        delta=delta,
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


def _checked_options(ball: Any, policy: Any, delta: float | None, batch: int | None) -> Ball:
    if not isinstance(ball, Ball):
        raise InputError(f"ball is {ball!r}; a certificate needs one, such as Ball(eps=0.1, norm='inf')")
    if policy is not None:
        raise InputError("policies belong to networks with several exits; allowed for one exit: policy=None")
    if delta is not None and not 0 <= delta < torch.inf:
        raise InputError(f"delta is {delta!r}; allowed: a finite number >= 0, or None to measure it")
    if batch is not None and (not isinstance(batch, int) or batch < 1):
        raise InputError(f"batch is {batch!r}; allowed: an integer >= 1, or None")
    return ball


def _single_exit_classes(graph: Graph) -> int:
    if len(graph.outputs) > 1:
        raise InputError(
            f"the network has {len(graph.outputs)} exits; multi-exit certificates are not supported yet by certify"
        )
    (classes,) = graph.nodes[graph.outputs[0]].shape
    if classes < 2:
        raise InputError("the network has one class; certificates need at least 2")
    return classes


def _answers(net: nn.Module, x: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """The labels that the network gives, and where all logits are finite: (B,) each."""
    chunks = [as_exits(net(part))[-1] for part in x.split(LARGEST_CHUNK["interval"])] if len(x) else []
    logits = torch.cat(chunks) if chunks else x.new_empty(0, classes)
    return logits.argmax(1), logits.isfinite().all(1)


def _withstands(net: nn.Module, x: Tensor, label: Tensor, ball: Ball) -> Tensor:
    """Whether PGD, started at the image itself, leaves each sample its label: (batch,) bool."""
    parts = [
        as_exits(net(pgd(net, images, wanted, ball, steps=ATTACK_STEPS, random_start=False)))[-1].argmax(1)
        == wanted
        for images, wanted in zip(x.split(256), label.split(256), strict=True)
    ]
    return torch.cat(parts) if parts else label.new_empty(0, dtype=torch.bool)


def _worst(lower: Tensor, label: Tensor) -> Tensor:
    """The smallest bound over the wrong classes, -inf where any is not finite: (B,)."""
    worst = lower.scatter(1, label[:, None], torch.inf).amin(1)
    return worst.where(lower.isfinite().all(1), -torch.inf)


def _chunk(graph: Graph, images: Tensor, name: str) -> int:
    """How many samples to bound at once: as many as fit into memory, up to a limit."""
    values = sum(torch.Size(node.shape).numel() for node in graph.nodes)
    return min(LARGEST_CHUNK.get(name, LARGEST_ROW_CHUNK), memory.samples_at_once(values, images))
