"""Gradients as CUDA graphs: to call a small network's operations one by one takes longer than to compute them."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from swiftsure.attacks._gradient import Gradient, input_gradient
from swiftsure.attacks._own_exits import CutShort
from swiftsure.attacks.objectives import Objective

_WARM_UPS = 2
"""Passes before the capture, as torch asks for: libraries choose their algorithms in them."""

BatchNorm = nn.modules.batchnorm._BatchNorm


class Replayed:
    """`input_gradient` for an attack that is called again and again on a GPU, as in training.

    The first call for a part of a network (all of it, or up to an exit) and a size of batch records its operations;
    later ones run the record. One for each network, objective and precision: what is recorded keeps them. Weights may
    change in place between calls, and batch norm's statistics in any way. Off the GPU, and for networks whose passes
    wait for numbers (``if x.max() > 1``), it is `input_gradient` itself.

    Example:
        >>> x_adv = pgd(net, x, y, ball, gradient=Replayed())
    """

    def __init__(self) -> None:
        self._recorded: dict[tuple[object, ...], _Recorded | None] = {}

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, objective: Objective) -> Tensor:
        """As `input_gradient`; the result is overwritten by the next call."""
        if not x.is_cuda:
            return input_gradient(net, x, y, objective)
        # Networks that are cut short for one attack are new objects each time, of the same modules.
        part = net.part if isinstance(net, CutShort) else None
        key = (part, tuple(x.shape))
        if key not in self._recorded:
            waits = _waits(net, x, y, objective)
            self._recorded[key] = None if waits else _Recorded(net, x, y, objective)
        recorded = self._recorded[key]
        return input_gradient(net, x, y, objective) if recorded is None else recorded(x, y)


def _waits(net: nn.Module, x: Tensor, y: Tensor, objective: Objective) -> bool:
    """Whether a pass waits for a number of the GPU: it cannot be captured then, and to try would spoil generators."""
    input_gradient(net, x, y, objective)  # an error of the network itself is raised here
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls this mode a prototype each time
        try:
            torch.cuda.set_sync_debug_mode("error")
            input_gradient(net, x, y, objective)
        except RuntimeError:
            return True
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return False


class _Recorded:
    """The gradient of one network for one shape of batch."""

    def __init__(self, net: nn.Module, x: Tensor, y: Tensor, objective: Objective) -> None:
        self.net, self.x, self.y = net, x.detach().clone(), y.clone()
        layers = [layer for layer in net.modules() if isinstance(layer, BatchNorm)]
        self.layers = [layer for layer in layers if layer.running_mean is not None]
        current = self._statistics()
        # Training gives the layers other statistics for each batch: the record reads copies that stay where they are.
        self.statistics = [value.clone() for value in current]
        try:
            self._put(self.statistics)
            self.graph, self.grad = self._capture(objective)
        finally:
            self._put(current)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self.x.copy_(x)
        self.y.copy_(y)
        if self.layers:
            torch._foreach_copy_(self.statistics, self._statistics())
        self.graph.replay()
        return self.grad

    def _capture(self, objective: Objective) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        half = torch.is_autocast_enabled("cuda")
        # A cached copy of a weight in half precision would be read for ever after, whatever the weight became.
        precision = torch.autocast(
            "cuda", torch.get_autocast_dtype("cuda"), enabled=half, cache_enabled=False
        )
        stream = torch.cuda.Stream(self.x.device)
        stream.wait_stream(torch.cuda.current_stream())
        with precision, torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                input_gradient(self.net, self.x, self.y, objective)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with precision, torch.cuda.graph(graph):
            grad = input_gradient(self.net, self.x, self.y, objective)
        return graph, grad

    def _statistics(self) -> list[Tensor]:
        found = [(layer.running_mean, layer.running_var) for layer in self.layers]
        return [value for pair in found for value in pair if value is not None]

    def _put(self, statistics: list[Tensor]) -> None:
        for place, layer in enumerate(self.layers):
            layer.running_mean, layer.running_var = statistics[2 * place : 2 * place + 2]


def replayed(device: torch.device) -> Gradient:
    """The gradient for attacks that are called again and again on a device."""
    return Replayed() if device.type == "cuda" else input_gradient
