"""Small random networks, balls and images for hypothesis, in the many spellings that real code uses."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from swiftsure.ball import Ball

FLATTEN: dict[str, Callable[[Tensor], Tensor]] = {
    "torch.flatten": lambda x: torch.flatten(x, 1),
    "view(size(0), -1)": lambda x: x.view(x.size(0), -1),
    "view(shape[0], -1)": lambda x: x.view(x.shape[0], -1),
    "view(-1, n)": lambda x: x.view(-1, x.size(1) * x.size(2) * x.size(3)),
    "reshape(size(0), -1)": lambda x: x.reshape(x.size(0), -1),
    "flatten(1)": lambda x: x.flatten(1),
}
RELU: dict[str, Callable[[Tensor], Tensor]] = {
    "F.relu": F.relu,
    "F.relu(inplace)": lambda x: F.relu(x, inplace=True),
    "torch.relu": torch.relu,
    "x.relu()": lambda x: x.relu(),
}
ADD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x + y": lambda x, y: x + y,
    "torch.add": torch.add,
    "x += y": operator.iadd,
}


class Normalise(nn.Module):
    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Spelled(nn.Module):
    """A function named by a key of one of the tables above."""

    def __init__(self, table: dict[str, Callable[[Tensor], Tensor]], key: str) -> None:
        super().__init__()
        self.function, self.key = table[key], key

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return self.key


class FunctionalDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


class Residual(nn.Module):
    """body(x) + skip(x), with a spelling of the sum."""

    def __init__(self, body: nn.Module, skip: nn.Module, add: str) -> None:
        super().__init__()
        self.body, self.skip, self.add = body, skip, add

    def forward(self, x: Tensor) -> Tensor:
        return ADD[self.add](self.body(x), self.skip(x))

    def extra_repr(self) -> str:
        return self.add


class Twice(nn.Module):
    """One module used two times with a relu between."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.relu = module, nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.module(self.relu(self.module(x))))


class TwoExits(nn.Module):
    """(early(trunk(x)), late(rest(trunk(x))))."""

    def __init__(self, trunk: nn.Module, early: nn.Module, late: nn.Module) -> None:
        super().__init__()
        self.trunk, self.early, self.late = trunk, early, late

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shared = self.trunk(x)
        return self.early(shared), self.late(shared)


@dataclass
class Case:
    """One drawn problem; the net is in training or eval mode, as drawn."""

    net: nn.Module
    x: Tensor
    y: Tensor
    ball: Ball


