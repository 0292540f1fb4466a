"""Batch norm in robust training: the clean batch sets the statistics by which attacks are made and bounds computed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

BatchNorm = nn.modules.batchnorm._BatchNorm


class BatchStatistics:
    """Records the statistics each batch norm sees in a forward pass, and freezes the network on them.

    A bound needs batch norm to be a fixed affine map; and while an attack makes its images, their statistics must
    neither help it nor be noted. (Which statistics the finished images pass with is the loss's business:
    `three_term_loss`.)

    Example:
        >>> statistics = BatchStatistics(net)
        >>> with statistics.recorded():
        ...     logits = net(x)
        >>> with statistics.frozen():
        ...     x_adv = pgd(net, x, y, ball)
    """

    def __init__(self, net: nn.Module) -> None:
        # A layer without running statistics is not a fixed map in any mode: bounds refuse it, attacks see it as it is.
        self._layers = [m for m in net.modules() if isinstance(m, BatchNorm) and m.running_mean is not None]
        self._seen: dict[BatchNorm, tuple[Tensor, Tensor]] = {}

    @property
    def needed(self) -> bool:
        """Whether the network has batch norm at all."""
        return bool(self._layers)

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Inside the block each training-mode batch norm notes its batch's mean and (biased) variance."""

        def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(layer, BatchNorm)
            if layer.training:
                axes = [axis for axis in range(inputs[0].dim()) if axis != 1]
                variance, mean = torch.var_mean(inputs[0].detach(), dim=axes, correction=0)
                self._seen[layer] = (mean, variance)

        handles = [layer.register_forward_pre_hook(note) for layer in self._layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside the block the recorded statistics stand in for the running ones, and batch norm is in eval mode."""
        found = [(layer, layer.training, layer.running_mean, layer.running_var) for layer in self._layers]
        try:
            for layer, (mean, variance) in self._seen.items():
                layer.running_mean, layer.running_var = mean, variance
            for layer in self._layers:
                layer.training = False
            yield
        finally:
            for layer, training, mean_before, variance_before in found:
                layer.training = training
                layer.running_mean, layer.running_var = mean_before, variance_before
