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
            operation = node.operation
            inputs = [self._known[j] for j in node.inputs]
            if isinstance(operation, ops.Bent | ops.MaxPool2d):
                (center, radius) = inputs[0]
                lower, upper = operation.range(center - radius, center + radius)
                self._known[i] = (upper + lower) / 2, (upper - lower) / 2
            else:
                assert not isinstance(operation, ops.Input)
                centers, radii = zip(*inputs, strict=True)
                self._known[i] = operation.value(*centers), operation.radius(*radii)
        return self._known[index]


def interval(
    graph: Graph, region: Region, spec: Tensor | None = None, *, upper: bool = True
) -> list[tuple[Tensor, Tensor]]:
    """Interval bounds of each output, or of linear functions of it.

    Args:
        graph: the traced network.
        region: the inputs to bound over.
        spec: (batch, functions, classes): rows of linear functions of the logits, merged into the last linear layer;
            None for the logits themselves.
        upper: whether upper bounds are wanted (here they cost nothing).

    Returns:
        For each output (lower, upper): (batch, functions) or (batch, classes) each.
    """
    known = Intervals(graph, region)
    bounds = []
    for output in graph.outputs:
        node = graph.nodes[output]
        operation = node.operation
        if spec is None:
            center, radius = known[output]
        elif isinstance(operation, ops.Linear):
            center, radius = known[node.inputs[0]]
            merged = spec @ operation.weight
            radius = (merged.abs() @ radius[..., None])[..., 0]
            center = (spec @ operation.value(center)[..., None])[..., 0]
        else:
            center, radius = (
                (matrix @ part[..., None])[..., 0]
                for matrix, part in zip((spec, spec.abs()), known[output], strict=True)
            )
        bounds.append((center - radius, center + radius))
    return bounds
