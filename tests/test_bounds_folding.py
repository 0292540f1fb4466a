"""Batch norm is folded into the convolution before it, and only where nothing else reads that convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import swiftsure as ss
from swiftsure import bounds
from swiftsure.bounds import operations as ops


class Read(nn.Module):
    """A convolution whose values are read by a batch norm, and by a sum too if ``twice``."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.twice = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), twice
        self.head = nn.Linear(3 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        raw = self.conv(x)
        z = self.norm(raw)
        return self.head(((z + raw) if self.twice else z).relu().flatten(1))


def scales(net: nn.Module, x: Tensor) -> int:
    return sum(isinstance(node.operation, ops.Scale) for node in bounds.trace(net, x).nodes)


def shaken(net: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    for value in (*net.parameters(), *net.buffers()):
        if value.is_floating_point():
            value.data = torch.rand(value.shape, generator=generator, dtype=torch.float64) - 0.3
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
            module.running_var.abs_()
    return net.eval()


def test_it_is_folded_where_nothing_else_reads_the_convolution() -> None:
    x = torch.rand(2, 1, 6, 6, dtype=torch.float64)
    assert scales(shaken(Read(twice=False)), x) == 0
    assert scales(shaken(Read(twice=True)), x) == 1


def test_values_bounds_and_gradients_are_those_of_two_steps() -> None:
    x, y, ball = torch.rand(2, 1, 6, 6, dtype=torch.float64), torch.tensor([1, 3]), ss.Ball(0.05)
    net = shaken(Read(twice=False))
    apart = shaken(Read(twice=False))
    # An identity scale between the two keeps them apart.
    apart.norm = nn.Sequential(Half(), apart.norm)
    assert scales(apart, x) == 2
    for method in ("interval", "crown-ibp", "symbolic", "crown"):
        found = [ss.margins(model, x, y, ball, method) for model in (net, apart)]
        torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
        gradients = [
            torch.autograd.grad(low.sum(), [model.conv.weight, model.conv.bias])
            for low, model in zip(found, (net, apart), strict=True)
        ]
        torch.testing.assert_close(gradients[0], gradients[1])


class Half(nn.Module):
    """z, by way of a scale that is not per channel."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tensor(1.0, dtype=x.dtype)


def test_the_fold_follows_the_weights() -> None:
    x = torch.rand(1, 1, 6, 6, dtype=torch.float64)
    net = shaken(Read(twice=False))
    bounds.trace(net, x)
    with torch.no_grad():
        net.norm.weight.mul_(-2)
        net.norm.running_mean.add_(0.1)
    low, high = bounds.output_bounds(net, x, ss.Ball(0.0))
    torch.testing.assert_close(low, net(x))
    torch.testing.assert_close(high, net(x))
