"""Sound bounds of a traced network over a ball.

Every technique has one signature, ``technique(graph, region, spec, upper=True) -> [(lower, upper) per output]``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from swiftsure.ball import Ball
from swiftsure.bounds import memory
from swiftsure.bounds._alpha import Kept, Slopes, alpha_crown
from swiftsure.bounds._crown import crown, crown_ibp
from swiftsure.bounds._interval import interval, interval_differences
from swiftsure.bounds._linear import LinearMap, linear_map
from swiftsure.bounds._symbolic import symbolic
from swiftsure.bounds.graph import Graph
from swiftsure.bounds.region import Region
from swiftsure.bounds.tracing import trace
from swiftsure.data import check_batch
from swiftsure.errors import InputError


class Technique(Protocol):
    """Sound bounds of a network's outputs, or of linear functions of them."""

    def __call__(
        self, graph: Graph, region: Region, spec: Tensor | None = None, *, upper: bool = True
    ) -> list[tuple[Tensor, Tensor]]:
        """For each output (lower, upper), (batch, functions) or (batch, classes) each.

        Args:
            graph: the traced network.
            region: the inputs to bound over.
            spec: (batch, functions, classes), rows of linear functions of the logits; None for the logits themselves.
            upper: whether upper bounds are wanted; they may be infinite where not.
        """


TECHNIQUES: dict[str, Technique] = {
    "interval": interval,
    "crown-ibp": crown_ibp,
    "symbolic": symbolic,
    "crown": crown,
    "alpha-crown": alpha_crown,
}
"""By name, in the order of their cost."""

__all__ = [
    "TECHNIQUES",
    "Graph",
    "Kept",
    "LinearMap",
    "Region",
    "Slopes",
    "Technique",
    "alpha_crown",
    "crown",
    "crown_ibp",
    "difference_bounds",
    "interval",
    "linear_map",
    "lower_margins",
    "margins",
    "memory",
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
    statistics, no dropout) and without autocast, whatever its mode; mode and parameters stay as they are.

    Args:
        net: returns logits (batch, classes), or a tuple of K of them.
        x: images (batch, channels, height, width) in [0, 1].
        y: labels (batch,), integers.
        ball: the threat model.
        method: a name of `TECHNIQUES`.

    Returns:
        (batch, classes), entry y being exactly 0; or a tuple of K. A sample is proven where all other entries are
        positive.

    Raises:
        InputError: bad images or labels, types coarser than float32, an unknown method, or an operation without a
            rule.
    """
    bound = technique(method)
    check_batch(x, y, shape=_input_shape(net))
    with _full_precision(x):
        graph = trace(net, x)
        check_batch(x, y, classes=class_count(graph))
        lower = lower_margins(bound, graph, Region(x, ball), y)
    return lower[0] if graph.single else tuple(lower)


def output_bounds(
    net: nn.Module, x: Tensor, ball: Ball, method: str = "interval"
) -> tuple[Tensor, Tensor] | tuple[tuple[Tensor, Tensor], ...]:
    """(lower, upper) of the logits over the ball around each image, (batch, classes) each; or a tuple of K such pairs.

    Args and errors as in `margins`.
    """
    bound = technique(method)
    check_batch(x, shape=_input_shape(net))
    with _full_precision(x):
        graph = trace(net, x)
        pairs = tuple(bound(graph, Region(x, ball), None))
    return pairs[0] if graph.single else pairs


def lower_margins(bound: Technique, graph: Graph, region: Region, y: Tensor) -> list[Tensor]:
    """Lower bounds of z_y - z_j by a technique, for each output: (batch, classes), entry y being exactly 0."""
    return [low for low, _ in difference_bounds(bound, graph, region, y, upper=False)]


def difference_bounds(
    bound: Technique, graph: Graph, region: Region, y: Tensor, *, upper: bool = True
) -> list[tuple[Tensor, Tensor]]:
    """Bounds of z_y - z_j by a technique, for each output: two of (batch, classes), entries y being exactly 0.

    Args:
        bound: the technique.
        graph: the traced network; region: the inputs; y: (batch,) int64.
        upper: whether the upper ends are wanted; they may be infinite where not.
    """
    classes = class_count(graph)
    y = y.long()
    if bound is interval and 1 < classes <= 2 * len(y):
        return interval_differences(graph, region, y)
    # The true class asks for nothing: one row in ten less.
    others = torch.arange(classes - 1, device=y.device).expand(len(y), -1)
    others = others + (others >= y[:, None])
    identity = torch.eye(classes, dtype=region.x.dtype, device=y.device)
    spec = identity[y][:, None] - identity[others]
    zero = region.x.new_zeros(len(y), classes)
    if classes == 1:
        return [(zero, zero)] * len(graph.outputs)
    return [
        (zero.scatter(1, others, low), zero.scatter(1, others, high))
        for low, high in bound(graph, region, spec, upper=upper)
    ]


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


@contextlib.contextmanager
def _full_precision(x: Tensor) -> Iterator[None]:
    """No autocast: in coarser types a bound's rounding may be as large as the bound.

    Raises:
        InputError: the images are of such a type themselves.
    """
    if x.dtype not in (torch.float32, torch.float64):
        name = str(x.dtype).removeprefix("torch.")
        raise InputError(
            f"images are {name}; allowed for bounds: float32 and float64, for images and network"
        )
    with torch.autocast(x.device.type, enabled=False):
        yield


def _input_shape(net: nn.Module) -> tuple[int, ...] | None:
    config = getattr(net, "config", None)
    return tuple(config["input_shape"]) if isinstance(config, dict) else None
