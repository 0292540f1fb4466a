"""The plain reference of a recheck: it reads what it can, refuses the rest, and bounds what the fast code bounds."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import attached
import networks
from swiftsure.ball import Ball
from swiftsure.bounds import (
    Kept,
    Region,
    Technique,
    alpha_crown,
    difference_bounds,
    entropy,
    technique,
    trace,
)
from swiftsure.certificates._plain_network import PlainNetwork, Unreadable, read_plainly
from swiftsure.certificates._plain_walk import _entropy_at_least, _highest_entropy, walk_plainly
from swiftsure.certificates._proof import SampleSlopes
from swiftsure.certificates._provers import PlainProver
from swiftsure.certificates._walk import walk
from swiftsure.exits import MultiExit, Policy, attach, exit_macs
from swiftsure.models import build
from swiftsure.models.layers import ResidualBlock

TECHNIQUES = ("interval", "crown-ibp", "symbolic", "crown")
BALLS = (Ball(0.03), Ball(0.3, "2"), Ball(0.5, "1"))


def batch_norms() -> nn.Module:
    """A convolution with batch norm, a residual sum of it and of what it read, no ReLU in between."""
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, 1, 1, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        networks.Residual(
            nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Conv2d(3, 3, 3, 1, 1)),
            nn.Identity(),
            "x + y",
        ),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 5),
    )


def three_exits() -> nn.Module:
    """Residual blocks, whose two branches have ReLUs of their own, and heads with ReLUs between the stages."""
    stages = [nn.Sequential(nn.Conv2d(2, 3, 3, 1, 1), nn.ReLU()), ResidualBlock(3, 4, down=True)]
    stages.append(ResidualBlock(4, 4, down=False))
    heads = [
        nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.ReLU(), nn.Linear(5, 5)),
        nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)),
        nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 5)),
    ]
    return MultiExit(stages, heads)


def with_exits() -> nn.Module:
    """A backbone as real code has it, cut at a block."""
    head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5))
    return attach(attached.backbone(), {"first.0": head}, example=attached.images(2))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch norms": (batch_norms, (2, 4, 4)),
    "three exits": (three_exits, (2, 4, 4)),
    "attached": (with_exits, (3, 8, 8)),
}


def drawn(name: str) -> tuple[nn.Module, Tensor]:
    """A float64 net with random weights, and three images."""
    make, shape = NETS[name]
    generator = torch.Generator().manual_seed(4)
    net = make()
    if name != "attached":
        networks.randomise(net, generator)
    return net.double().eval(), torch.rand(3, *shape, generator=generator).double()


def fast(net: nn.Module, x: Tensor, y: Tensor, ball: Ball, bound: Technique) -> list[tuple[Tensor, Tensor]]:
    """Bounds of z_j - z_y at every exit."""
    with torch.no_grad():
        found = difference_bounds(bound, trace(net, x), Region(x, ball), y)
    return [(-high, -low) for low, high in found]


def require_equal(network: PlainNetwork, net: nn.Module, x: Tensor, y: Tensor, ball: Ball, name: str) -> None:
    expected = fast(net, x, y, ball, technique(name))
    for i, image in enumerate(x):
        found = PlainProver(network).sample(image, ball).differences(name, int(y[i]), None)
        for ours, theirs in zip(found, expected, strict=True):
            for end, wanted in zip(ours, theirs, strict=True):
                scale = 1 + float(wanted[i].abs().max())
                np.testing.assert_allclose(end, wanted[i].numpy(), rtol=0, atol=1e-8 * scale, err_msg=name)


@pytest.mark.parametrize("name", NETS)
def test_the_reference_gives_the_bounds_of_every_technique(name: str) -> None:
    net, x = drawn(name)
    network = read_plainly(net, x.shape[1:])
    assert network.macs == (exit_macs(net, x.shape[1:]))
    for image in x:
        for ours, theirs in zip(
            network.values(image.flatten().numpy()), attached.tuple_of(net(image[None])), strict=True
        ):
            np.testing.assert_allclose(ours, theirs[0].detach().numpy(), rtol=1e-9, atol=1e-9)
    y = torch.tensor([0, 3, 4])
    for ball in BALLS if name == "three exits" else (Ball(0.01),):
        for bound in TECHNIQUES:
            count = 1 if name == "attached" else 3
            require_equal(network, net, x[:count], y[:count], ball, bound)


@settings(max_examples=25, deadline=None)
@given(networks.cases(plain=True))
def test_the_reference_reads_every_network_of_relus(case: networks.Case) -> None:
    case = case.double()
    net, x = case.net.eval(), case.x
    network = read_plainly(net, x.shape[1:])
    for name in TECHNIQUES:
        require_equal(network, net, x[:1], case.y[:1], case.ball, name)


@settings(max_examples=15, deadline=None)
@given(networks.cases())
def test_what_the_reference_reads_it_reads_rightly(case: networks.Case) -> None:
    case = case.double()
    net, x = case.net.eval(), case.x
    try:
        network = read_plainly(net, x.shape[1:])
    except Unreadable:
        return
    require_equal(network, net, x[:1], case.y[:1], case.ball, "crown")


@pytest.mark.parametrize("name", NETS)
def test_kept_slopes_give_the_ascents_bounds(name: str) -> None:
    """The order of ReLUs and of their units is the same on both sides, or other units would get these slopes."""
    net, x = drawn(name)
    x, ball = (x[:1], Ball(0.01)) if name == "attached" else (x[:2], Ball(0.05))
    y = torch.tensor([1, 4])[: len(x)]
    kept: Kept = {}

    def bound(graph, region, spec=None, *, upper=True):  # type: ignore[no-untyped-def]
        return alpha_crown(graph, region, spec, upper=upper, steps=8, kept=kept)

    expected, plain = fast(net, x, y, ball, bound), fast(net, x, y, ball, technique("crown"))
    gain = max(float((high - h).max()) for (_, h), (_, high) in zip(expected, plain, strict=True))
    assert gain > 1e-3
    assert any(bool(((slopes.levels > 0) & (slopes.levels < 255)).any()) for slopes in kept.values())
    prover = PlainProver(read_plainly(net, x.shape[1:]))
    for i, image in enumerate(x):
        slopes: SampleSlopes = {
            (exit, above): type(one)(one.function + (one.function >= y[i]), one.unit, one.levels)
            for (sample, exit, above), one in kept.items()
            if sample == i
        }
        found = prover.sample(image, ball).differences("alpha-crown", int(y[i]), slopes)
        for ours, theirs in zip(found, expected, strict=True):
            for end, wanted in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(end, wanted[i].numpy(), rtol=0, atol=1e-6)


def test_the_reference_reads_calls_that_have_no_rule() -> None:
    """Whatever is affine is read, as it is read by being called."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(4, 3, 2, 2)
            self.out = nn.Linear(3 * 16, 4)

        def forward(self, x: Tensor) -> Tensor:
            first, second = x.chunk(2, 1)
            x = torch.cumsum(torch.cat([first - 2 * second, second], 1), 3).flip(2)
            x = torch.einsum("bchw,cd->bdhw", x, torch.arange(8.0).view(2, 4).double()).relu_()
            return self.out(F.interpolate(self.up(x), size=4, mode="bicubic").flatten(1))

    net = Odd().double()
    network = read_plainly(net, (2, 4, 4))
    assert len(network.relus) == 1
    image = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    np.testing.assert_allclose(
        network.values(image.flatten().numpy())[0], net(image)[0].detach().numpy(), rtol=1e-9, atol=1e-9
    )


