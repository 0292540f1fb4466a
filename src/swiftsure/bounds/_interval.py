"""Interval bounds: a centre and a half-width for every value, layer by layer (Gowal et al. 2018)."""

from __future__ import annotations

import torch
from torch import Tensor

from swiftsure.bounds import operations as ops
from swiftsure.bounds._spec import require_spec
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
    require_spec(spec, graph, region)
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


def interval_differences(graph: Graph, region: Region, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Interval bounds of z_y - z_j, the same as with a spec of these rows, for many samples of few classes.

    Merged into a wide last layer such a spec is a matrix for each sample. But |W_a - W_b| is one row for each pair of
    classes, whatever the sample: one product bounds all pairs, and each sample takes its own.

    Args:
        graph: the traced network; region: the inputs; y: (batch,) int64.

    Returns:
        For each output (lower, upper): (batch, classes) each, entries y being 0.
    """
    known = Intervals(graph, region)
    bounds = []
    for output in graph.outputs:
        node = graph.nodes[output]
        operation = node.operation
        classes = node.shape[0]
        first, second = torch.triu_indices(classes, classes, 1, device=y.device)
        if isinstance(operation, ops.Linear):
            center, radius = known[node.inputs[0]]
            center = operation.value(center)
            pairs = radius @ (operation.weight[first] - operation.weight[second]).abs().T
        else:
            center, radius = known[output]
            pairs = radius[:, first] + radius[:, second]
        place = torch.full((classes, classes), len(first), device=y.device)
        place[first, second] = place[second, first] = torch.arange(len(first), device=y.device)
        # The pair of a class with itself is the last column, of zeros.
        radius = torch.cat([pairs, pairs.new_zeros(len(pairs), 1)], 1).gather(1, place[y])
        center = center.gather(1, y[:, None]) - center
        bounds.append((center - radius, center + radius))
    return bounds
