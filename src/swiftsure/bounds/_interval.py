"""Interval bounds: a centre and a half-width for every value, layer by layer (Gowal et al. 2018)."""

from __future__ import annotations

from torch import Tensor

from swiftsure.bounds import operations as ops
from swiftsure.bounds.graph import Graph
from swiftsure.bounds.region import Region


class Intervals:
    """Centres and half-widths of a graph's nodes, computed when asked for.

    Args:
        graph: the traced network.
        region: what to bound over; only its clipped box counts.
    """

    def __init__(self, graph: Graph, region: Region) -> None:
        self.graph = graph
        self._known: dict[int, tuple[Tensor, Tensor]] = {0: (region.box_center, region.box_radius)}

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """(centre, half-width) of a node: (batch, *shape) each."""
        for i in reversed(self.graph.ancestors(index)):
            if i in self._known:
                continue
            node = self.graph.nodes[i]
            inputs = [self._known[j] for j in node.inputs]
            if isinstance(node.operation, ops.Relu):
                (center, radius) = inputs[0]
                upper, lower = (center + radius).relu(), (center - radius).relu()
                self._known[i] = (upper + lower) / 2, (upper - lower) / 2
            else:
                assert not isinstance(node.operation, ops.Input)
                centers, radii = zip(*inputs, strict=True)
                self._known[i] = node.operation.value(*centers), node.operation.radius(*radii)
        return self._known[index]


def interval(graph: Graph, region: Region, spec: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
    """Interval bounds of each output, or of linear functions of it.

    Args:
        graph: the traced network.
        region: the inputs to bound over.
        spec: (batch, functions, classes): rows of linear functions of the logits, merged into the last linear layer;
            None for the logits themselves.

    Returns:
        For each output (lower, upper): (batch, functions) or (batch, classes) each.
    """
    known = Intervals(graph, region)
    bounds = []
    for output in graph.outputs:
        node = graph.nodes[output]
        if spec is None:
            center, radius = known[output]
        elif isinstance(node.operation, ops.Linear):
            layer = node.operation.module
            center, radius = known[node.inputs[0]]
            merged = spec @ layer.weight
            radius = (merged.abs() @ radius[..., None])[..., 0]
            center = (spec @ layer(center)[..., None])[..., 0]
        else:
            center, radius = (
                (matrix @ part[..., None])[..., 0]
                for matrix, part in zip((spec, spec.abs()), known[output], strict=True)
            )
        bounds.append((center - radius, center + radius))
    return bounds


def stable(center: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Which units are always on, and which are not proven to be always on or always off: bool, shaped like centre."""
    active = center >= radius
    # Written so that NaN is not stable.
    return active, ~active & ~(center <= -radius)
