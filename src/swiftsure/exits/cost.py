"""What running a network costs: multiply-adds, parameters and milliseconds."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from swiftsure.errors import InputError
from swiftsure.exits.counting import Count, counting, cumulative, paper
from swiftsure.exits.multi_exit import Answer, MultiExit, one_exit
from swiftsure.modes import evaluating

WARM_UP = 3
"""Runs before the clock counts: they allocate memory and let libraries choose their kernels."""


def static_macs(net: nn.Module, input_shape: Sequence[int] | None = None) -> int:
    """Multiply-adds of one image through the whole network, every exit's head included.

    Torch's own counter: convolutions and matrix products, those of attention too; additions of biases, normalisations,
    activations and pooling count nothing.

    Args:
        net: any module that takes images; its modes stay as they are.
        input_shape: (C, H, W); None: what ``net.config`` says.

    Raises:
        InputError: no shape is known, or the network cannot take such images.
    """
    image = _images(net, 1, input_shape)
    with torch.no_grad(), evaluating(net), counting() as counter, _understood(image):
        net(image)
    return int(counter.get_total_flops()) // 2


def exit_macs(net: nn.Module, input_shape: Sequence[int] | None = None) -> list[int]:
    """Multiply-adds of one image that leaves at each exit: the trunk up to it and every head up to it.

    A head that decided not to let an image go has run all the same. The last entry is `static_macs`.

    Args:
        net: a MultiExit; any other network that returns logits has one exit.
        input_shape: (C, H, W); None: what ``net.config`` says.

    Raises:
        InputError: no shape is known, the network cannot take such images, or it returns several outputs and is no
            MultiExit.
    """
    return cumulative(_counts(net, input_shape))


def paper_macs(net: nn.Module, input_shape: Sequence[int] | None = None) -> list[float]:
    """The cost of each exit as RDI-Nets (Hu et al. 2020) count it, in 2**20: convolutions only, earlier heads free.

    It is less than what an image costs; `exit_macs` has that. Args and errors as there.
    """
    return paper(_counts(net, input_shape))


def _counts(net: nn.Module, input_shape: Sequence[int] | None) -> list[tuple[Count, Count]]:
    image = _images(net, 1, input_shape)
    whole = net if isinstance(net, MultiExit) else one_exit(net)
    with _understood(image):
        return whole.counts(image.shape[1:])


def parameters(net: nn.Module) -> int:
    """How many numbers the parameters hold, shared ones once."""
    return sum(parameter.numel() for parameter in net.parameters())


def latency_ms(
    net: nn.Module,
    batch: int = 1,
    repeats: int = 20,
    device: torch.device | str | None = None,
    *,
    input_shape: Sequence[int] | None = None,
) -> float:
    """Milliseconds a sample: the median over repeated forward passes, after a warm-up.

    Evaluation mode, without gradients, on random pixels that are on the device already. The number of threads and
    the arithmetic (TF32, autocast) are the caller's.

    Args:
        net: any module that takes images; neither its modes nor its place change.
        batch: images a pass.
        repeats: passes that are timed.
        device: where to run, on a copy if the network lies elsewhere; None: where it lies.
        input_shape: (C, H, W); None: what ``net.config`` says.

    Raises:
        InputError: no shape is known, the network cannot take such images, or batch or repeats is below 1.
    """
    for name, value in (("batch", batch), ("repeats", repeats)):
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{name} is {value!r}; allowed: an integer >= 1")
    images = _images(net, batch, input_shape)
    if device is not None and torch.device(device) != images.device:
        net, images = copy.deepcopy(net).to(device), images.to(device)
    seconds = []
    with torch.no_grad(), evaluating(net):
        for repeat in range(WARM_UP + repeats):
            _wait(images.device)
            start = time.perf_counter()
            with _understood(images):
                net(images)
            _wait(images.device)
            if repeat >= WARM_UP:
                seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds) / batch


def adaptive_latency_ms(net: MultiExit, images: Tensor, batch: int = 1, repeats: int = 5) -> float:
    """Milliseconds a sample of ``net.adaptive``: the median over passes through all images, after a warm-up.

    Which exits are taken depends on the images, so these are real ones.

    Args:
        net: with a policy; its modes stay as they are.
        images: (n, C, H, W), n >= 1, on its device.
        batch: images a call; a last, smaller batch is left out unless it is the only one.
        repeats: passes that are timed.

    Raises:
        InputError: as `MultiExit.adaptive`; no image, or a batch or repeats below 1.
    """
    for name, value in (("batch", batch), ("repeats", repeats), ("the number of images", len(images))):
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{name} is {value!r}; allowed: an integer >= 1")
    whole = max(batch, len(images) // batch * batch)
    parts = images[:whole].split(batch)
    seconds = []
    for repeat in range(1 + repeats):
        _wait(images.device)
        start = time.perf_counter()
        answers: list[Answer] = [net.adaptive(part) for part in parts]
        _wait(images.device)
        if repeat:
            seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds) / sum(len(answer.label) for answer in answers)


def _images(net: nn.Module, batch: int, input_shape: Sequence[int] | None) -> Tensor:
    """Random images of the network's device and type: (batch, C, H, W)."""
    if input_shape is None:
        config = getattr(net, "config", None)
        if not isinstance(config, dict) or "input_shape" not in config:
            raise InputError("the network does not say what images it takes; pass input_shape=(C, H, W)")
        input_shape = config["input_shape"]
    like = next((p for p in net.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    return torch.rand((batch, *input_shape), generator=generator).to(like.device, like.dtype)


@contextmanager
def _understood(images: Tensor) -> Iterator[None]:
    """What torch says of images that do not fit, in one line.

    Raises:
        InputError: the network cannot take them.
    """
    try:
        yield
    except InputError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        shape = tuple(images.shape[1:])
        raise InputError(f"the network cannot take images of shape {shape}: {reason}") from None


def _wait(device: torch.device) -> None:
    """Until the device has done what it was given; a CPU has by then."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
