"""What a trace must not miss: writes in place, hooks, attributes, other arguments, loops over shapes."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftsure import bounds
from swiftsure.ball import Ball
from swiftsure.errors import InputError

METHODS = tuple(bounds.TECHNIQUES)
POINT = Ball(0.0)


class Body(nn.Module):
    """A convolution, any function of (module, maps), a linear layer."""

    def __init__(
        self, function: Callable[[nn.Module, Tensor], Tensor], features: int = 64, **parts: Any
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(features, 3)
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self, self.stem(x)).flatten(1))


def images(count: int = 2) -> Tensor:
    return torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def assert_true_to(net: nn.Module) -> None:
    """A ball of radius zero holds exactly the output of the network."""
    x = images()
    with torch.no_grad():
        logits = net(x.clone())
        for method in ("interval", "crown"):
            for end in bounds.output_bounds(net, x, POINT, method):
                torch.testing.assert_close(end, logits, rtol=1e-5, atol=1e-5)


def louder(net: nn.Module) -> None:
    """So that limits show which the images of tracing never reach."""
    with torch.no_grad():
        net.stem.weight.mul_(100)


# Writes in place


def dropped(self: nn.Module, h: Tensor) -> Tensor:
    h.clamp_(max=1.0)
    return h


def dropped_module(self: nn.Module, h: Tensor) -> Tensor:
    self.limit(h)
    return h * 2


def written_twice(self: nn.Module, h: Tensor) -> Tensor:
    same = F.dropout(h, training=self.training)
    F.relu_(h)
    h.clamp_(max=1.0).mul_(-0.5)
    return same + h


def one_half(self: nn.Module, h: Tensor) -> Tensor:
    a, b = h.chunk(2, 1)
    return torch.cat([a.clamp_(max=1.0), b, a], 1)


def augmented(self: nn.Module, h: Tensor) -> Tensor:
    g = h.clamp(max=1.0)
    g += h.clamp(min=0.5)
    g *= 0.5
    return g


@pytest.mark.parametrize(
    ("function", "features"),
    [(dropped, 64), (dropped_module, 64), (written_twice, 64), (one_half, 96), (augmented, 64)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_writes_in_place_are_seen(function: Callable[[nn.Module, Tensor], Tensor], features: int) -> None:
    net = Body(function, features, limit=nn.Hardtanh(-1.0, 1.0, inplace=True)).eval()
    assert_true_to(net)
    louder(net)
    assert_true_to(net)


def images_written_to(self: nn.Module, x: Tensor) -> Tensor:
    x.sub_(0.5)
    return self.layer(x.flatten(1))


def test_images_may_be_written_to() -> None:
    class Net(nn.Module):
        forward = images_written_to

    net = Net()
    net.layer = nn.Linear(16, 3)
    x = images()
    before = x.clone()
    assert_true_to(net)
    bounds.output_bounds(net, x, Ball(0.1), "crown")
    assert torch.equal(x, before)


def under_a_view(self: nn.Module, h: Tensor) -> Tensor:
    h.flatten(1).clamp_(max=1.0)
    return h


def through_a_part(self: nn.Module, h: Tensor) -> Tensor:
    parts = h.chunk(2, 1)
    parts[0].clamp_(max=1.0)
    return h


def to_a_buffer(self: nn.Module, h: Tensor) -> Tensor:
    return h * self.steps.add_(1)


@pytest.mark.parametrize("function", [under_a_view, through_a_part, to_a_buffer], ids=lambda f: f.__name__)
def test_writes_that_no_trace_can_follow_are_refused(function: Callable[[nn.Module, Tensor], Tensor]) -> None:
    net = Body(function).eval()
    net.register_buffer("steps", torch.zeros(1))
    with pytest.raises(InputError, match=r"(clamp_|add_).*inplace=False"):
        bounds.output_bounds(net, images(), POINT)


# Hooks


def test_a_hook_that_limits_what_a_layer_returns_is_obeyed() -> None:
    net = Body(lambda self, h: h).eval()
    net.stem.register_forward_hook(lambda module, inputs, output: output.clamp(max=1.0))
    assert_true_to(net)
    louder(net)
    assert_true_to(net)


def test_a_hook_that_only_looks_does_no_harm() -> None:
    seen: list[Any] = []
    net = Body(lambda self, h: F.relu(h)).eval()
    for module in (net.stem, net.last):
        module.register_forward_hook(lambda module, inputs, output: seen.append(output.detach().mean()))
    assert_true_to(net)


# What a trace depends on


def other_function(net: nn.Module) -> None:
    net.activation = torch.tanh


def other_entry(net: nn.Module) -> None:
    net.options["scale"] = 3.0


def other_setting(net: nn.Module) -> None:
    net.settings.inner.shifted = True


def other_module_in_a_list(net: nn.Module) -> None:
    net.plain[0] = nn.Hardtanh(-0.1, 0.1)


def read_from_attributes(self: nn.Module, h: Tensor) -> Tensor:
    h = self.activation(h * self.options["scale"])
    h = self.plain[0](h)
    return h + 1 if self.settings.inner.shifted else h


@pytest.mark.parametrize(
    "change", [other_function, other_entry, other_setting, other_module_in_a_list], ids=lambda f: f.__name__
)
def test_bounds_follow_what_a_forward_pass_reads(change: Callable[[nn.Module], None]) -> None:
    limit = nn.Identity()
    net = Body(
        read_from_attributes,
        activation=F.relu,
        options={"scale": 2.0},
        settings=SimpleNamespace(inner=SimpleNamespace(shifted=False)),
        plain=[limit],
    ).eval()
    net.registered = nn.ModuleList([limit, nn.Hardtanh(-0.1, 0.1)])
    assert_true_to(net)
    if change is other_module_in_a_list:
        net.plain[0] = net.registered[1]
    else:
        change(net)
    assert_true_to(net)


def test_weights_of_another_type_than_when_it_was_traced_are_refused() -> None:
    net = Body(lambda self, h: h).eval()
    assert_true_to(net)
    net.double()
    with pytest.raises(InputError, match=r"float32.*float64"):
        bounds.output_bounds(net, images(), POINT)


def test_classes_may_be_taken_away() -> None:
    net = Body(lambda self, h: h).eval()
    assert bounds.margins(net, images(), torch.tensor([0, 2]), POINT).shape == (2, 3)
    for name in ("weight", "bias"):
        setattr(net.last, name, nn.Parameter(getattr(net.last, name)[:2]))
    assert bounds.margins(net, images(), torch.tensor([0, 1]), POINT).shape == (2, 2)
    with pytest.raises(InputError, match="label 1 is 2"):
        bounds.margins(net, images(), torch.tensor([0, 2]), POINT)


# Forward passes as people write them


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 3)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, features: bool = False, *more: Tensor, **options: Any
    ) -> Any:
        h = x.flatten(1) if mask is None else x.flatten(1) * mask
        return (self.layer(h), h) if features else self.layer(h)


class Needed(nn.Module):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return (x + other).flatten(1)


def test_other_arguments_have_their_defaults() -> None:
    assert_true_to(Optional())
    with pytest.raises(InputError, match="other"):
        bounds.output_bounds(Needed(), images(), POINT)


def looped(self: nn.Module, h: Tensor) -> Tensor:
    return torch.cat([F.relu(part) * (i + 1) for i, part in enumerate(h.chunk(2, dim=-3))], 1)


def unpacked(self: nn.Module, h: Tensor) -> Tensor:
    return F.relu(h).reshape(h.shape[0], -1, *h.shape[2:]) if len(h.shape) == 4 else h


def swapped(self: nn.Module, h: Tensor) -> Tensor:
    return F.relu(torch.cat(h.split([1, 2, 1], 1)[::-1], 1))


def joined_again(self: nn.Module, h: Tensor) -> Tensor:
    return torch.cat(torch.unbind(h, 1), -1)


def masked(self: nn.Module, h: Tensor) -> Tensor:
    return h * self.mask + self.mask


@pytest.mark.parametrize(
    "function", [looped, unpacked, swapped, joined_again, masked], ids=lambda f: f.__name__
)
def test_forward_passes_as_people_write_them(function: Callable[[nn.Module, Tensor], Tensor]) -> None:
    net = Body(function).eval()
    net.register_buffer("mask", torch.tensor([[True, False, True, True]]).T[:, :, None])
    assert_true_to(net)


def added_in_place(self: nn.Module, h: Tensor) -> Tensor:
    """torch.fx takes it for a sum of its own; `h` has changed as well."""
    more = h
    more += 1
    return h + more


@pytest.mark.parametrize(
    ("function", "line"),
    [
        (lambda self, h: h.reshape(len(h), -1), r"x\.shape\[0\]"),
        (lambda self, h: torch.stack([F.relu(image) for image in h]), "loops over the images"),
        (lambda self, h: h[:3], "mixes the samples"),
        (lambda self, h: self.layer(h), "remove_parametrizations"),
        (added_in_place, r"a \+= b"),
    ],
    ids=["len", "loop", "slice", "weight norm", "sum in place"],
)
def test_what_cannot_be_traced_is_refused_with_a_way_out(function: Any, line: str) -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
    with pytest.raises(InputError, match=line) as caught:
        bounds.output_bounds(Body(function, layer=layer).eval(), images(), POINT)
    assert "\n" not in str(caught.value)


def test_a_failure_names_the_line_of_the_users_code() -> None:
    def broken(self: nn.Module, h: Tensor) -> Tensor:
        h[:, 0] = 0.0
        return h

    line = broken.__code__.co_firstlineno + 1
    with pytest.raises(InputError, match=rf"line {line} of test_bounds_tracing\.py.*torch\.cat"):
        bounds.output_bounds(Body(broken).eval(), images(), POINT)


@pytest.mark.parametrize(
    "wrapped",
    [nn.DataParallel, lambda net: torch.compile(net, backend="eager")],
    ids=["DataParallel", "torch.compile"],
)
def test_what_is_wrapped_is_bounded(wrapped: Callable[[nn.Module], nn.Module]) -> None:
    net = Body(lambda self, h: F.relu(h)).eval()
    for found, wanted in zip(
        bounds.output_bounds(wrapped(net), images(), Ball(0.1)),
        bounds.output_bounds(net, images(), Ball(0.1)),
        strict=True,
    ):
        assert torch.equal(found, wanted)


# Linear functions that are asked for


@pytest.mark.parametrize("method", METHODS)
def test_a_spec_of_another_shape_or_type_is_refused(method: str) -> None:
    net = Body(lambda self, h: F.relu(h)).eval()
    graph, region = bounds.trace(net, images()), bounds.Region(images(), Ball(0.1))
    for shape in [(2, 3), (1, 1, 3), (2, 1, 4), (2, 0, 3)]:
        with pytest.raises(InputError, match=r"spec has shape .*\(2, 1 or more, 3\)"):
            bounds.technique(method)(graph, region, torch.zeros(shape))
    with pytest.raises(InputError, match=r"float64.*float32"):
        bounds.technique(method)(graph, region, torch.zeros(2, 1, 3).double())
    assert bounds.technique(method)(graph, region, torch.ones(2, 5, 3))[0][0].shape == (2, 5)
