"""A network as a short list of operations."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from swiftsure.bounds import operations as ops


@dataclass(frozen=True)
class Node:
    """One operation: where its inputs stand in the list, and the shape of one sample's values."""

    operation: ops.Operation
    inputs: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Graph:
    """Operations in the order of evaluation; the first is the image. ``outputs`` indexes the exits' logits."""

    nodes: list[Node]
    outputs: list[int]
    single: bool
    """Whether the network returns one tensor rather than a tuple."""

    def values(self, x: Tensor) -> list[Tensor]:
        """The outputs at some images (batch, channels, height, width), as the network computes them."""
        known: list[Tensor] = []
        for node in self.nodes:
            inputs = [known[i] for i in node.inputs]
            operation = node.operation
            known.append(x if isinstance(operation, ops.Input) else operation.value(*inputs))
        return [known[output] for output in self.outputs]

    def only(self, number: int) -> Graph:
        """The same with one of its outputs alone; nodes that it does not depend on stay, and are not asked for."""
        return replace(self, outputs=[self.outputs[number]])

    def ancestors(self, target: int) -> list[int]:
        """The nodes that ``target`` depends on, itself included, from last to first."""
        needed = {target}
        order = []
        for index in range(target, -1, -1):
            if index in needed:
                order.append(index)
                needed.update(self.nodes[index].inputs)
        return order
