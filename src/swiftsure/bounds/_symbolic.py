"""MixTrain's symbolic linear relaxation (Wang et al. 2018, arXiv 1811.02625), by backward substitution.

The relaxation carries, for each value z, an affine function of the input and of one error symbol per unstable unit:
z = c + sum_p a_p (x_p - x0_p) + sum_k b_k eta_k, with eta in [-1, 1]. At a ReLU with pre-activation bounds
l < 0 < u the slope is s = u / (u - l): c becomes s c + mu, all coefficients are scaled by s, and a fresh symbol of
size mu = -s l / 2 appears. Stable units pass or vanish. The bounds of z are c plus or minus what the ball lets
sum a_p (x_p - x0_p) reach, plus or minus sum |b_k|.

The paper pushes all a and b forward through the layers, a dense tensor of inputs by neurons. With the same slopes and
the same l, u, the coefficients of one function of one layer are also its gradient taken backward through the affine
maps, with each ReLU replaced by its slope. So here centres go forward once, like a plain forward pass, and only the
functions whose range is wanted are taken back: units that intervals leave unstable, and the margins. The values are
the same; on mnist_small the work is a fraction of the dense form's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from swiftsure.bounds import operations as ops
from swiftsure.bounds._interval import Intervals, stable
from swiftsure.bounds.graph import Graph
from swiftsure.bounds.region import Region
from swiftsure.bounds.relaxation import Relaxation
from swiftsure.bounds.rows import Rows, add, unit_rows

ROW_ELEMENTS = 1 << 25
"""How many coefficients of one node are held at once (128 MiB of float32)."""


def symbolic(graph: Graph, region: Region, spec: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
    """Bounds of each output, or of linear functions of it, by MixTrain's relaxation.

    The l, u of a hidden unit are the tighter, side by side, of the relaxation's own and of plain intervals; so units
    that intervals prove stable need no rows. Outputs are the relaxation's own: neither technique is tighter everywhere.

    Args:
        graph: the traced network.
        region: the inputs to bound over.
        spec: (batch, functions, classes), or None for the logits themselves.

    Returns:
        For each output (lower, upper): (batch, functions) or (batch, classes) each.
    """
    intervals = Intervals(graph, region)
    # A node is elementwise in the input, or one linear map away from it; intervals are exact up to there.
    depth = _linear_depth(graph)
    centers: dict[int, Tensor] = {}
    relaxations: dict[int, Relaxation] = {}
    for index, node in enumerate(graph.nodes):
        operation = node.operation
        if isinstance(operation, ops.Input):
            centers[index] = region.center
        elif isinstance(operation, ops.Relu):
            source = node.inputs[0]
            center = centers[source]
            relaxation = _relax(
                graph, region, intervals, relaxations, source, center, exact=depth[source] <= 1
            )
            relaxations[index] = relaxation
            centers[index] = torch.addcmul(relaxation.error, relaxation.slope, center)
        else:
            centers[index] = operation.value(*[centers[i] for i in node.inputs])

    bounds = []
    for output in graph.outputs:
        batch, classes = centers[output].shape
        functions = (
            torch.eye(classes, dtype=region.x.dtype, device=region.x.device).expand(batch, -1, -1)
            if spec is None
            else spec
        )
        count = functions.shape[1]
        sample = _rows_of_samples(batch, count, region.x.device)
        rows = Rows(functions.reshape(-1, classes), sample, (classes,))
        below, above = _reach(graph, region, relaxations, output, rows)
        center = (functions @ centers[output][..., None])[..., 0]
        bounds.append((center - below.view(batch, count), center + above.view(batch, count)))
    return bounds


def _rows_of_samples(batch: int, count: int, device: torch.device) -> Tensor | None:
    return None if batch == 1 else torch.arange(batch, device=device).repeat_interleave(count)


def _linear_depth(graph: Graph) -> list[int]:
    """How many mixing maps lie between the input and each node; a ReLU or a sum counts as out of reach."""
    depth: list[int] = []
    for node in graph.nodes:
        if isinstance(node.operation, ops.Input):
            depth.append(0)
        elif isinstance(node.operation, ops.Linear | ops.Conv2d):
            depth.append(depth[node.inputs[0]] + 1)
        elif isinstance(node.operation, ops.Scale | ops.Reshape):
            depth.append(depth[node.inputs[0]])
        else:
            depth.append(2)
    return depth


def _relax(
    graph: Graph,
    region: Region,
    intervals: Intervals,
    relaxations: dict[int, Relaxation],
    source: int,
    center: Tensor,
    *,
    exact: bool,
) -> Relaxation:
    """The relaxation of a ReLU on node ``source``, whose centre is given."""
    middle, radius = intervals[source]
    active, open_ = stable(middle, radius)
    chosen = open_.flatten().nonzero()[:, 0]
    if not len(chosen):
        return Relaxation.stable(active, center.dtype)
    middle, radius = middle.reshape(-1)[chosen], radius.reshape(-1)[chosen]
    lower, upper = middle - radius, middle + radius
    if not (exact and region.symmetric):
        below, above = _unit_reach(graph, region, relaxations, source, chosen, center)
        start = center.reshape(-1)[chosen]
        lower, upper = torch.maximum(lower, start - below), torch.minimum(upper, start + above)
    falls, rises = (-lower).relu(), upper.relu()
    # rises / (rises + falls) is u / (u - l), and 1 or 0 where the relaxation itself proves the unit stable.
    slope = rises / (rises + falls).clamp_min(torch.finfo(center.dtype).tiny)
    return Relaxation.of(active, chosen, slope, slope * falls / 2)


def _unit_reach(
    graph: Graph,
    region: Region,
    relaxations: dict[int, Relaxation],
    source: int,
    chosen: Tensor,
    center: Tensor,
) -> tuple[Tensor, Tensor]:
    """How far chosen units of a node (indices into its flattened batch) reach below and above their centres."""
    size = center[0].numel()
    width = max(_size(graph.nodes[i].shape) for i in graph.ancestors(source))
    # The nearest ReLUs' errors need no rows: |W| mu is one pass through the affine maps, for all units at once.
    near = _near_errors(graph, relaxations, source, center)
    skip, error = near if near is not None else (frozenset(), None)
    parts = []
    for part in chosen.split(max(1, ROW_ELEMENTS // width)):
        sample = None if len(center) == 1 else part.div(size, rounding_mode="floor")
        unit = part if sample is None else part - sample * size
        rows = unit_rows(unit, graph.nodes[source].shape, sample, center.dtype)
        parts.append(_reach(graph, region, relaxations, source, rows, skip))
    below, above = (torch.cat(side) for side in zip(*parts, strict=True))
    if error is None:
        return below, above
    errors = error.reshape(-1)[chosen]
    return below + errors, above + errors


def _near_errors(
    graph: Graph, relaxations: dict[int, Relaxation], target: int, center: Tensor
) -> tuple[frozenset[int], Tensor] | None:
    """What the ReLUs that every unit of a node sees along one path only add to its reach, and which they are.

    Along several paths (a residual sum), or through two mixing maps in a row, coefficients may cancel before their
    magnitude counts: those need rows.
    """
    paths = dict.fromkeys(graph.ancestors(target), 0)
    paths[target] = 1
    for index in paths:
        for source in graph.nodes[index].inputs:
            paths[source] += paths[index]
    near: set[int] = set()

    def errors(index: int, mixed: bool = False) -> Tensor | None:
        node = graph.nodes[index]
        mixes = isinstance(node.operation, ops.Linear | ops.Conv2d)
        if mixed and mixes:
            return None
        if isinstance(node.operation, ops.Relu):
            if paths[index] > 1:
                return None
            near.add(index)
            return relaxations[index].error
        if isinstance(node.operation, ops.Input):
            return None
        parts = [errors(i, mixed or mixes) for i in node.inputs]
        if all(part is None for part in parts):
            return None
        known = [
            center.new_zeros(len(center), *graph.nodes[i].shape) if part is None else part
            for i, part in zip(node.inputs, parts, strict=True)
        ]
        return node.operation.radius(*known)

    total = errors(target)
    return None if total is None else (frozenset(near), total)


def _size(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _reach(
    graph: Graph,
    region: Region,
    relaxations: dict[int, Relaxation],
    target: int,
    rows: Rows,
    skip: frozenset[int] = frozenset(),
) -> tuple[Tensor, Tensor]:
    """How far linear functions of a node fall below and rise above their value at its centre: (rows,) each.

    The errors of the ReLUs in ``skip`` are left out: the caller has them.
    """
    pending = {target: rows}
    errors: Tensor | float = 0.0
    for index in graph.ancestors(target):
        rows = pending.pop(index)
        operation = graph.nodes[index].operation
        if isinstance(operation, ops.Input):
            below, above = region.reach(rows)
            return below + errors, above + errors
        if isinstance(operation, ops.Relu):
            scaled, error = relaxations[index].transpose(rows)
            if index not in skip:
                errors = errors + error
            parts: tuple[Rows, ...] = (scaled,)
        else:
            parts = operation.transpose(rows)
        for source, part in zip(graph.nodes[index].inputs, parts, strict=True):
            pending[source] = add(pending[source], part) if source in pending else part
    raise AssertionError("every node depends on the image")
