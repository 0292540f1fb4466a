"""How far rounding can carry a proof: measured, with a safety factor.

A bound is derived for exact arithmetic, but it is computed in floating point, and so is the network that it speaks of.
Let m be the exact margin z_y - z_j at a point of the ball, L its exact lower bound, and L' and m' the same as computed.
With |L' - L| <= a and |m' - m| <= b,

    m' >= m - b >= L - b >= L' - a - b,

so that L' > a + b proves m' > 0: the deployed network answers y. The slack is a + b, measured: a and b are the largest
differences from float64 that are seen on a few samples, over batch sizes (each may take other kernels, which add in
another order), times `SAFETY`, and at least `FLOOR`.

What this is not: a proof against rounding. The largest error over the whole ball and all samples is not known, and an
adversary who searches for inputs that round badly (Jia and Rinard 2021) is answered by a safety factor only. The slack
holds for the device and the kernels that it was measured on, in full float32. On an mnist_small trained with intervals,
with logits up to 29, four samples differ from float64 by up to 5e-6 and 2,000 samples by up to 9e-6; its slack is 7e-5,
and none of the 2,000 has a margin between 0 and that.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from swiftsure.attacks.objectives import as_exits
from swiftsure.ball import Ball
from swiftsure.bounds import TECHNIQUES, Region, difference_bounds, technique, trace
from swiftsure.certificates._precision import certifying, place

SAFETY = 10.0
"""The measured rounding is multiplied by this."""
FLOOR = 1e-5
"""The least slack, in units of logits: some eighty times the spacing of float32 numbers near 1."""

SAMPLES = 4
BATCHES = (1, 7, 64)
# In backward substitution a sample is hundreds of rows by itself: batch sizes change little, and cost much.
ROW_BATCHES = (1, 4)
FELT = 40.0
"""A logit that lies so far below another has a probability below 1e-17, and nothing depends on where it lies."""


def rounding_slack(net: nn.Module, x: Tensor, ball: Ball, method: str = "auto") -> float:
    """By how much a computed margin must exceed 0 to count as a proof (see the head of this file).

    Measured on the first samples of x, at the images themselves and at two points of the ball around each, against
    a float64 copy of the network, at every exit. The network stays as it is. Of the bounds only those entries count
    that prove something in one arithmetic or the other: a bound of -1000 may round as it likes. With several exits
    those count that an entropy depends on, too: differences of up to `FELT`.

    Args:
        net: returns logits (batch, classes), or a tuple of them.
        x: images (batch, channels, height, width) in [0, 1]; none give the floor.
        ball: the threat model.
        method: a technique of `bounds`, or "auto" for all of them.

    Returns:
        max(FLOOR, SAFETY * (rounding of the network's margins + rounding of their bounds)), in units of logits.

    Raises:
        InputError: as `swiftsure.bounds.margins`.
    """
    names = tuple(TECHNIQUES) if method == "auto" else (method,)
    for name in names:
        technique(name)
    device, dtype = place(net)
    x = x[:SAMPLES].to(device, dtype)
    if len(x) == 0:
        return FLOOR
    with certifying(net):
        exact = copy.deepcopy(net).double()
        y = as_exits(exact(x.double()))[-1].argmax(1)
        network = max(_network_rounding(net, exact, point, y) for point in _points(x, ball))
        # An ascent takes another path in every arithmetic; what rounds in it is a bound at given slopes, as in CROWN.
        measured = {"crown" if name == "alpha-crown" else name for name in names}
        bounds = max(_bound_rounding(net, exact, x, y, ball, name) for name in measured)
    return max(FLOOR, SAFETY * (network + bounds))


def _points(x: Tensor, ball: Ball) -> Iterator[Tensor]:
    """The images, random points of the ball around them, and points at its far edge."""
    generator = torch.Generator().manual_seed(0)
    yield x
    yield ball.sample(x, generator)
    sign = torch.randn(x.shape, generator=generator).sign().to(x)
    yield ball.project(x + sign * ball.radius, x)


def _network_rounding(net: nn.Module, exact: nn.Module, x: Tensor, y: Tensor) -> float:
    """The largest difference of a margin z_y - z_j from float64, at these points, at any exit."""
    reference = [_differences(z, y) for z in as_exits(exact(x.double()))]
    errors = [
        _largest(_differences(z, y[part]) - wanted[part])
        for part in _batches(len(x), BATCHES, x.device)
        for z, wanted in zip(as_exits(net(x[part])), reference, strict=True)
    ]
    return max(errors)


def _bound_rounding(net: nn.Module, exact: nn.Module, x: Tensor, y: Tensor, ball: Ball, name: str) -> float:
    """The largest difference of a margin's bound from float64, of those that a proof can rest on, at any exit."""
    reference = _bounds(exact, x.double(), y, ball, name)
    errors = [0.0]
    for part in _batches(len(x), BATCHES if name == "interval" else ROW_BATCHES, x.device):
        for ends, wanted in zip(_bounds(net, x[part], y[part], ball, name), reference, strict=True):
            for end, exactly in zip(ends, wanted, strict=True):
                counts = (end > 0) | (exactly[part] > 0)
                if len(reference) > 1:
                    counts |= exactly[part].abs() < FELT
                errors.append(_largest((end - exactly[part])[counts]))
    return max(errors)


def _bounds(
    net: nn.Module, x: Tensor, y: Tensor, ball: Ball, name: str
) -> list[tuple[Tensor] | tuple[Tensor, Tensor]]:
    """What a certificate asks for: the lower ends of the margins, and with several exits the upper ones as well."""
    graph = trace(net, x)
    both = len(graph.outputs) > 1
    found = difference_bounds(technique(name), graph, Region(x, ball), y, upper=both)
    return [ends if both else ends[:1] for ends in found]


def _batches(count: int, sizes: tuple[int, ...], device: torch.device) -> Iterator[Tensor]:
    """Indices of samples that make up batches of each of these sizes, with repetition where there are too few."""
    for size in sizes:
        enough = -(-count // size) * size
        yield from (torch.arange(enough, device=device) % count).split(size)


def _differences(logits: Tensor, y: Tensor) -> Tensor:
    return logits.gather(1, y[:, None]) - logits


def _largest(error: Tensor) -> float:
    """The largest magnitude; what is not finite cannot be a proof, so it does not count."""
    error = error[error.isfinite()].abs()
    return float(error.max()) if error.numel() else 0.0
