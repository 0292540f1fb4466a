"""Sound bounds of a traced network over a ball.

Every technique has one signature, ``technique(graph, region, spec) -> [(lower, upper) per output]``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from swiftsure.ball import Ball
from swiftsure.bounds._interval import interval
from swiftsure.bounds._symbolic import symbolic
from swiftsure.bounds.graph import Graph, trace
from swiftsure.bounds.region import Region
from swiftsure.data import check_batch
from swiftsure.errors import InputError

Technique = Callable[[Graph, Region, Tensor | None], list[tuple[Tensor, Tensor]]]

TECHNIQUES: dict[str, Technique] = {"interval": interval, "symbolic": symbolic}

__all__ = [
    "TECHNIQUES",
    "Graph",
    "Region",
    "interval",
    "margins",
    "output_bounds",
    "symbolic",
    "technique",
    "trace",
]


def technique(method: str) -> Technique:
    """A technique by name.

    Raises:
        InputError: unknown name.
    """
    if method not in TECHNIQUES:
        raise InputError(f"unknown bound method {method!r}; known: {', '.join(TECHNIQUES)}")
    return TECHNIQUES[method]


def margins(
    net: nn.Module, x: Tensor, y: Tensor, ball: Ball, method: str = "interval"
) -> Tensor | tuple[Tensor, ...]:
    """Lower bounds of the class margins z_y - z_j over the ball around each image.

    The true class is subtracted before the last layer is bounded, so a margin is never looser than the difference of
    two bounded logits. Differentiable in the parameters. The network is read in evaluation semantics (population
    statistics, no dropout) whatever its mode; mode and parameters stay as they are.

    Args:
        net: returns logits (batch, classes), or a tuple of K of them.
        x: images (batch, channels, height, width) in [0, 1].
        y: labels (batch,), integers.
        ball: the threat model.
        method: "interval" or "symbolic".

    Returns:
        (batch, classes), entry y being exactly 0; or a tuple of K. A sample is proven where all other entries are
        positive.

    Raises:
        InputError: bad images or labels, an unknown method, or an operation without a rule.
    """
    bound = technique(method)
    check_batch(x, y, shape=_input_shape(net))
    graph = trace(net, x)
    classes = class_count(graph)
    check_batch(x, y, classes=classes)
    lower = tuple(low for low, _ in bound(graph, Region(x, ball), margin_spec(y, classes, x.dtype)))
    return lower[0] if graph.single else lower


def output_bounds(
    net: nn.Module, x: Tensor, ball: Ball, method: str = "interval"
) -> tuple[Tensor, Tensor] | tuple[tuple[Tensor, Tensor], ...]:
    """(lower, upper) of the logits over the ball around each image, (batch, classes) each; or a tuple of K such pairs.

    Args and errors as in `margins`.
    """
    bound = technique(method)
    check_batch(x, shape=_input_shape(net))
    graph = trace(net, x)
    pairs = tuple(bound(graph, Region(x, ball), None))
    return pairs[0] if graph.single else pairs


def margin_spec(y: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """The linear functions z_y - z_j of the logits: (batch, classes, classes), row y all zero."""
    identity = torch.eye(classes, dtype=dtype, device=y.device)
    return identity[y.long()][:, None, :] - identity


def class_count(graph: Graph) -> int:
    """How many classes every output has.

    Raises:
        InputError: outputs differ in it.
    """
    counts = sorted({graph.nodes[output].shape[0] for output in graph.outputs})
    if len(counts) > 1:
        raise InputError(
            f"the exits have different numbers of classes {counts}; margins need the same for all"
        )
    return counts[0]


def _input_shape(net: nn.Module) -> tuple[int, ...] | None:
    config = getattr(net, "config", None)
    return tuple(config["input_shape"]) if isinstance(config, dict) else None