def randomise(net: nn.Module, generator: torch.Generator, gain: float = 1.0) -> nn.Module:
    """Draw all weights, biases and running statistics anew, in place."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, 0.0, gain * (2 / fan_in) ** 0.5, generator=generator)
            if module.bias is not None:
                nn.init.normal_(module.bias, 0.0, 0.2, generator=generator)
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0.0, 0.5, generator=generator)
            nn.init.uniform_(module.running_var, 0.2, 3.0, generator=generator)
            if module.affine:
                # Scales of both signs: a negative one swaps lower and upper bound.
                nn.init.normal_(module.weight, 0.0, 1.0, generator=generator)
                nn.init.normal_(module.bias, 0.0, 0.5, generator=generator)
    return net


def _spatial(shape: tuple[int, ...], conv: nn.Conv2d) -> tuple[int, ...] | None:
    sizes = [
        (size + 2 * conv.padding[i] - conv.dilation[i] * (conv.kernel_size[i] - 1) - 1) // conv.stride[i] + 1
        for i, size in enumerate(shape[1:])
    ]
    return (conv.out_channels, *sizes) if min(sizes) >= 1 else None


@st.composite
def _conv(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[nn.Module, tuple[int, ...]]:
    groups = draw(st.sampled_from([g for g in (1, 2) if shape[0] % g == 0]))
    one_or_two = st.tuples(*[st.integers(1, 2)] * 2)
    conv = nn.Conv2d(
        shape[0],
        groups * draw(st.integers(1, 2)),
        kernel_size=draw(st.tuples(*[st.integers(1, 3)] * 2)),
        stride=draw(one_or_two),
        padding=draw(st.tuples(*[st.integers(0, 2)] * 2)),
        dilation=draw(one_or_two),
        groups=groups,
        bias=draw(st.booleans()),
    )
    after = _spatial(shape, conv)
    if after is None:
        conv = nn.Conv2d(shape[0], shape[0], 3, padding=1)
        after = shape
    return conv, after


def _same(channels: int, out: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1, groups=groups)


def _relu(fresh: bool = True) -> st.SearchStrategy[nn.Module]:
    """In-place spellings only where the input is fresh: read by nothing else, and not the image itself."""
    modules = st.builds(nn.ReLU, inplace=st.booleans() if fresh else st.just(False))
    keys = [key for key in sorted(RELU) if fresh or "inplace" not in key]
    return modules | st.builds(Spelled, st.just(RELU), st.sampled_from(keys))


@st.composite
def _residual(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[nn.Module, tuple[int, ...]]:
    channels = shape[0]
    kind = draw(st.sampled_from(["identity", "conv skip", "down"]))
    add = draw(st.sampled_from(sorted(ADD)))
    if kind == "down" and min(shape[1:]) >= 2:
        out = draw(st.integers(1, 3))
        body = [nn.Conv2d(channels, out, 4, 2, 1), draw(_relu()), _same(out, out)]
        skip: nn.Module = nn.Conv2d(channels, out, 2, 2, 0)
        after = (out, shape[1] // 2, shape[2] // 2)
    elif kind == "identity":
        body, skip, after = (
            [_same(channels, channels), draw(_relu()), _same(channels, channels)],
            nn.Identity(),
            shape,
        )
    else:
        out = draw(st.integers(1, 3))
        body, skip, after = [_same(channels, out)], nn.Conv2d(channels, out, 1), (out, *shape[1:])
    if draw(st.booleans()):
        body.append(nn.BatchNorm2d(after[0]))
    return nn.Sequential(Residual(nn.Sequential(*body), skip, add), draw(_relu())), after


@st.composite
def _spatial_step(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[nn.Module, tuple[int, ...]]:
    kind = draw(st.sampled_from(["conv", "conv", "relu", "residual", "batch norm", "twice", "nothing"]))
    if kind == "conv":
        conv, after = draw(_conv(shape))
        # Two affine layers in a row have one combined matrix, whose entries may cancel.
        return (nn.Sequential(conv, draw(_relu())) if draw(st.booleans()) else conv), after
    if kind == "residual":
        return draw(_residual(shape))
    if kind == "batch norm":
        return nn.BatchNorm2d(shape[0], affine=draw(st.booleans())), shape
    if kind == "twice":
        return Twice(_same(shape[0], shape[0], draw(st.sampled_from([1, shape[0]])))), shape
    if kind == "relu":
        return draw(_relu(fresh=False)), shape
    return draw(st.sampled_from([nn.Identity, lambda: nn.Dropout(0.4), FunctionalDropout]))(), shape


@st.composite
def _head(draw: st.DrawFn, shape: tuple[int, ...], classes: int) -> nn.Module:
    """Flatten in some spelling, linear layers, logits from a last linear layer."""
    flatten = st.builds(Spelled, st.just(FLATTEN), st.sampled_from(sorted(FLATTEN))) | st.builds(nn.Flatten)
    features = int(torch.Size(shape).numel())
    layers: list[nn.Module] = [draw(flatten)]
    for _ in range(draw(st.integers(0, 2))):
        width = draw(st.integers(1, 6))
        layers.append(nn.Linear(features, width, bias=draw(st.booleans())))
        order = draw(st.sampled_from(["relu", "relu", "norm, relu", "relu, norm", "dropout"]))
        for word in order.split(", "):
            layers.append(
                {"relu": draw(_relu()), "norm": nn.BatchNorm1d(width), "dropout": nn.Dropout(0.5)}[word]
            )
        features = width
    layers.append(nn.Linear(features, classes, bias=draw(st.booleans())))
    return nn.Sequential(*layers)


@st.composite
def nets(draw: st.DrawFn, exits: int | None = None) -> tuple[nn.Module, tuple[int, ...], int]:
    """A net with random weights, the shape of its images and its number of classes."""
    shape = image_shape = (draw(st.integers(1, 2)), draw(st.integers(2, 4)), draw(st.integers(2, 4)))
    classes = draw(st.integers(2, 4))
    trunk: list[nn.Module] = []
    if draw(st.booleans()):
        trunk.append(
            Normalise(torch.full((shape[0], 1, 1), 0.4), torch.linspace(0.3, 0.6, shape[0])[:, None, None])
        )
    exits = draw(st.integers(1, 2)) if exits is None else exits

    def grow(layers: list[nn.Module], most: int) -> list[nn.Module]:
        nonlocal shape
        for _ in range(draw(st.integers(0, most))):
            layer, shape = draw(_spatial_step(shape))
            layers.append(layer)
        return layers

    grow(trunk, 3)
    if exits == 1:
        net: nn.Module = nn.Sequential(*trunk, *draw(_head(shape, classes)))
    else:
        early = draw(_head(shape, classes))
        late = nn.Sequential(*grow([], 2), *draw(_head(shape, classes)))
        net = TwoExits(nn.Sequential(*trunk), early, late)
    seed, gain = draw(st.integers(0, 2**16)), draw(st.sampled_from([0.5, 1.0, 2.0]))
    randomise(net, torch.Generator().manual_seed(seed), gain)
    return net.train(draw(st.booleans())), image_shape, classes


@st.composite
def balls(draw: st.DrawFn) -> Ball:
    low, high = draw(st.sampled_from([(0.0, 1.0), (0.0, 1.0), (-1.0, 1.0), (0.2, 0.9)]))
    eps = draw(st.sampled_from([0.0, "2/255", 0.1, 0.3, 0.7, 2.0]))
    return Ball(eps, draw(st.sampled_from(["inf", "2", "1"])), low, high)


@st.composite
def cases(draw: st.DrawFn, exits: int | None = None) -> Case:
    """A net, one to three images in [0, 1] and in the ball's pixel range, labels, and a ball."""
    net, shape, classes = draw(nets(exits))
    ball = draw(balls())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    x = torch.rand(draw(st.integers(1, 3)), *shape, generator=generator)
    # Pixels at the very ends of the range are common in real images, and the box is clipped there.
    x = (x * 1.4 - 0.2).clamp(max(ball.low, 0.0), min(ball.high, 1.0))
    y = torch.randint(0, classes, (len(x),), generator=generator)
    return Case(net, x, y, ball)


def outputs(found: Any, pairs: bool = False) -> tuple[Any, ...]:
    """What `margins` or `output_bounds` (pairs) returned, as a tuple of one entry per exit."""
    single = isinstance(found[0] if pairs else found, Tensor)
    return (found,) if single else tuple(found)
