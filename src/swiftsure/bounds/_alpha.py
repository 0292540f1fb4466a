"""alpha-CROWN: CROWN with the slopes of its lines found by gradient ascent (Xu et al. 2021, arXiv 2011.13824).

Every slope gives a sound bound (`operations.activations`), so slopes may be whatever an optimiser makes of them. Each
function asked for has slopes of its own, at every bent unit of every layer; hidden l, u are CROWN's and stay.

Below a ReLU a slope is one of 256 from 0 to 1, so that a proof can be written down in bytes and computed again; on the
networks that were tried, margins lose less than 3e-4 by it, and nothing on average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swiftsure.bounds import memory
from swiftsure.bounds import operations as ops
from swiftsure.bounds._spec import require_spec, spec_or_logits
from swiftsure.bounds._substitution import Substitution
from swiftsure.bounds.graph import Graph
from swiftsure.bounds.region import Region
from swiftsure.bounds.rows import Rows

STEPS = 30
RATE = 0.25
DECAY = 0.96
"""Adam's rate at the start, and what is left of it after each step."""
BETAS = (0.9, 0.999)
ENOUGH = 1e-3
"""A margin above this is proven, well clear of rounding; its ascent ends."""
PACE = 3
"""Steps over which it is seen how fast a margin grows."""
LEVELS = 255
"""A slope below a ReLU is a whole number of this part of 1."""


@dataclass(frozen=True)
class Slopes:
    """The slopes below ReLUs by which some functions of one output are bounded best, for one sample; on the CPU.

    Attributes:
        function: (rows,) int64, which of the functions that were asked for; others are bounded best by CROWN's slopes.
        unit: (units,) int64, increasing: counted through all ReLUs of the network, in the order of execution. Those not
            named have CROWN's slopes, or are no longer bent.
        levels: (rows, units) uint8, slopes in units of 1 / `LEVELS`.
    """

    function: Tensor
    unit: Tensor
    levels: Tensor


Kept = dict[tuple[int, int, bool], Slopes]
"""Slopes by (sample, output, whether the function was bounded from above); none where the ascent gained nothing."""


def alpha_crown(
    graph: Graph,
    region: Region,
    spec: Tensor | None = None,
    *,
    upper: bool = True,
    steps: int = STEPS,
    kept: Kept | None = None,
    climb: Tensor | None = None,
    only: int | None = None,
    give_up: bool = False,
) -> list[tuple[Tensor, Tensor]]:
    """CROWN's bounds, improved; never looser than CROWN's, as that is where the ascent starts and the best is kept.

    Lower bounds that are positive already, those of proven margins, are left alone; without ``upper`` the ascent ends
    as soon as all are. Not for training: the results carry no gradient.

    Args:
        graph, region, spec, upper: as of `crown`.
        steps: of gradient ascent.
        kept: where given, the slopes that were found are put here; networks with other activations than ReLU give none.
        climb: (batch, outputs, 2) bool, whether a sample's lower and upper bounds of an output are worth an ascent;
            others are CROWN's. Where no upper bound of an output is, all that counts is whether its lower ones are
            positive. None: all are.
        only: the one output that is bounded; bounds of the others are infinite. None: all are.
        give_up: whether to leave a sample, where all that counts is whether lower bounds are positive, once one of them
            would not become so at its recent pace. Steps shrink, and so do gains.

    Returns:
        For each output (lower, upper): (batch, functions) or (batch, classes) each.
    """
    require_spec(spec, graph, region)
    # In a caller's inference mode nothing has gradients, nor has what was made in it: hence the copies.
    with torch.inference_mode(False), torch.no_grad():
        region, spec = Region(region.x.clone(), region.ball), None if spec is None else spec.clone()
        wanted = None if only is None else [graph.outputs[only]]
        network = Substitution(graph, region, "tight", refine=True, outputs=wanted)
        if climb is None:
            climb = torch.ones(len(region.x), len(graph.outputs), 2, dtype=torch.bool, device=region.x.device)
        bounds = []
        for number, output in enumerate(graph.outputs):
            if only not in (None, number):
                shape = (len(region.x), graph.nodes[output].shape[0] if spec is None else spec.shape[1])
                nothing = region.x.new_full(shape, torch.inf)
                bounds.append((-nothing, nothing))
                continue
            functions = spec_or_logits(network.centers[output], spec)
            sides = [torch.full(functions.shape[:2], torch.inf).to(functions) for _ in range(2)]
            for above in (False, True)[: 1 + upper]:
                asked = -functions if above else functions
                until_positive = spec is not None and not (upper and climb[:, number, 1].any())
                sides[above], found = _ascend(
                    network,
                    output,
                    asked,
                    climb[:, number, int(above)],
                    steps,
                    until_positive,
                    give_up,
                    kept is not None,
                )
                if kept is not None:
                    kept.update({(sample, number, above): slopes for sample, slopes in found.items()})
            bounds.append((sides[0], -sides[1] if upper else sides[1]))
    return bounds