class Written(nn.Module):
    """A forward pass given as a function of the convolution's values."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.out, self.function = nn.Conv2d(1, 2, 3), nn.Linear(8, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.function(self.conv(x)).flatten(1))


def _aliased(z: Tensor) -> Tensor:
    part = z[:, :1]
    part.mul_(0.5)
    return z


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda z: F.max_pool2d(z, 2, 1, 1)[:, :, :2, :2], "'max_pool2d' is neither affine"),
        (lambda z: z.sigmoid(), "'sigmoid' is neither"),
        (lambda z: z.clamp_min(0), "'clamp_min' is neither"),
        (lambda z: F.leaky_relu(z, 0.01), "'leaky_relu' is neither"),
        (lambda z: F.hardtanh(z, -1e4, 1e4), "'hardtanh' is neither"),
        (lambda z: z * z, "'mul' is neither"),
        (lambda z: z - z.mean(0, keepdim=True), "of shape"),
        (lambda z: z - z.flip(0), "neither affine nor a ReLU of each sample alone"),
        (lambda z: z * (z > 0), "returns torch.bool"),
        (lambda z: z * float(torch.equal(z, z)), "takes numbers"),
        (lambda z: z if z.sum() > 0 else -z, "of shape"),
        (lambda z: z + torch.rand_like(z), "is neither affine"),
        (lambda z: z.float().double(), "torch.float32"),
        (lambda z: z.view(7, -1)[:3], "does not run on random values"),
        (_aliased, "do not compute what it computes"),
    ],
)
def test_what_the_reference_cannot_read_is_refused(
    function: Callable[[Tensor], Tensor], message: str
) -> None:
    with pytest.raises(Unreadable, match=message):
        read_plainly(Written(function), (1, 4, 4))


def test_large_matrices_are_refused() -> None:
    net = build("digits_small", width=2, hidden=3)
    size = sum(m.nnz for node in read_plainly(net, (1, 8, 8)).nodes for m in node.matrices)
    read_plainly(net, (1, 8, 8), most_nonzeros=size)
    with pytest.raises(Unreadable, match="too many entries"):
        read_plainly(net, (1, 8, 8), most_nonzeros=size - 1)


# The walk


@st.composite
def boxes(draw: st.DrawFn) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Policy, float, list[Tensor]]:
    """Boxes of differences of 40 samples at one to three exits, their labels, thresholds, slack and logits inside."""
    exits, classes = draw(st.integers(1, 3)), draw(st.sampled_from([2, 3, 5, 10]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    y = torch.randint(0, classes, (40,), generator=generator)
    own = F.one_hot(y, classes).bool()
    found, logits = [], []
    for _ in range(exits):
        # Mostly right, with widths from nothing to several logits.
        middle = 3 * torch.randn(40, classes, generator=generator).double() - 3
        width = (
            3
            * torch.rand(40, 1, generator=generator).double()
            * torch.rand(40, classes, generator=generator).double()
        )
        low, high = ((middle + sign * width).masked_fill(own, 0.0) for sign in (-1, 1))
        # Some bounds say nothing, and some contradict themselves.
        odd = torch.randint(0, 40, (2, 40, classes), generator=generator)
        low = low.masked_fill((odd[0] == 0) & ~own, -torch.inf).masked_fill((odd[0] == 1) & ~own, torch.nan)
        high = high.masked_fill((odd[1] == 0) & ~own, torch.inf).where((odd[1] != 1) | own, low - 0.3)
        found.append((low, high))
        logits.append(middle.masked_fill(own, 0.0))
    rule = draw(st.sampled_from(["entropy", "confidence"]))
    limits = st.sampled_from([0.0, 0.02, 0.2, 0.7, 0.95, 1.0])
    policy = Policy(rule, [draw(limits) for _ in range(exits - 1)])
    return found, y, policy, draw(st.sampled_from([0.0, 1e-4, 0.1])), logits


@settings(max_examples=40, deadline=None)
@given(boxes())
def test_the_plain_walk_is_the_walk(
    case: tuple[list[tuple[Tensor, Tensor]], Tensor, Policy, float, list[Tensor]],
) -> None:
    found, y, policy, slack, logits = case
    expected = walk(found, y, policy, slack, logits)
    for i in range(len(y)):
        own = [(low[i].numpy(), high[i].numpy()) for low, high in found]
        walked = walk_plainly(own, int(y[i]), policy, slack, [z[i].numpy() for z in logits])
        assert walked.margin == pytest.approx(float(expected.margin[i]), abs=1e-12)
        assert walked.required == expected.required[i].nonzero()[:, 0].tolist()
        assert walked.max_exit == int(expected.max_exit[i])
        assert walked.open == expected.open[i].nonzero()[:, 0].tolist()
        assert walked.failing == expected.failing[i].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("classes", [4, 14, 40])
def test_plain_ranges_of_entropy(classes: int) -> None:
    """Against the other code's ranges, which have tests by brute force of their own."""
    generator = torch.Generator().manual_seed(classes)
    for _ in range(12):
        low = 3 * torch.randn(classes, generator=generator).double()
        high = low + 2 * torch.rand(classes, generator=generator).double()
        assert _highest_entropy(low.numpy(), high.numpy()) == pytest.approx(
            float(entropy.highest_entropy(low, high)), abs=1e-9
        )
        least = float(entropy.lowest_entropy(low, high))
        assert _entropy_at_least(low.numpy(), high.numpy(), least - 1e-6)
        assert not _entropy_at_least(low.numpy(), high.numpy(), least + 1e-6)
    infinite = np.full(classes, np.inf)
    assert not _entropy_at_least(-infinite, infinite, 1e-9)
    assert _highest_entropy(-infinite, infinite) == pytest.approx(np.log(classes))


def test_the_network_stays_as_it_is() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4, 2)
    )
    net.train()
    before = copy.deepcopy(net.state_dict())
    read_plainly(net, (1, 4, 4))
    assert all(module.training for module in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
