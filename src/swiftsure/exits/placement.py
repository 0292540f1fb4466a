"""Where default exits go, and how large their heads are: by equal shares of cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor, fx, nn

from swiftsure.errors import InputError
from swiftsure.exits.counting import counting
from swiftsure.exits.cutting import Flow
from swiftsure.exits.heads import Description, sized
from swiftsure.exits.tracing import Trace, batch_first, in_mode

HEADS_SHARE = 0.1
"""All default side heads together cost at most this share of the backbone; each may cost the same."""


@dataclass(frozen=True)
class Place:
    """Behind a module: what it returns for one sample, and the share of the backbone's cost up to there."""

    name: str
    shape: tuple[int, ...]
    share: float
    crossing: int
    """How many tensors would have to be carried over a cut here."""


def placed(backbone: nn.Module, exits: int, example: Tensor, classes: int) -> dict[str, Description]:
    """Module names and heads for exits - 1 side exits, behind as nearly as possible equal shares of the cost.

    Of the places near a share that carry least over the cut, the one with the smallest output is taken.

    Args:
        backbone: images -> logits.
        exits: K, the last one, the backbone's own, included.
        example: an image or a batch (B, C, H, W).
        classes: of the backbone.

    Raises:
        InputError: exits below 1, more exits than places, or a backbone that cannot be traced.
    """
    if isinstance(exits, bool) or not isinstance(exits, int) or exits < 1:
        raise InputError(
            f"exits is {exits!r}; allowed: an integer >= 1, or a table of module names and heads"
        )
    if exits == 1:
        return {}
    total, places = survey(backbone, example)
    if len(places) < exits - 1:
        raise InputError(
            f"exits is {exits}, and {type(backbone).__name__} has {len(places)} places to cut; "
            f"allowed: 1 to {len(places) + 1}, or a table of module names and heads"
        )
    # A cut inside a residual block carries the skip along; such places count only where there are too few others.
    bearable = sorted(place.crossing for place in places)[exits - 2]
    places = [place for place in places if place.crossing <= bearable]
    chosen: list[int] = []
    for number in range(1, exits):
        # Each exit leaves room for those behind it.
        free = range(chosen[-1] + 1 if chosen else 0, len(places) - (exits - 1 - number))
        goal = number / exits
        near = [index for index in free if abs(places[index].share - goal) <= 0.25 / exits]
        if near:
            chosen.append(
                min(near, key=lambda index: (places[index].crossing, Size(places[index].shape).numel()))
            )
        else:
            chosen.append(min(free, key=lambda index: abs(places[index].share - goal)))
    budget = int(HEADS_SHARE * total / (exits - 1))
    return {places[index].name: sized(places[index].shape, classes, budget) for index in chosen}


def survey(backbone: nn.Module, example: Tensor) -> tuple[int, list[Place]]:
    """The backbone's multiply-adds, and every place to cut, in order; of places with the same cost the last.

    Raises:
        InputError: it cannot be traced.
    """
    with in_mode(backbone, False):
        trace = Trace(backbone)
        flow = Flow(trace.graph, trace.record(backbone, example))
        total, costs = _costs(backbone, example)
    modules = dict(backbone.named_modules())
    by_cost: dict[int, Place] = {}
    for name, spent in costs.items():
        node = _end(trace, flow, modules[name])
        if node is not None and 0 < spent < total:
            crossing = len(flow.crossing(flow.position[node]) - {node})
            place = Place(name, tuple(flow.seen[node][0][1:]), spent / total, crossing)
            known = by_cost.get(spent)
            if known is None or place.crossing <= known.crossing:
                by_cost[spent] = place
    return total, [by_cost[spent] for spent in sorted(by_cost)]


def _end(trace: Trace, flow: Flow, module: nn.Module) -> fx.Node | None:
    """The value that a module returns, if it runs once and the batch is its first axis."""
    calls = trace.returned.get(module, [])
    if len(calls) != 1 or calls[0] is None or not batch_first(flow.seen[calls[0]]):
        return None
    shape = flow.seen[calls[0]][0]
    return calls[0] if len(shape) in (2, 3, 4) and calls[0] is not flow.output.args[0] else None


def _costs(backbone: nn.Module, example: Tensor) -> tuple[int, dict[str, int]]:
    """Multiply-adds of one image through the backbone, and up to the end of each module, in order of their ends."""
    spent: dict[str, int] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            spent.pop(name, None)
            spent[name] = int(counter.get_total_flops()) // 2

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in backbone.named_modules() if name]
    image = torch.zeros(1, *example.shape[1:], device=example.device, dtype=example.dtype)
    try:
        with torch.no_grad(), counting() as counter:
            backbone(image)
    finally:
        for handle in handles:
            handle.remove()
    return int(counter.get_total_flops()) // 2, spent
