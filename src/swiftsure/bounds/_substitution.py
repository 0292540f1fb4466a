"""Backward substitution: a linear function of some layer, taken back to the image between the lines of relaxations.

`symbolic`, `crown-ibp`, `crown` and `alpha-crown` differ in two choices only: which lines stand around an activation
(`parallel`: one slope for both sides; `tight`: two), and whose bounds of its inputs they rest on (intervals', or the
technique's own as well). Centres go forward once, like a plain pass; only functions whose range is asked for go back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from swiftsure.bounds import memory
from swiftsure.bounds import operations as ops
from swiftsure.bounds._interval import Intervals
from swiftsure.bounds._spec import require_spec, spec_or_logits
from swiftsure.bounds.graph import Graph
from swiftsure.bounds.region import Region
from swiftsure.bounds.relaxation import Relaxation
from swiftsure.bounds.rows import Rows, add, unit_rows

Lines = Literal["parallel", "tight"]


class Substitution:
    """The centres and relaxations of one network over one region, and bounds of functions of any node.

    The l, u of a hidden unit are the tighter, side by side, of plain intervals and, if ``refine``, of the technique's
    own bounds; so units on which intervals settle need no rows.

    Args:
        graph: the traced network.
        region: the inputs to bound over.
        lines: the shape of the relaxations.
        refine: whether to bound hidden units by substitution too, or by intervals alone.
        outputs: nodes whose functions will be asked for; None: the graph's outputs.
    """

    def __init__(
        self,
        graph: Graph,
        region: Region,
        lines: Lines,
        *,
        refine: bool,
        outputs: Sequence[int] | None = None,
    ) -> None:
        self.graph, self.region, self.lines, self.refine = graph, region, lines, refine
        self.intervals = Intervals(graph, region)
        self.centers: dict[int, Tensor] = {}
        self.relaxations: dict[int, Relaxation] = {}
        self.pools: dict[int, Tensor] = {}
        """Which input each output of a max pooling rests on: flat index into its channel."""
        self.bends: dict[int, Bends] = {}
        # Up to one linear map away from the image, intervals are exact.
        self._depth = _linear_depth(graph)
        asked = graph.outputs if outputs is None else outputs
        needed = {i for output in asked for i in graph.ancestors(output)}
        for index, node in enumerate(graph.nodes):
            operation = node.operation
            if index not in needed:
                continue
            if isinstance(operation, ops.Input):
                self.centers[index] = region.center
            elif isinstance(operation, ops.Bent):
                self.relaxations[index] = self._activation(index, operation)
                self.centers[index] = self.relaxations[index].center(self.centers[node.inputs[0]])
            elif isinstance(operation, ops.MaxPool2d):
                self.relaxations[index] = self._pooling(index, operation)
                chosen = _pick(self.centers[node.inputs[0]], self.pools[index])
                self.centers[index] = self.relaxations[index].center(chosen)
            else:
                self.centers[index] = operation.value(*[self.centers[i] for i in node.inputs])

    # Relaxations

    def _activation(self, index: int, activation: ops.Bent) -> Relaxation:
        source = self.graph.nodes[index].inputs[0]
        slope, lift, bent = activation.straight(*self.intervals[source])
        chosen = bent.flatten().nonzero()[:, 0]
        if not len(chosen):
            return Relaxation.straight(slope, lift, parallel=self.lines == "parallel")
        lower, upper = self.unit_bounds(source, chosen)
        center = self.centers[source].reshape(-1)[chosen]
        if self.lines == "parallel":
            low_slope, least, largest = activation.parallel(lower, upper)
            gap = (largest - least) / 2
            return _relaxation(
                slope, lift, chosen, low_slope, least + gap, (low_slope, -gap), (low_slope, gap), True
            )
        low_slope, least, up_slope, largest = activation.lines(lower, upper)
        self.bends[index] = Bends(activation, lower, upper, center, low_slope, up_slope, largest)
        # The reference is the line above, so that of the two gaps only that of the line below is not 0.
        low = (low_slope, (low_slope - up_slope) * center + (least - largest))
        return _relaxation(slope, lift, chosen, up_slope, largest, low, (up_slope, None), False)

    def moved(self, index: int, low_slope: Tensor, up_slope: Tensor) -> Relaxation:
        """The relaxation of an activation with other slopes at its bent units, (functions, units) each.

        The reference line stays, so centres do.
        """
        known, bends = self.relaxations[index], self.bends[index]
        activation, center = bends.activation, bends.center
        least = activation.extremes(low_slope, bends.lower, bends.upper)[0]
        low_gap = (low_slope - bends.up_slope) * center + (least - bends.largest)
        up_gap = None
        # Above a ReLU nothing beats the chord.
        if not isinstance(activation, ops.Relu):
            largest = activation.extremes(up_slope, bends.lower, bends.upper)[1]
            up_gap = (up_slope - bends.up_slope) * center + (largest - bends.largest)
        return replace(known, low_slope=low_slope, low_gap=low_gap, up_slope=up_slope, up_gap=up_gap)

    def _pooling(self, index: int, pool: ops.MaxPool2d) -> Relaxation:
        source = self.graph.nodes[index].inputs[0]
        middle, radius = self.intervals[source]
        lower, upper = middle - radius, middle + radius
        if self.refine:
            chosen = pool.contenders(lower, upper).flatten().nonzero()[:, 0]
            if len(chosen):
                refined = self.unit_bounds(source, chosen)
                lower, upper = (
                    side.reshape(-1).index_copy(0, chosen, new).view(side.shape)
                    for side, new in zip((lower, upper), refined, strict=True)
                )
        best, *ends = pool.choose(lower, upper, parallel=self.lines == "parallel")
        self.pools[index] = best
        bent = ~(ends[3] <= ends[0])  # NaN bends
        unit = bent.flatten().nonzero()[:, 0]
        low, high, floor, ceiling = (end.reshape(-1)[unit] for end in ends)
        slope, one = torch.ones_like(best, dtype=lower.dtype), torch.ones_like(low)
        # max(z, m) = m + relu(z - m), for m both floor and ceiling.
        up_slope, _, rise = _RELU.parallel(low - ceiling, high - ceiling)
        largest = rise + (one - up_slope) * ceiling
        if self.lines == "parallel":
            least = _RELU.extremes(up_slope, low - floor, high - floor)[0] + (one - up_slope) * floor
            gap = (largest - least) / 2
            return _relaxation(
                slope, None, unit, up_slope, least + gap, (up_slope, -gap), (up_slope, gap), True
            )
        low_slope = _RELU.tight(low - floor, high - floor)[0]
        center = _pick(self.centers[source], best).reshape(-1)[unit]
        low_gap = (low_slope - up_slope) * center + (one - low_slope) * floor - largest
        return _relaxation(
            slope, None, unit, up_slope, largest, (low_slope, low_gap), (up_slope, None), False
        )

    def restricted(self, samples: Tensor) -> Substitution:
        """The same for some samples of the batch, given by increasing index."""
        some = copy.copy(self)
        place = torch.full((len(self.region.x),), -1, device=samples.device)
        place[samples] = torch.arange(len(samples), device=samples.device)
        some.region = Region(self.region.x[samples], self.region.ball)
        some.intervals = Intervals(self.graph, some.region)
        some.centers = {i: center[samples] for i, center in self.centers.items()}
        some.pools = {i: best[samples] for i, best in self.pools.items()}
        some.relaxations, some.bends = {}, {}
        for i, relaxation in self.relaxations.items():
            some.relaxations[i], kept = relaxation.restricted(samples, place)
            if i in self.bends:
                some.bends[i] = self.bends[i].restricted(kept)
        return some

    # Bounds

    def unit_bounds(self, source: int, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """l, u of chosen units of a node (flat indices into its batch): (units,) each."""
        middle, radius = (side.reshape(-1)[chosen] for side in self.intervals[source])
        lower, upper = middle - radius, middle + radius
        exact = self._depth[source] <= 1 and self.region.symmetric
        if not self.refine or exact:
            return lower, upper
        center = self.centers[source]
        size = center[0].numel()
        skip, error = (frozenset(), None) if self.lines == "tight" else self._near_errors(source)
        parts = []
        for part in chosen.split(memory.rows_at_once(self._width(source), center)):
            sample = None if len(center) == 1 else part.div(size, rounding_mode="floor")
            unit = part if sample is None else part - sample * size
            rows = unit_rows(unit, self.graph.nodes[source].shape, sample, center.dtype)
            parts.append(self.reach(source, rows, skip))
        below, above = (torch.cat(side) for side in zip(*parts, strict=True))
        if error is not None:
            errors = error.reshape(-1)[chosen]
            below, above = below + errors, above + errors
        start = center.reshape(-1)[chosen]
        return torch.maximum(lower, start - below), torch.minimum(upper, start + above)

    def output(self, output: int, functions: Tensor, *, upper: bool = True) -> tuple[Tensor, Tensor]:
        """Bounds of linear functions (batch, functions, classes) of an output: (batch, functions) each."""
        center = (functions @ self.centers[output][..., None])[..., 0]
        sides = [part.reach(output, rows, upper=upper) for part, rows in self.parts(output, functions)]
        below, above = (torch.cat(side).view(center.shape) for side in zip(*sides, strict=True))
        return center - below, center + above

    def parts(self, target: int, functions: Tensor) -> Iterator[tuple[Substitution, Rows]]:
        """Linear functions (batch, functions, values) of a flat node as rows, so many samples at once as fit.

        Each with the network of these samples alone: then all have equally many rows, and no field need be copied for
        each row. Where not even one sample's functions fit, so many of these as do.
        """
        batch, count, size = functions.shape
        fit = memory.rows_at_once(self._width(target), functions)
        most = max(1, fit // count)
        for start in range(0, max(1, batch), most):
            some = functions[start : start + most]
            part = self if len(some) == batch else self._stretch(start, start + len(some))
            for few in some.split(min(count, fit), 1):
                each = few.shape[1]
                sample = torch.arange(len(few), device=few.device).repeat_interleave(each)
                yield part, Rows(few.reshape(-1, size), None if len(few) == 1 else sample, (size,), each=each)

    def _stretch(self, start: int, stop: int) -> Substitution:
        """The same for samples that follow one another, to take rows back through: centres stay those of all."""
        some = copy.copy(self)
        some.region = self.region.stretch(start, stop)
        some.pools = {i: best[start:stop] for i, best in self.pools.items()}
        some.relaxations = {i: known.stretch(start, stop) for i, known in self.relaxations.items()}
        return some

    def reach(
        self, target: int, rows: Rows, skip: frozenset[int] = frozenset(), *, upper: bool = True
    ) -> tuple[Tensor, Tensor]:
        """How far linear functions of a node fall below and rise above their value at its centre: (rows,) each.

        Errors of the ReLUs in ``skip`` are left out: the caller has them. Without ``upper`` the second is infinite.
        """
        below, above = self._descend(target, rows, skip)
        if self.lines == "tight":
            # What a function rises, its negative falls.
            above = (
                self._descend(target, rows.negative(), skip)[0]
                if upper
                else torch.full_like(below, torch.inf)
            )
        return below, above

    def _descend(self, target: int, rows: Rows, skip: frozenset[int]) -> tuple[Tensor, Tensor]:
        pending = {target: rows}
        falls: Tensor | float = 0.0
        for index in self.graph.ancestors(target):
            rows = pending.pop(index)
            operation = self.graph.nodes[index].operation
            if isinstance(operation, ops.Input):
                below, above = self.region.reach(rows)
                return below + falls, above + falls
            if isinstance(operation, ops.Bent | ops.MaxPool2d):
                rows, fall = self.relaxations[index].transpose(rows)
                if isinstance(operation, ops.MaxPool2d):
                    rows = rows.place(self.pools[index], operation.input_shape)
                if index not in skip:
                    falls = falls + fall
                parts: tuple[Rows, ...] = (rows,)
            else:
                parts = operation.transpose(rows)
            for source, part in zip(self.graph.nodes[index].inputs, parts, strict=True):
                pending[source] = add(pending[source], part) if source in pending else part
        raise AssertionError("every node depends on the image")

    def _width(self, target: int) -> int:
        return max(int(torch.Size(self.graph.nodes[i].shape).numel()) for i in self.graph.ancestors(target))

    def _near_errors(self, target: int) -> tuple[frozenset[int], Tensor | None]:
        """What the ReLUs that every unit of a node sees along one path only add to its reach, and which they are.

        They need no rows: |W| mu is one pass through the affine maps, for all units at once. Along several paths (a
        residual sum), or through two mixing maps in a row, coefficients may cancel before their magnitude counts:
        those need rows.
        """
        graph, center = self.graph, self.centers[target]
        paths = dict.fromkeys(graph.ancestors(target), 0)
        paths[target] = 1
        for index in paths:
            for source in graph.nodes[index].inputs:
                paths[source] += paths[index]
        near: set[int] = set()

        def errors(index: int, mixed: bool = False) -> Tensor | None:
            node = graph.nodes[index]
            operation = node.operation
            if isinstance(operation, ops.Bent):
                if paths[index] > 1:
                    return None
                near.add(index)
                return self.relaxations[index].errors
            if isinstance(operation, ops.Input | ops.MaxPool2d):
                return None
            mixes = not isinstance(operation, _UNMIXED)
            if mixed and mixes:
                return None
            parts = [errors(i, mixed or mixes) for i in node.inputs]
            if all(part is None for part in parts):
                return None
            known = [
                center.new_zeros(len(center), *graph.nodes[i].shape) if part is None else part
                for i, part in zip(node.inputs, parts, strict=True)
            ]
            return operation.radius(*known)

        total = errors(target)
        return (frozenset(), None) if total is None else (frozenset(near), total)


@dataclass(frozen=True)
class Bends:
    """What a technique knows of the bent units of one activation, (units,) each: enough to move its lines."""

    activation: ops.Bent
    lower: Tensor
    upper: Tensor
    center: Tensor
    low_slope: Tensor
    up_slope: Tensor
    largest: Tensor
    """Intercept of the line above."""

    def restricted(self, kept: Tensor) -> Bends:
        """The same for some units, given by a mask."""
        known = (self.lower, self.upper, self.center, self.low_slope, self.up_slope, self.largest)
        return Bends(self.activation, *[tensor[kept] for tensor in known])


_RELU = ops.Relu()
_UNMIXED = (ops.Scale, ops.Reshape)
"""Operations whose every output sees one input; so intervals stay exact, and errors cannot cancel."""


def substitution(
    lines: Lines, *, refine: bool
) -> Callable[[Graph, Region, Tensor | None, bool], list[tuple[Tensor, Tensor]]]:
    """A technique: bounds of each output, or of linear functions of it, by one kind of substitution."""

    def bound(graph: Graph, region: Region, spec: Tensor | None, upper: bool) -> list[tuple[Tensor, Tensor]]:
        require_spec(spec, graph, region)
        network = Substitution(graph, region, lines, refine=refine)
        return [
            network.output(output, spec_or_logits(network.centers[output], spec), upper=upper)
            for output in graph.outputs
        ]

    return bound


def _relaxation(
    slope: Tensor,
    lift: Tensor | None,
    unit: Tensor,
    reference: Tensor,
    intercept: Tensor,
    low: tuple[Tensor, Tensor],
    up: tuple[Tensor, Tensor | None],
    parallel: bool,
) -> Relaxation:
    """Slopes and intercepts of the reference lines of bent units joined to those of the others."""
    slope = slope.reshape(-1).index_copy(0, unit, reference).view(slope.shape)
    base = torch.zeros_like(slope) if lift is None else lift
    lift = base.reshape(-1).index_copy(0, unit, intercept).view(slope.shape)
    return Relaxation(slope, lift, unit, *low, *up, parallel)


def _pick(values: Tensor, best: Tensor) -> Tensor:
    """values (batch, channels, H, W) at flat indices (batch, channels, h, w) into each channel."""
    return values.flatten(2).gather(2, best.flatten(2)).view(best.shape)


def _linear_depth(graph: Graph) -> list[int]:
    """How many mixing maps lie between the input and each node; a bend or a sum counts as out of reach."""
    depth: list[int] = []
    for node in graph.nodes:
        operation = node.operation
        if isinstance(operation, ops.Input):
            depth.append(0)
        elif isinstance(operation, ops.Bent | ops.MaxPool2d) or len(node.inputs) > 1:
            depth.append(2)
        else:
            depth.append(depth[node.inputs[0]] + (not isinstance(operation, _UNMIXED)))
    return depth
