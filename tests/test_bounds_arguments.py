"""Forward passes with more arguments than images: bounds are of what `net(x)` computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swiftsure as ss
from swiftsure.errors import InputError


class Features(nn.Module):
    """As backbones have it: a switch that changes what is returned, a factor, and whatever else."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(9, 5), nn.Linear(5, 3)

    def forward(
        self, x: Tensor, return_features: bool = False, scale: float | None = None, *more: Any, **options: Any
    ) -> Any:
        features = torch.relu(self.first(x.flatten(1)))
        if scale is not None:
            features = features * scale
        if options.get("twice", False):
            features = features * 2
        logits = self.second(features)
        return (logits, features) if return_features else logits


class KeywordOnly(Features):
    def forward(self, x: Tensor, *, factor: float = 3.0) -> Tensor:
        return super().forward(x) * factor


class Two(Features):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return super().forward(x + other)


@pytest.mark.parametrize("kind", [Features, KeywordOnly])
def test_arguments_with_defaults_have_them(kind: type[Features]) -> None:
    torch.manual_seed(0)
    net = kind()
    x = torch.rand(4, 1, 3, 3)
    graph = ss.bounds.trace(net, x)
    with torch.no_grad():
        (found,) = graph.values(x)
        torch.testing.assert_close(found, net(x))
        y = net(x).argmax(1)
        lower = ss.margins(net, x, y, ss.Ball(0.05), method="symbolic")
        for _ in range(20):
            z = net((x + 0.05 * (2 * torch.rand_like(x) - 1)).clamp(0, 1))
            assert bool((z.gather(1, y[:, None]) - z >= lower - 1e-5).all())
    assert ss.certify(net, x, y, ss.Ball(0.001)).certified.any()


def test_a_second_image_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be traced"):
        ss.bounds.trace(Two(), torch.rand(1, 1, 3, 3))
