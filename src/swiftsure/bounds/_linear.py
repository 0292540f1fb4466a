"""The linear function of the image that a relaxation bounds an output by: which way to move, not only how far it goes.

Attacks that look at a whole region take their direction from it (MixTrain's interval attack).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from swiftsure.bounds._substitution import Substitution
from swiftsure.bounds.graph import Graph
from swiftsure.bounds.region import Region
from swiftsure.bounds.rows import Rows


class LinearMap(NamedTuple):
    """Functions f of an output as functions of the image x': |f - value - <coefficients, x' - center>| <= error."""

    coefficients: Tensor
    """(batch, functions, channels, height, width)."""
    value: Tensor
    """(batch, functions): at `Region.center`, by the middle lines of the relaxations."""
    error: Tensor
    """(batch, functions), >= 0; it holds for all of the region."""
    lower: Tensor
    """(batch, functions): the least that f can be over the region."""


class _Recording(Region):
    """A region that keeps the last rows that were taken back to it."""

    rows: Rows

    def reach(self, rows: Rows) -> tuple[Tensor, Tensor]:
        self.rows = rows
        return super().reach(rows)


def linear_map(
    graph: Graph, region: Region, spec: Tensor, output: int = -1, *, refine: bool = True
) -> LinearMap:
    """Linear functions of one output's logits as linear functions of the image, by MixTrain's relaxation.

    Its lines are parallel, so one set of coefficients bounds a function from both sides (`symbolic`).

    Args:
        graph: the traced network.
        region: the images that it holds for.
        spec: (batch, functions, classes), rows of functions of the logits.
        output: which exit, counted from 0; -1 is the last.
        refine: whether hidden units are bounded by the relaxation as well, as `symbolic` does, or by intervals
            alone: looser, but a row for each function instead of one for each unit.
    """
    network = Substitution(graph, _Recording(region.x, region.ball), "parallel", refine=refine)
    target = graph.outputs[output]
    batch, count = spec.shape[:2]
    coefficients, falls, reaches = [], [], []
    for part, rows in network.parts(target, spec):
        falls.append(part.reach(target, rows)[0])
        assert isinstance(part.region, _Recording)
        on_image = part.region.rows
        reaches.append(part.region.reach(on_image)[0])
        coefficients.append(on_image.dense().spread().values)
    value = (spec @ network.centers[target][..., None])[..., 0]
    fall, reach = (torch.cat(parts).view(batch, count) for parts in (falls, reaches))
    shape = (batch, count, *region.x.shape[1:])
    return LinearMap(torch.cat(coefficients).view(shape), value, fall - reach, value - fall)
