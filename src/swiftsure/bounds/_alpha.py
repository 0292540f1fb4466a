"""alpha-CROWN: CROWN with the slopes of its lines found by gradient ascent (Xu et al. 2021, arXiv 2011.13824).

Every slope gives a sound bound (`operations.activations`), so slopes may be whatever an optimiser makes of them. Each
function asked for has slopes of its own, at every bent unit of every layer; hidden l, u are CROWN's and stay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from swiftsure.bounds import memory
from swiftsure.bounds import operations as ops
from swiftsure.bounds._substitution import Substitution, spec_or_logits
from swiftsure.bounds.graph import Graph
from swiftsure.bounds.region import Region
from swiftsure.bounds.rows import Rows

STEPS = 30
RATE = 0.25
DECAY = 0.96
"""Adam's rate at the start, and what is left of it after each step."""
ENOUGH = 1e-3
"""A margin above this is proven, well clear of rounding; its ascent ends."""


def alpha_crown(
    graph: Graph,
    region: Region,
    spec: Tensor | None = None,
    *,
    upper: bool = True,
    steps: int = STEPS,
) -> list[tuple[Tensor, Tensor]]:
    """CROWN's bounds, improved; never looser than CROWN's, as that is where the ascent starts and the best is kept.

    Lower bounds that are positive already, those of proven margins, are left alone; without ``upper`` the ascent ends
    as soon as all are. Not for training: the results carry no gradient.

    Args:
        graph, region, spec, upper: as of `crown`.
        steps: of gradient ascent.

    Returns:
        For each output (lower, upper): (batch, functions) or (batch, classes) each.
    """
    # In a caller's inference mode nothing has gradients, nor has what was made in it: hence the copies.
    with torch.inference_mode(False), torch.no_grad():
        region, spec = Region(region.x.clone(), region.ball), None if spec is None else spec.clone()
        network = Substitution(graph, region, "tight", refine=True)
        bounds = []
        for output in graph.outputs:
            functions = spec_or_logits(network.centers[output], spec)
            lower = network.output(output, functions, upper=False)[0]
            lower = _ascend(
                network, output, functions, lower, steps, until_positive=spec is not None and not upper
            )
            if upper:
                rise = network.output(output, -functions, upper=False)[0]
                rise = -_ascend(network, output, -functions, rise, steps, until_positive=False)
            else:
                rise = torch.full_like(lower, torch.inf)
            bounds.append((lower, rise))
    return bounds


def _ascend(
    network: Substitution, output: int, functions: Tensor, lower: Tensor, steps: int, *, until_positive: bool
) -> Tensor:
    """Better lower bounds (batch, functions) of functions (batch, functions, classes), from CROWN's."""
    best = lower.clone()
    # Written so that NaN stays open.
    open_ = ~(lower > ENOUGH) if until_positive else torch.ones_like(lower, dtype=torch.bool)
    undecided = open_.any(1).nonzero()[:, 0]
    if not network.bends:
        return best
    # One sample's slopes do not depend on another's: so many samples at once as fit.
    nodes = network.graph.ancestors(output)
    units = max(1, sum(len(bends.lower) for bends in network.bends.values()) // len(lower))
    values = sum(int(torch.Size(network.graph.nodes[i].shape).numel()) for i in nodes)
    size = functions.shape[1] * (values + _TENSORS_OF_A_SLOPE * units)
    for samples in undecided.split(memory.rows_at_once(size, lower)):
        some = network.restricted(samples)
        best[samples] = _run(
            some, output, functions[samples], best[samples], open_[samples], steps, until_positive
        )
    return best


_TENSORS_OF_A_SLOPE = 4


def _run(
    network: Substitution,
    output: int,
    functions: Tensor,
    best: Tensor,
    open_: Tensor,
    steps: int,
    until_positive: bool,
) -> Tensor:
    """Gradient ascent on the lower bounds that are open, all functions and samples at once."""
    count = functions.shape[1]
    relaxations = network.relaxations
    network.relaxations = dict(relaxations)
    low = {i: b.low_slope.expand(count, -1).clone().requires_grad_() for i, b in network.bends.items()}
    up = {
        # Above a ReLU nothing beats the chord.
        i: b.up_slope.expand(count, -1).clone().requires_grad_(not isinstance(b.activation, ops.Relu))
        for i, b in network.bends.items()
    }
    parameters = [slope for slope in (*low.values(), *up.values()) if slope.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=RATE)
    decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, DECAY)
    for step in range(steps + 1):
        sample, function = open_.nonzero(as_tuple=True)
        if not len(sample):
            break
        rows = Rows(functions[sample, function], sample, (functions.shape[2],), function=function)
        with torch.enable_grad():
            for i in low:
                network.relaxations[i] = network.moved(i, low[i], up[i])
            center = (rows.values * network.centers[output][sample]).sum(1)
            found = center - network.reach(output, rows, upper=False)[0]
            loss = -found.sum()
        # fmax, so that NaN never displaces a bound.
        best[sample, function] = torch.fmax(best[sample, function], found.detach())
        if until_positive:
            open_ = open_ & ~(best > ENOUGH)
        if step == steps or not loss.requires_grad:
            break
        # Not by `backward`, which would also add to the gradients of the network's own parameters.
        for slope, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True
        ):
            slope.grad = gradient
        optimizer.step()
        decay.step()
        for slopes in (low, up):
            for i, slope in slopes.items():
                activation = network.bends[i].activation
                if isinstance(activation, ops.PiecewiseLinear):
                    # Steeper lines than any piece only lose.
                    slope.data.clamp_(min(activation.slopes), max(activation.slopes))
    network.relaxations = relaxations
    return best
