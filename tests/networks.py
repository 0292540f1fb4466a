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
BENT: dict[str, Callable[[Tensor], Tensor]] = {
    "F.leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "x.clamp": lambda x: x.clamp(-0.5, 0.7),
    "F.hardtanh": F.hardtanh,
    "F.relu6": F.relu6,
    "F.hardsigmoid": F.hardsigmoid,
    "torch.sigmoid": torch.sigmoid,
    "x.tanh()": lambda x: x.tanh(),
    "F.gelu": F.gelu,
    "F.silu": F.silu,
    "F.hardswish": F.hardswish,
    "F.softplus": F.softplus,
}
"""Activations other than ReLU."""
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


class Joined(nn.Module):
    """The channels or features of several branches side by side."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


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

    def double(self) -> Case:
        """The same in float64."""
        return Case(self.net.double(), self.x.double(), self.y, self.ball)


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


def _bent() -> st.SearchStrategy[nn.Module]:
    return st.builds(Spelled, st.just(BENT), st.sampled_from(sorted(BENT)))


def _size_after(shape: tuple[int, ...], layer: nn.Module) -> tuple[int, ...]:
    return tuple(layer(torch.zeros(1, *shape)).shape[1:])


@st.composite
def _pool(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[nn.Module, tuple[int, ...]]:
    """Max and average pooling."""
    kernel = tuple(draw(st.integers(1, min(3, size))) for size in shape[1:])
    stride = draw(st.tuples(*[st.integers(1, 2)] * 2))
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    ceil = draw(st.booleans())
    kind = draw(st.sampled_from(["max", "max", "average", "to one"]))
    if kind == "max":
        layer: nn.Module = nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil)
    elif kind == "average":
        layer = nn.AvgPool2d(kernel, stride, padding, ceil, draw(st.booleans()))
    else:
        layer = nn.AdaptiveAvgPool2d(1)
    return layer, _size_after(shape, layer)


@st.composite
def _joined(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[nn.Module, tuple[int, ...]]:
    out, smooth = draw(st.integers(1, 2)), draw(_bent())
    branches: list[nn.Module] = [nn.Sequential(_same(shape[0], out), draw(_relu()))]
    branches += draw(
        st.sampled_from([[nn.Identity()], [_same(shape[0], 1)], [nn.Sequential(_same(shape[0], 1), smooth)]])
    )
    return Joined(*branches), (
        shape[0] + out if isinstance(branches[1], nn.Identity) else 1 + out,
        *shape[1:],
    )


@st.composite
def _spatial_step(draw: st.DrawFn, shape: tuple[int, ...], plain: bool) -> tuple[nn.Module, tuple[int, ...]]:
    kinds = ["conv", "conv", "relu", "residual", "batch norm", "twice", "nothing"]
    kind = draw(st.sampled_from(kinds if plain else [*kinds, "pool", "pool", "bent", "joined"]))
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
    if kind == "pool":
        conv, after = draw(_conv(shape))
        pool, after = draw(_pool(after))
        # After a ReLU many inputs of a window have the same lower bound, 0.
        return nn.Sequential(conv, *draw(st.permutations([pool, draw(_relu())]))), after
    if kind == "bent":
        return nn.Sequential(_same(shape[0], shape[0]), draw(_bent())), shape
    if kind == "joined":
        return draw(_joined(shape))
    return draw(st.sampled_from([nn.Identity, lambda: nn.Dropout(0.4), FunctionalDropout]))(), shape


@st.composite
def _head(draw: st.DrawFn, shape: tuple[int, ...], classes: int, plain: bool) -> nn.Module:
    """Flatten in some spelling, linear layers, logits from a last linear layer."""
    flatten = st.builds(Spelled, st.just(FLATTEN), st.sampled_from(sorted(FLATTEN))) | st.builds(nn.Flatten)
    features = int(torch.Size(shape).numel())
    layers: list[nn.Module] = [draw(flatten)]
    for _ in range(draw(st.integers(0, 2))):
        width = draw(st.integers(1, 6))
        layers.append(nn.Linear(features, width, bias=draw(st.booleans())))
        orders = ["relu", "relu", "norm, relu", "relu, norm", "dropout"]
        for word in draw(st.sampled_from(orders if plain else [*orders, "bent", "joined"])).split(", "):
            steps: dict[str, Callable[[], nn.Module]] = {
                "relu": lambda: draw(_relu()),
                "norm": lambda width=width: nn.BatchNorm1d(width),
                "dropout": lambda: nn.Dropout(0.5),
                "bent": lambda: draw(_bent()),
                "joined": lambda width=width: Joined(nn.Linear(width, 2), nn.ReLU()),
            }
            layers.append(steps[word]())
        features = width + 2 if isinstance(layers[-1], Joined) else width
    layers.append(nn.Linear(features, classes, bias=draw(st.booleans())))
    return nn.Sequential(*layers)


@st.composite
def nets(
    draw: st.DrawFn, exits: int | None = None, plain: bool = False
) -> tuple[nn.Module, tuple[int, ...], int]:
    """A net with random weights, the shape of its images and its number of classes; if plain, ReLU alone bends."""
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
            layer, shape = draw(_spatial_step(shape, plain))
            layers.append(layer)
        return layers

    grow(trunk, 3)
    if exits == 1:
        net: nn.Module = nn.Sequential(*trunk, *draw(_head(shape, classes, plain)))
    else:
        early = draw(_head(shape, classes, plain))
        late = nn.Sequential(*grow([], 2), *draw(_head(shape, classes, plain)))
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
def cases(draw: st.DrawFn, exits: int | None = None, plain: bool = False) -> Case:
    """A net, one to three images in [0, 1] and in the ball's pixel range, labels, and a ball."""
    net, shape, classes = draw(nets(exits, plain))
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
