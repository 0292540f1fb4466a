"""Default exits: where they go, how large their heads are, and what heads read."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from attached import backbone, images
from swiftsure import exits
from swiftsure.errors import InputError
from swiftsure.exits import attach
from swiftsure.exits.heads import build_head, sized


def deep(width: int = 8, depth: int = 12) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Conv2d(width, width, 3, 1, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10))


@pytest.mark.parametrize("count", [2, 3, 6])
def test_default_exits_lie_at_equal_shares_of_the_cost(count: int) -> None:
    torch.manual_seed(0)
    trunk = deep(width=24)
    net = attach(trunk, exits=count, example=torch.rand(1, 3, 16, 16))
    assert net.exits == count
    whole = exits.static_macs(trunk, (3, 16, 16))
    spent = 0
    for place, (stage, head) in enumerate(net.counts((3, 16, 16))[:-1], 1):
        spent += stage.total
        assert abs(spent / whole - place / count) < 1 / 12
        assert head.total <= 0.1 * whole / (count - 1)
    # As wide as they may be, by cost or as twice what they read.
    heads = [head.total for _, head in net.counts((3, 16, 16))[:-1]]
    if count > 2:
        assert min(heads) > 0.07 * whole / (count - 1)
    else:
        assert net.config["exits"].popitem()[1] == {"kind": "conv", "width": 48}
    # Behind the activation, not before it.
    assert all(isinstance(trunk.get_submodule(name), nn.ReLU) for name in net.config["exits"])


def test_default_exits_do_not_cut_through_residual_blocks() -> None:
    torch.manual_seed(0)
    net = attach(backbone(), 3, images(1))
    assert all(len(name.split(".")) <= 2 and name != "stem" for name in net.config["exits"]), net.config
    assert torch.equal(net.eval()(images())[-1], net.backbone(images()))


def test_a_head_by_a_name_of_ones_own() -> None:
    @exits.register_head("corner")
    def corner(shape, classes: int, scale: float = 1.0) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), classes))

    net = attach(backbone(), {"stem": {"kind": "corner", "scale": 2.0}}, images(1))
    assert net.config["exits"] == {"stem": {"kind": "corner", "scale": 2.0}}
    assert "corner" in exits.head_names()
    with pytest.raises(InputError, match="registered already"):
        exits.register_head("linear")(corner)


@pytest.mark.parametrize(
    ("shape", "macs", "expected"),
    [
        ((8, 16, 16), 64 * 8 * 9 * 11 + 4 * 5 * 11, {"kind": "conv", "width": 11}),
        ((8, 16, 16), 10**9, {"kind": "conv", "width": 16}),
        ((8, 16, 16), 64 * 8 * 9 * 7, {"kind": "pooled", "grid": 4}),
        ((8, 16, 16), 9 * 8 * 5, {"kind": "pooled", "grid": 3}),
        ((8, 16, 16), 9 * 8 * 5 - 1, {"kind": "pooled", "grid": 2}),
        ((8, 16, 16), 30, {"kind": "linear"}),
        ((8, 1, 1), 40, {"kind": "pooled", "grid": 4}),
        ((17, 8), 10**9, {"kind": "linear"}),
        ((16, 16, 8), 64 * 8 * 9 * 11 + 4 * 5 * 11, {"kind": "conv", "width": 11, "channels_last": True}),
        ((16, 16, 8), 9 * 8 * 5, {"kind": "pooled", "grid": 3, "channels_last": True}),
        ((16, 16, 8), 9, {"kind": "linear", "channels_last": True}),
        ((8,), 10**9, {"kind": "linear"}),
    ],
)
def test_a_head_is_as_large_as_its_budget_allows(shape, macs: int, expected) -> None:
    assert sized(shape, 5, macs) == expected
    head = build_head(expected, shape, 5)
    assert head(torch.rand(2, *shape)).shape == (2, 5)
    if macs > 30:
        cost = exits.static_macs(nn.Sequential(head), shape)
        assert cost <= macs or expected["kind"] == "linear"


@pytest.mark.parametrize("kind", ["linear", "pooled", "conv"])
def test_heads_read_channels_wherever_they_are(kind: str) -> None:
    x = torch.rand(2, 5, 12, 12)
    torch.manual_seed(0)
    first = build_head({"kind": kind}, (5, 12, 12), 3)
    torch.manual_seed(0)
    last = build_head({"kind": kind, "channels_last": True}, (12, 12, 5), 3)
    torch.testing.assert_close(last(x.permute(0, 2, 3, 1)), first(x))


def test_maps_with_channels_last_are_told_by_their_shape() -> None:
    class Last(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.permute(0, 2, 3, 1)

    trunk = nn.Sequential(Last(), nn.Flatten(), nn.Linear(192, 4))
    assert attach(trunk, {"0": "linear"}, images(1)).config["exits"] == {
        "0": {"channels_last": True, "kind": "linear"}
    }
    by_hand = attach(trunk, {"0": {"kind": "linear", "channels_last": False}}, images(1))
    assert by_hand.config["exits"] == {"0": {"kind": "linear", "channels_last": False}}


def test_a_linear_head_on_tokens_reads_their_mean() -> None:
    head = build_head({"kind": "linear"}, (4, 3), 2)
    x = torch.rand(5, 4, 3)
    torch.testing.assert_close(head(x), head[1](x.mean(1)))


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ({"kind": "conv", "width": -3}, "width is -3"),
        ({"kind": "conv", "channels_last": "yes"}, "channels_last is 'yes'"),
        ({"kind": "conv", "width": 0}, "width is 0"),
        ({"kind": "conv", "side": 0}, "side is 0"),
        ({"kind": "pooled", "grid": 0}, "grid is 0"),
        ({"kind": "pooled", "grid": 2.0}, "grid is 2.0"),
    ],
)
def test_sizes_that_cannot_be(head: dict[str, object], said: str) -> None:
    with pytest.raises(
        InputError, match=f"head .* cannot be built .* {said}; allowed: (an integer >= 1|true or false)"
    ):
        attach(
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 3)),
            {"0": head},
            torch.rand(1, 1, 8, 8),
        )
