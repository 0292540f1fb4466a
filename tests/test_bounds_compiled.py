"""The interval loss is one graph for torch.compile: nothing in it falls back to Python."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import swiftsure as ss
from swiftsure import bounds
from swiftsure.bounds import Region


@pytest.mark.parametrize("name", ["mnist_small", "cifar_resnet", "cnn7"])
def test_the_interval_loss_compiles_into_one_graph(name: str) -> None:
    torch.manual_seed(0)
    net = ss.models.build(name).eval()
    x, y = torch.rand(2, *net.config["input_shape"]), torch.tensor([1, 2])
    graph = bounds.trace(net, x)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        (lower,) = bounds.lower_margins(bounds.interval, graph, Region(x, ss.Ball(0.01)), y)
        return F.cross_entropy(-lower, y)

    compiled = torch.compile(loss, fullgraph=True, dynamic=False, backend="eager")
    torch.testing.assert_close(compiled(x, y), loss(x, y))
