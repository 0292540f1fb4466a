"""Gradients as CUDA graphs: to call a small network's operations one by one takes longer than to compute them."""

from __future__ import annotations

import warnings
from collections import OrderedDict

import torch
from torch import Tensor, nn

from swiftsure.attacks._gradient import Gradient, input_gradient
from swiftsure.attacks._own_exits import CutShort
from swiftsure.attacks.objectives import Objective

_WARM_UPS = 2
"""Passes before the capture, as torch asks for: libraries choose their algorithms in them."""

_KEPT = 24
"""Records that are kept, the latest: each holds its own memory. Seven exits and a last, smaller batch are 14."""

BatchNorm = nn.modules.batchnorm._BatchNorm


class Replayed:
    """`input_gradient` for an attack that is called again and again on a GPU, as in training.

    The first call for a network, or its part up to an exit, an objective and a size of batch records the operations;
    later ones run the record. Weights may change in place between calls, and batch norm's statistics in any way; a
    forward pass that is another one from call to call is not followed. Off the GPU, and for networks whose passes wait
    for numbers (``if x.max() > 1``), it is `input_gradient` itself.

    Example:
        >>> x_adv = pgd(net, x, y, ball, gradient=Replayed())
    """

    def __init__(self) -> None:
        self._recorded: OrderedDict[tuple[object, ...], _Recorded | None] = OrderedDict()

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, objective: Objective) -> Tensor:
        """As `input_gradient`; the result is overwritten by the next call."""
        if not x.is_cuda:
            return input_gradient(net, x, y, objective)
        # Networks that are cut short for one attack are new objects each time, of the same modules.
        whole, part = (net.net, net.part) if isinstance(net, CutShort) else (net, None)
        precision = (x.dtype, torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
        # Network and objective are part of the key, which keeps them: a number of theirs could come again.
        key = (whole, part, objective, tuple(x.shape), x.device, precision)
        if key not in self._recorded:
            waits = _waits(net, x, y, objective)
            self._recorded[key] = None if waits else _Recorded(net, x, y, objective)
            if len(self._recorded) > _KEPT:
                self._recorded.popitem(last=False)
        self._recorded.move_to_end(key)
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
        except torch.cuda.OutOfMemoryError:
            raise
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
        # Other threads, such as one that pins a DataLoader's memory, may go on meanwhile.
        with precision, torch.cuda.graph(graph, capture_error_mode="thread_local"):
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