def _ascend(
    network: Substitution,
    output: int,
    functions: Tensor,
    climb: Tensor,
    steps: int,
    until_positive: bool,
    give_up: bool,
    keep: bool,
) -> tuple[Tensor, dict[int, Slopes]]:
    """Lower bounds (batch, functions) of functions (batch, functions, classes), and the slopes of those that climbed.

    They are CROWN's, or better where samples climb: (batch,) bool.
    """
    best = network.output(output, functions, upper=False)[0]
    open_ = climb[:, None].expand_as(best)
    if until_positive:
        # Written so that NaN stays open.
        open_ = open_ & ~(best > ENOUGH)
    undecided = open_.any(1).nonzero()[:, 0]
    slopes: dict[int, Slopes] = {}
    if not network.bends:
        return best, slopes
    # One sample's slopes do not depend on another's: so many samples at once as fit.
    nodes = network.graph.ancestors(output)
    units = max(1, sum(len(bends.lower) for bends in network.bends.values()) // len(best))
    values = sum(int(torch.Size(network.graph.nodes[i].shape).numel()) for i in nodes)
    size = functions.shape[1] * (values + _TENSORS_OF_A_SLOPE * units)
    for samples in undecided.split(memory.rows_at_once(size, best)):
        some = network.restricted(samples)
        ascent = _Ascent(some, output, functions[samples], best[samples], keep)
        best[samples] = ascent.run(open_[samples], steps, until_positive, give_up)
        if keep:
            found = ascent.slopes()
            slopes.update({int(sample): one for sample, one in zip(samples, found, strict=True) if one})
    return best, slopes


_TENSORS_OF_A_SLOPE = 4


class _Ascent:
    """Gradient ascent on lower bounds, of all functions and samples at once.

    Args:
        network: CROWN's relaxations of some samples.
        output: whose functions they are.
        functions: (batch, functions, classes).
        best: (batch, functions), CROWN's bounds.
        keep: whether slopes will be asked for.
    """

    def __init__(
        self, network: Substitution, output: int, functions: Tensor, best: Tensor, keep: bool
    ) -> None:
        self.network, self.output, self.functions, self.best = network, output, functions, best
        self.keep = keep
        count = functions.shape[1]
        bends = network.bends
        self.low = {i: b.low_slope.expand(count, -1).clone().requires_grad_() for i, b in bends.items()}
        self.up = {
            # Above a ReLU nothing beats the chord.
            i: b.up_slope.expand(count, -1).clone().requires_grad_(not isinstance(b.activation, ops.Relu))
            for i, b in bends.items()
        }
        self._better = torch.zeros_like(best, dtype=torch.bool)
        self._places = {i: self._places_of(i) for i in bends} if keep else {}
        self._best_low = {i: slope.detach().clone() for i, slope in self.low.items()}
        self._moments = {
            slope: (torch.zeros_like(slope), torch.zeros_like(slope))
            for slope in (*self.low.values(), *self.up.values())
            if slope.requires_grad
        }

    def run(
        self,
        open_: Tensor,
        steps: int,
        until_positive: bool,
        give_up: bool,
        first: int = 0,
        past: Sequence[Tensor] = (),
    ) -> Tensor:
        """Climb on the bounds that are open (batch, functions), and return the best found.

        Args:
            first: the number of the step to begin with; past: bounds that were known after each one before.
        """
        network, best, known = self.network, self.best, list(past)
        relaxations = network.relaxations
        network.relaxations = dict(relaxations)
        for step in range(first, steps + 1):
            sample, function = open_.nonzero(as_tuple=True)
            if not len(sample):
                break
            alive = open_.any(1).nonzero()[:, 0]
            if 2 * len(alive) <= len(best):
                # What is settled would be carried along at the full price.
                network.relaxations, self.best = relaxations, best
                part = self._part(alive)
                found = part.run(
                    open_[alive], steps, until_positive, give_up, step, [known_[alive] for known_ in known]
                )
                self._take(part, alive)
                return best.index_copy(0, alive, found)
            rows = Rows(
                self.functions[sample, function], sample, (self.functions.shape[2],), function=function
            )
            with torch.enable_grad():
                low = {i: self._writable(i) for i in self.low}
                for i in low:
                    network.relaxations[i] = network.moved(i, low[i], self.up[i])
                center = (rows.values * network.centers[self.output][sample]).sum(1)
                found = center - network.reach(self.output, rows, upper=False)[0]
                loss = -found.sum()
            # Written so that NaN never displaces a bound.
            better = torch.zeros_like(open_)
            better[sample, function] = found.detach() > best[sample, function]
            best = best.index_put((sample, function), torch.fmax(best[sample, function], found.detach()))
            if self.keep and step:
                self._remember(better, low)
            if until_positive:
                open_ = open_ & ~(best > ENOUGH)
            if until_positive and give_up:
                known.append(best)
                if step >= PACE:
                    pace = (best - known[step - PACE]) / PACE
                    # All functions of a sample have to become positive, so one that will not ends the ascent of all.
                    hopeful = best + pace * (steps - step) > 0
                    open_ = open_ & (hopeful | ~open_).all(1, keepdim=True)
            if step == steps or not loss.requires_grad:
                break
            self._step(loss, step)
        network.relaxations = relaxations
        return best

    def _step(self, loss: Tensor, step: int) -> None:
        """Move the slopes, by Adam (Kingma and Ba 2015).

        Written out: torch's own brings in torch.compile on its first use, which takes longer than most ascents.
        """
        # Not by `backward`, which would also add to the gradients of the network's own parameters.
        gradients = torch.autograd.grad(loss, list(self._moments), allow_unused=True)
        for (slope, (mean, square)), gradient in zip(self._moments.items(), gradients, strict=True):
            if gradient is not None:
                mean.lerp_(gradient, 1 - BETAS[0])
                square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
                scale = (square / (1 - BETAS[1] ** (step + 1))).sqrt_().add_(1e-8)
                rate = RATE * DECAY**step / (1 - BETAS[0] ** (step + 1))
                slope.data.addcdiv_(mean, scale, value=-rate)
        for slopes in (self.low, self.up):
            for i, slope in slopes.items():
                activation = self.network.bends[i].activation
                if isinstance(activation, ops.PiecewiseLinear):
                    # Steeper lines than any piece only lose.
                    slope.data.clamp_(min(activation.slopes), max(activation.slopes))

    def _part(self, samples: Tensor) -> _Ascent:
        """The same ascent for some samples, where it stands."""
        network = self.network.restricted(samples)
        part = _Ascent(network, self.output, self.functions[samples], self.best[samples], self.keep)
        for ours, theirs in ((self.low, part.low), (self.up, part.up)):
            for i, slope in ours.items():
                units = self._units(i, samples)
                theirs[i].data.copy_(slope.data[:, units])
                if slope in self._moments:
                    mean, square = self._moments[slope]
                    part._moments[theirs[i]] = mean[:, units], square[:, units]
        for i, slope in self._best_low.items():
            part._best_low[i] = slope[:, self._units(i, samples)]
        return part

    def _take(self, part: _Ascent, samples: Tensor) -> None:
        """Remember what a part of the ascent, of these samples, has found."""
        self._better[samples] |= part._better
        for i, slope in part._best_low.items():
            self._best_low[i][:, self._units(i, samples)] = slope

    def _units(self, index: int, samples: Tensor) -> Tensor:
        """Which bent units of an activation belong to these samples: (units,) bool."""
        chosen = torch.zeros(len(self.best), dtype=torch.bool, device=samples.device)
        chosen[samples] = True
        size = int(torch.Size(self.network.graph.nodes[index].shape).numel())
        return chosen[self.network.relaxations[index].unit.div(size, rounding_mode="floor")]

    def slopes(self) -> list[Slopes | None]:
        """What to keep of each sample; None where CROWN's bounds were not improved, or other activations were met."""
        count = len(self.best)
        if not all(isinstance(bends.activation, ops.Relu) for bends in self.network.bends.values()):
            return [None] * count
        better = self._better.cpu()
        seen = set(self.network.graph.ancestors(self.output))
        samples, units, levels = [], [], []
        for i, bends in self.network.bends.items():
            if i in seen:
                chosen = (bends.lower < 0) & (bends.upper > 0)
                sample, unit = self._places[i]
                samples.append(sample[chosen])
                units.append(unit[chosen])
                levels.append((self._best_low[i][:, chosen] * LEVELS).round().to(torch.uint8))
        if not samples:
            return [None] * count
        sample, unit, level = torch.cat(samples).cpu(), torch.cat(units).cpu(), torch.cat(levels, 1).cpu()
        kept: list[Slopes | None] = []
        for i in range(count):
            rows, own = better[i].nonzero()[:, 0], (sample == i).nonzero()[:, 0]
            # Nodes come in order, and so do the units of each.
            kept.append(Slopes(rows, unit[own], level[rows][:, own]) if len(rows) else None)
        return kept

    def _writable(self, index: int) -> Tensor:
        """The slopes below an activation's units as they can be kept, with the gradients of what they were."""
        slope, bends = self.low[index], self.network.bends[index]
        if not isinstance(bends.activation, ops.Relu):
            return slope
        slope = slope + ((slope * LEVELS).round() / LEVELS - slope).detach()
        # What CROWN found not to bend after all has its one line already.
        return slope.where((bends.lower < 0) & (bends.upper > 0), bends.low_slope)

    def _remember(self, better: Tensor, low: dict[int, Tensor]) -> None:
        """Keep the slopes of those functions (batch, functions) that were improved."""
        self._better |= better
        for i, slope in low.items():
            best = self._best_low[i]
            self._best_low[i] = slope.detach().where(better[self._places[i][0]].T, best)

    def _places_of(self, index: int) -> tuple[Tensor, Tensor]:
        """Of each bent unit its sample, and its number among the units of all ReLUs."""
        graph = self.network.graph
        used = {i for output in graph.outputs for i in graph.ancestors(output)}
        before = [i for i in sorted(used) if i < index and isinstance(graph.nodes[i].operation, ops.Relu)]
        first = sum(int(torch.Size(graph.nodes[i].shape).numel()) for i in before)
        size = int(torch.Size(graph.nodes[index].shape).numel())
        unit = self.network.relaxations[index].unit
        return unit.div(size, rounding_mode="floor"), unit % size + first
