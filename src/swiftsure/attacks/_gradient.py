"""The gradient with respect to the images, what can be wrong with it, and the state an attack runs in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from swiftsure.attacks.objectives import Logits, Objective, as_exits
from swiftsure.ball import Ball
from swiftsure.data import check_batch
from swiftsure.data.checks import check_labels
from swiftsure.errors import InputError
from swiftsure.modes import evaluating

_WRITES = "the network writes into the images that it is given; allowed: one that leaves them as they are"

Gradient = Callable[[nn.Module, Tensor, Tensor, Objective], Tensor]
"""How a gradient is taken: (network, x, y, objective) -> shaped like x."""


@dataclass
class GradientReport:
    """Counts of per-sample gradients that an attack could not use, added up over steps, restarts and calls.

    A high share means that the attack was blind, not that the network is robust (Athalye et al. 2018).

    Attributes:
        samples: gradients looked at, one per sample and step.
        zero: of these, those with every entry exactly 0.
        nonfinite: of these, those with a NaN or infinite entry.
    """

    samples: int = 0
    zero: int = 0
    nonfinite: int = 0

    @property
    def zero_share(self) -> float:
        """Share of gradients that were exactly zero; 0 where none was taken."""
        return self.zero / max(self.samples, 1)

    @property
    def nonfinite_share(self) -> float:
        """Share of gradients with a NaN or infinite entry; 0 where none was taken."""
        return self.nonfinite / max(self.samples, 1)


class GradientTally:
    """Counts on the device, and fills a GradientReport once at the end: a step never waits for a number."""

    def __init__(self, report: GradientReport) -> None:
        self.report = report
        self.samples = 0
        self.counts: Tensor | None = None

    def add(self, grad: Tensor) -> None:
        """Count one gradient, (B, ...)."""
        flat = grad.flatten(1)
        counts = torch.stack([(flat == 0).all(1).sum(), (~flat.isfinite()).any(1).sum()])
        self.counts = counts if self.counts is None else self.counts + counts
        self.samples += len(grad)

    def close(self) -> None:
        """Add what was counted to the report."""
        if self.counts is not None:
            zero, nonfinite = self.counts.tolist()
            self.report.samples += self.samples
            self.report.zero += zero
            self.report.nonfinite += nonfinite


def looked_at(
    net: nn.Module, x: Tensor, y: Tensor, objective: Objective, *, gradient: bool = True
) -> tuple[Logits, Tensor, Tensor]:
    """One pass: logits of all exits, the objective (B,), and its gradient with respect to x, shaped like x.

    The gradient is zero where x has no influence on the objective, or where none is wanted. No gradient of a parameter
    is computed or stored.
    """
    x = x.detach().requires_grad_(gradient)
    version = x._version
    with torch.set_grad_enabled(gradient):
        try:
            logits = as_exits(net(x))
        except RuntimeError as error:
            if "in-place" not in str(error):
                raise
            raise InputError(_WRITES) from None
        if x._version != version:
            raise InputError(_WRITES)
        loss = objective(logits, y)
    grad: Tensor | None = None
    if loss.requires_grad:
        (grad,) = torch.autograd.grad(loss.sum(), x, allow_unused=True)
    grad = torch.zeros_like(x) if grad is None else grad
    return tuple(z.detach() for z in logits), loss.detach(), grad


def input_gradient(net: nn.Module, x: Tensor, y: Tensor, objective: Objective) -> Tensor:
    """The gradient of `looked_at` alone."""
    return looked_at(net, x, y, objective)[2]


@contextmanager
def attacking(net: nn.Module) -> Iterator[None]:
    """Evaluation mode, and gradients on, whatever the caller switched off (no_grad or inference_mode)."""
    with evaluating(net), torch.inference_mode(False), torch.enable_grad():
        yield


def checked_inputs(net: nn.Module, x: Tensor, y: Tensor, ball: Ball) -> tuple[Tensor, Tensor]:
    """x and y (as int64), free of any graph, once they are known to fit the network and the ball.

    Raises:
        InputError: images or labels that do not fit.
    """
    if not isinstance(ball, Ball):
        raise InputError(f"the ball is {ball!r}; allowed: a swiftsure.Ball, such as Ball('8/255')")
    config = getattr(net, "config", None)
    # Ours is a dict; other libraries have objects of that name.
    config = config if isinstance(config, dict) else {}
    check_batch(x, y, classes=config.get("classes"), shape=config.get("input_shape"))
    if x.dtype not in (torch.float32, torch.float64):
        dtype = str(x.dtype).removeprefix("torch.")
        raise InputError(f"images have dtype {dtype}; allowed for attacks: float32 and float64")
    # What rounding took out of the pixel range would leave every ball.
    x = x.detach().clamp(0, 1) if len(x) and bool(((x < 0) | (x > 1)).any()) else x
    if "classes" not in config and len(x) and int(y.max()) >= _CLASSES.get(net, 0):
        _CLASSES[net] = classes_of(net, x)
        check_labels(y, len(x), _CLASSES[net])
    # Pixels are in [0, 1] by now; only a narrower range is left to check.
    if (ball.low > 0 or ball.high < 1) and not bool(((x >= ball.low) & (x <= ball.high)).all()):
        raise InputError(f"pixels leave the ball's range; allowed: [{ball.low}, {ball.high}]")
    # What was made in inference mode cannot take part in a gradient; a copy made outside of it can.
    with torch.inference_mode(False):
        x, y = (t.detach().clone() if t.is_inference() else t.detach() for t in (x, y))
        return x, y.long()


_SMALL = 512
"""Values of an image from which on activations count."""

_CLASSES: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""Of networks that do not say how many they have; asked again when labels exceed it."""


