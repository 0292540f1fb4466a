"""linear_map against sampled points and against the symbolic bounds; where the interval attack takes its direction."""

import pytest
import torch
from torch import nn

from attacked import NORMS, TwoExits, conv_net, generator, images
from swiftsure.attacks import interval_attack, never
from swiftsure.attacks._interval import worst_slope
from swiftsure.ball import Ball
from swiftsure.bounds import Region, linear_map, memory, symbolic, trace
from trained import held_out, network

EPS = {"inf": 0.1, "2": 0.3, "1": 0.8}


def several(name: str) -> tuple[nn.Module, torch.Tensor]:
    if name == "digits":
        return network(), held_out(6).batch(slice(None))[0]
    if name == "exits":
        return TwoExits(), images(0, 6, 1, 4, 4)
    torch.manual_seed(0)
    pooled = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 9), nn.Tanh(), nn.Linear(9, 3)
    )  # fmt: skip
    return (pooled if name == "pooled" else conv_net()), images(0, 6, 1, 8, 8)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["digits", "exits", "pooled", "conv"])
def test_linear_map_holds_and_is_the_symbolic_bound(name, norm):
    net, x = several(name)
    ball, graph = Ball(EPS[norm], norm), trace(net, x)
    classes = graph.nodes[graph.outputs[0]].shape[0]
    for output in range(len(graph.outputs)):
        spec = torch.randn(len(x), 4, classes, generator=generator())
        region = Region(x, ball)
        with torch.no_grad():
            found = linear_map(graph, region, spec, output)
            lower, upper = symbolic(graph, region, spec)[output]
            loose = linear_map(graph, region, spec, output, refine=False)
        assert found.coefficients.shape == (len(x), 4, *x.shape[1:])
        assert (found.error >= 0).all()
        torch.testing.assert_close(found.lower, lower, rtol=1e-6, atol=1e-6)
        assert (loose.lower <= lower + 1e-5).all()
        # The second activation's bounds are what differs.
        if name in ("digits", "pooled"):
            assert (loose.lower < lower - 1e-3).any()
        for number in range(40):
            point = ball.sample(x, generator(number))
            if number % 2:
                point = ball.maximiser(x, torch.randn(x.shape, generator=generator(number)))
            with torch.no_grad():
                values = (spec @ graph.values(point)[output][..., None])[..., 0]
            line = found.value + (found.coefficients * (point - region.center)[:, None]).flatten(2).sum(2)
            assert ((values - line).abs() <= found.error + 1e-5).all()
            line = loose.value + (loose.coefficients * (point - region.center)[:, None]).flatten(2).sum(2)
            assert ((values - line).abs() <= loose.error + 1e-5).all()
            assert (values <= upper + 1e-5).all()


def test_linear_map_does_not_depend_on_memory():
    net, x = several("digits")
    graph, region, spec = trace(net, x), Region(x, Ball(0.1)), torch.randn(6, 5, 10, generator=generator())
    with torch.no_grad():
        whole = linear_map(graph, region, spec)
        with memory.limited(200_000):
            parts = linear_map(graph, region, spec)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_linear_map_of_a_linear_network_is_the_network():
    net, x = TwoExits(), images(0, 3, 1, 4, 4)
    for output, layer in enumerate((net.early, net.late)):
        found = linear_map(trace(net, x), Region(x, Ball(0.3)), torch.eye(3).expand(3, -1, -1), output)
        torch.testing.assert_close(found.coefficients.flatten(2), layer.weight.expand(3, -1, -1))
        assert (found.error == 0).all()


def test_the_region_grows_until_a_class_threatens():
    """Class 1 lies .02 below the true one and rises by 1 with a pixel; class 2 lies .5 below and rises by 10."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    net[1].weight.data = torch.tensor([[0.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 10, 0]])
    net[1].bias.data = torch.tensor([0.0, -0.02 - 0.5, -0.5 - 5.0])
    x, y = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])

    def chosen(eps: float) -> list[int]:
        return worst_slope(trace(net, x), x, y, Ball(eps)).flatten().nonzero().flatten().tolist()

    # The regions have radius eps / 30, eps / 10, 0.3 eps, eps / 2. At .03 only class 1 threatens.
    assert chosen(0.3) == [1]
    # At .033 too, in the first; at .1 both do, class 2 the more.
    assert chosen(0.99) == [1]
    assert chosen(3.0) == [2]
    # None does at .01: class 1 comes nearest.
    assert chosen(0.02) == [1]
    # With class 1 further off, class 2 is the only one at .09.
    net[1].bias.data[1] = -0.2 - 0.5
    assert chosen(0.3) == [2]


def test_samples_in_small_parts_get_the_same_slopes():
    net, x = several("digits")
    y = held_out(6).batch(slice(None))[1]
    graph = trace(net, x)
    whole = worst_slope(graph, x, y, Ball(0.1))
    with memory.limited(50_000):
        parts = worst_slope(graph, x, y, Ball(0.1))
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)
    assert (whole != 0).flatten(1).any(1).all()
    for number in range(6):
        alone = worst_slope(graph, x[number : number + 1], y[number : number + 1], Ball(0.1))
        torch.testing.assert_close(whole[number], alone[0], rtol=1e-4, atol=1e-5)


def test_hidden_units_are_refined_on_request(monkeypatch):
    net, x = several("pooled")
    y = torch.zeros(6, dtype=torch.long)
    asked: list[bool] = []

    def watched(*args, refine):
        asked.append(refine)
        return linear_map(*args, refine=refine)

    monkeypatch.setattr("swiftsure.attacks._interval.linear_map", watched)
    for chosen in ({}, {"refine": False}, {"refine": True}):
        interval_attack(net, x, y, Ball(0.1), steps=1, restarts=1, moves=1, judge=never, **chosen)
        assert set(asked) == {chosen.get("refine", False)}
        asked.clear()
