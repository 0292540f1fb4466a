"""Batch norm after a convolution, folded into its weights: one pass over the maps less, in every direction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from swiftsure.bounds import operations as ops
from swiftsure.bounds.graph import Graph, Node


def folded(graph: Graph) -> Graph:
    """The same graph with each per-channel scale, whose input is a convolution that nothing else reads, joined to it.

    Weights are scaled at every pass, as they follow training; they are small beside the maps. (Not so those of a linear
    layer, which are left alone.) Bounds are the same: |s| |W| = |s W|.
    """
    readers = Counter(index for node in graph.nodes for index in node.inputs)
    readers.update(graph.outputs)
    nodes: list[Node] = []
    place: dict[int, int] = {}
    for index, node in enumerate(graph.nodes):
        operation = node.operation
        source = graph.nodes[node.inputs[0]] if node.inputs else None
        if (
            isinstance(operation, ops.Scale)
            and source is not None
            and type(source.operation) is ops.Conv2d
            and readers[node.inputs[0]] == 1
            and _per_channel(operation, node.shape[0])
        ):
            # The convolution was the last node that was kept, or one before it: nothing else refers to it.
            convolution = source.operation
            nodes[place[node.inputs[0]]] = Node(
                replace(convolution, read=_joined(convolution, operation)),
                tuple(place[i] for i in source.inputs),
                node.shape,
            )
            place[index] = place[node.inputs[0]]
            continue
        place[index] = len(nodes)
        nodes.append(Node(operation, tuple(place[i] for i in node.inputs), node.shape))
    return Graph(nodes, [place[output] for output in graph.outputs], graph.single)


def _per_channel(scale: ops.Scale, channels: int) -> bool:
    shapes = [part.shape for part in scale.read() if part is not None]
    return len(shapes) == 2 and all(tuple(shape) == (channels, 1, 1) for shape in shapes)


def _joined(convolution: ops.Conv2d, scale: ops.Scale) -> Callable[[], tuple[Tensor, Tensor]]:
    """s (W z + b) + t as (s W) z + (s b + t)."""

    def read() -> tuple[Tensor, Tensor]:
        weight, bias = convolution.read()
        factor, shift = scale.read()
        assert factor is not None and shift is not None
        shift = shift.flatten()
        return weight * factor[..., None], shift if bias is None else shift + factor.flatten() * bias

    return read