def classes_of(net: nn.Module, x: Tensor) -> int:
    """How many classes a network tells apart, by one pass over the first of some images.

    Raises:
        InputError: what it returns are no logits.
    """
    device = next((parameter.device for parameter in net.parameters()), x.device)
    try:
        with evaluating(net), torch.no_grad():
            # A copy: some networks normalise in place.
            logits = as_exits(net(x[:1].to(device, copy=True)))
    except RuntimeError as error:
        kind = f"images of shape {tuple(x.shape[1:])} and dtype {str(x.dtype).removeprefix('torch.')}"
        raise InputError(f"the network cannot take {kind}: {(str(error).splitlines() or [''])[0]}") from None
    if any(not isinstance(z, Tensor) or z.dim() != 2 for z in logits):
        shapes = [tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__ for z in logits]
        raise InputError(
            f"the network returns {shapes}; allowed: logits (batch, classes), or a tuple of them"
        )
    return logits[-1].shape[1]


def check_count(name: str, value: int, least: int) -> None:
    """Refuse a number of steps, restarts or the like that is no integer from `least` on.

    Raises:
        InputError: as said.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} is {value!r}; allowed: an integer >= {least}")


def at_once(batch: int | None, x: Tensor, device: torch.device) -> int:
    """How many of the images x are attacked at a time; None: 500, on a CPU 100, but for the smallest images.

    There larger activations leave the caches and are mapped anew at every step: attacks on batches of 500 took up to
    2.1 times as long a sample (RDI-SmallCNN, one thread). What networks for 8x8 digits compute is so little that calls
    cost more.

    Raises:
        InputError: no integer from 1 on.
    """
    if batch is None:
        return 100 if device.type == "cpu" and x[0].numel() >= _SMALL else 500
    check_count("batch", batch, 1)
    return batch


def assert_inside(x_adv: Tensor, x: Tensor, ball: Ball) -> Tensor:
    """x_adv itself; an AssertionError, a defect of the attack, where it left the ball or the pixel range."""
    # No assert statement: those are gone under python -O.
    if not bool(ball.contains(x_adv, x).all()):
        raise AssertionError(f"an attack left the ball {ball.as_dict()}")
    return x_adv
