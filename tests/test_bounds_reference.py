"""`swiftsure.bounds` against the float64 reference, and the reference against first principles."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import networks
import reference
from swiftsure import bounds, models
from swiftsure.ball import Ball

METHODS = ("interval", "symbolic")
BALLS = {
    "inf .1": Ball(0.1),
    "inf .3": Ball(0.3),
    "inf 2/255": Ball("2/255"),
    "l2 .5": Ball(0.5, "2"),
    "l1 1": Ball(1.0, "1"),
}
CIFAR_BALLS = ("inf 2/255", "l2 .5")


# The reference itself


def test_one_relu_by_hand() -> None:
    """relu over [-1, 2]: intervals say [0, 2], the relaxation [-2/3, 2]."""
    net = nn.Sequential(models.Normalize([1 / 3], [1 / 3]), nn.Flatten(), nn.ReLU())
    x = torch.full((1, 1, 1, 1), 0.5)
    for method, lower in (("interval", 0.0), ("symbolic", -2 / 3)):
        [(low, high)] = reference.output_bounds(net, x, Ball(0.5), method)
        assert low.item() == pytest.approx(lower, abs=1e-6)
        assert high.item() == pytest.approx(2.0, abs=1e-6)


@pytest.mark.parametrize("norm", ["inf", "2", "1"])
@pytest.mark.parametrize("method", METHODS)
def test_affine_net_inside_the_pixel_range_has_exact_symbolic_margins(norm: str, method: str) -> None:
    torch.manual_seed(0)
    ball = Ball(0.1, norm)
    net = nn.Sequential(models.Normalize([0.2], [0.5]), nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(8, 3))
    x = torch.rand(2, 1, 3, 3) * 0.6 + 0.2
    point = x.double().requires_grad_()
    margin = reference.in_double(net)(point)
    margin = margin[:, :1] - margin
    dual = {"inf": 1.0, "2": 2.0, "1": torch.inf}[norm]
    [found] = reference.margins(net, x, torch.zeros(2, dtype=torch.long), ball, method)
    for j in (1, 2):
        (slope,) = torch.autograd.grad(margin[:, j].sum(), point, retain_graph=True)
        worst = margin[:, j] - 0.1 * torch.linalg.vector_norm(slope.flatten(1), ord=dual, dim=1)
        if method == "symbolic":
            torch.testing.assert_close(found[:, j], worst.detach())
        else:
            # Intervals forget that two layers share their inputs, and know only the box round an L2 or L1 ball.
            assert (found[:, j] < worst - 1e-3).all()


@pytest.mark.parametrize("norm", ["2", "1"])
def test_clipped_balls_take_the_better_of_norm_and_box_on_each_side(norm: str) -> None:
    """logit = x0 + 2 x1 with x = (0, .5): the box gives [0 + 2(.1), .4 + 2(.9)], the norm a reach of .4 |(1, 2)|."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 1))
    net[1].weight.data = torch.tensor([[1.0, 2.0]])
    net[1].bias.data = torch.zeros(1)
    reach = 0.4 * (5**0.5 if norm == "2" else 2.0)
    [(low, high)] = reference.output_bounds(net, torch.tensor([[[[0.0, 0.5]]]]), Ball(0.4, norm), "symbolic")
    assert low.item() == pytest.approx(max(0.2, 1.0 - reach))
    assert high.item() == pytest.approx(min(2.2, 1.0 + reach))
    assert low.item() > 1.0 - reach + 0.09 or norm == "1"
    assert high.item() < 2.2 - 0.3


def test_forward_symbols_equal_backward_substitution() -> None:
    """The same l, u and slopes, written as matrices from the last layer back to the input."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)
    ).double()
    x, ball = torch.rand(1, 1, 2, 3).double(), Ball(0.2)
    low, high = (end.flatten() for end in ball.box(x))
    middle, radius = (low + high) / 2, (high - low) / 2
    layers = [(net[i].weight.detach(), net[i].bias.detach()) for i in (1, 3, 5)]
    relaxed: list[tuple[Tensor, Tensor]] = []

    def span(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        slack = torch.zeros(len(weight), dtype=torch.float64)
        for (before, shift), (slope, half) in zip(layers[len(relaxed) - 1 :: -1], relaxed[::-1], strict=True):
            slack = slack + weight.abs() @ half
            bias = bias + weight @ half
            weight = weight * slope
            weight, bias = weight @ before, bias + weight @ shift
        centre, width = weight @ middle + bias, weight.abs() @ radius + slack
        return centre - width, centre + width

    for weight, bias in layers[:2]:
        lower, upper = (
            span(weight, bias)
            if relaxed
            else (
                weight @ middle + bias - weight.abs() @ radius,
                weight @ middle + bias + weight.abs() @ radius,
            )
        )
        slope = (upper.clamp_min(0) / (upper.clamp_min(0) - lower.clamp_max(0))).clamp(0, 1)
        relaxed.append((slope, -slope * lower.clamp_max(0) / 2))
    lower, upper = span(*layers[2])
    [(low, high)] = reference.output_bounds(net, x, ball, "symbolic", pure=True)
    torch.testing.assert_close(low[0], lower)
    torch.testing.assert_close(high[0], upper)


# The engine


def residual(width: int) -> nn.Module:
    """cifar_resnet's layers, narrower and for 3x16x16 images."""
    block = models.ResidualBlock
    return nn.Sequential(
        models.Normalize([0.485, 0.456, 0.406], [0.225] * 3),
        nn.Conv2d(3, width, 3, 1, 1),
        nn.ReLU(),
        block(width, width, down=True),
        block(width, width, down=False),
        block(width, 2 * width, down=True),
        block(2 * width, 2 * width, down=True),
        nn.Flatten(),
        nn.Linear(2 * width * 2 * 2, 20),
        nn.ReLU(),
        nn.Linear(20, 10),
    )


def scaled(net: nn.Module, factor: float) -> nn.Module:
    """All weights times a factor and the hidden biases lowered, so that many units are stable, as in trained nets."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data.mul_(factor)
            module.bias.data.sub_(0.1)
    return net


NETS = {
    "mnist_small": lambda: models.build("mnist_small"),
    "mnist_small scaled": lambda: scaled(models.build("mnist_small"), 0.4),
    "digits_small": lambda: models.build("digits_small"),
    "digits_small scaled": lambda: scaled(models.build("digits_small"), 0.5),
    "cifar_small": lambda: models.build("cifar_small"),
    "residual": lambda: residual(3),
    "residual scaled": lambda: scaled(residual(4), 0.7),
}
SHAPES = {"mnist": (1, 28, 28), "digits": (1, 8, 8), "cifar": (3, 32, 32), "residual": (3, 16, 16)}


@functools.cache
def problem(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A net and images that look like images: smooth, with a black margin, so that the box is clipped."""
    torch.manual_seed(len(name))
    channels, height, width = SHAPES[name.replace("_", " ").split()[0]]
    images = 1 if height > 20 else 2
    coarse = torch.rand(images, channels, height // 2, width // 2) * 1.6 - 0.5
    x = nn.functional.interpolate(coarse, size=(height, width), mode="bilinear").clamp(0, 1)
    return NETS[name]().eval(), x, torch.arange(images) + 3


@pytest.mark.parametrize(
    ("name", "ball"),
    [(name, ball) for name in NETS for ball in BALLS if ball in CIFAR_BALLS or name != "cifar_small"],
)
def test_margins_equal_the_reference(name: str, ball: str) -> None:
    net, x, y = problem(name)
    for method in METHODS:
        [wanted] = reference.margins(net, x, y, BALLS[ball], method)
        scale = 1 + wanted.abs().max()
        found = bounds.margins(net, x, y, BALLS[ball], method)
        assert found.dtype == torch.float32
        assert ((found - wanted).abs().max() / scale).item() < 1e-5
        assert (found[torch.arange(len(y)), y] == 0).all()
        double = reference.in_double(net)
        exact = bounds.margins(double, x.double(), y, BALLS[ball], method)
        assert ((exact - wanted).abs().max() / scale).item() < 1e-10


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("name", ["digits_small", "residual"])
def test_logit_bounds_equal_the_reference(name: str, ball: str) -> None:
    net, x, _ = problem(name)
    for method in METHODS:
        [wanted] = reference.output_bounds(net, x, BALLS[ball], method)
        for found, end in zip(bounds.output_bounds(net, x, BALLS[ball], method), wanted, strict=True):
            assert ((found - end).abs().max() / (1 + end.abs().max())).item() < 1e-5


@pytest.mark.parametrize("ball", ["inf .1", "l2 .5", "l1 1"])
@pytest.mark.parametrize("name", ["digits_small", "residual scaled"])
def test_gradients_equal_the_reference(name: str, ball: str) -> None:
    """Of the loss that training uses, to every parameter: automatic through the dense float64 form."""
    net, x, y = problem(name)
    net, x = reference.in_double(net), x.double()
    parameters = list(net.parameters())
    for method in METHODS:
        walks = [reference.walk(net, image, BALLS[ball], method)[1][0] for image in x]
        wanted = torch.stack([output.margins(int(label)) for output, label in zip(walks, y, strict=True)])
        found = bounds.margins(net, x, y, BALLS[ball], method)
        for mine, theirs in zip(
            torch.autograd.grad(nn.functional.cross_entropy(-found, y), parameters),
            torch.autograd.grad(nn.functional.cross_entropy(-wanted, y), parameters),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9 * (1 + theirs.abs().max().item()))


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(networks.cases(plain=True))
def test_random_nets_equal_the_reference(case: networks.Case) -> None:
    # An interval that ends within a rounding error of zero may rightly be read either way.
    net, x = case.net.double(), case.x.double()
    for method in METHODS:
        wanted = reference.margins(net, x, case.y, case.ball, method)
        for found, margin in zip(
            networks.outputs(bounds.margins(net, x, case.y, case.ball, method)), wanted, strict=True
        ):
            torch.testing.assert_close(found, margin, rtol=1e-10, atol=1e-10)
        pairs = reference.output_bounds(net, x, case.ball, method)
        for pair, wanted_pair in zip(
            networks.outputs(bounds.output_bounds(net, x, case.ball, method), pairs=True), pairs, strict=True
        ):
            torch.testing.assert_close(pair, wanted_pair, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", ["inf", "2", "1"])
@pytest.mark.parametrize(
    "affine",
    [
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1)),
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)),
        lambda: networks.Residual(nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 1), "x + y"),
        lambda: networks.Residual(nn.Identity(), nn.Conv2d(2, 2, 3, padding=1), "torch.add"),
        lambda: nn.Sequential(
            networks.Residual(nn.Identity(), nn.Conv2d(2, 2, 1), "x += y"), nn.Conv2d(2, 2, 3)
        ),
    ],
    ids=["conv conv", "conv norm conv", "two convs summed", "identity and conv", "sum then conv"],
)
def test_affine_layers_between_relus_count_as_one(affine: Callable[[], nn.Module], norm: str) -> None:
    """An error symbol reaches the next unit by one combined coefficient, in which paths may cancel."""
    ball = Ball(0.3, norm)
    x, y = (
        torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double(),
        torch.tensor([0, 1, 2]),
    )
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), affine(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)
    ).double()  # fmt: skip
    net(x)
    networks.randomise(net, torch.Generator().manual_seed(0)).eval()
    assert sum(unit.unstable for unit in reference.hidden_units(net, x, ball)) > 15
    for method in METHODS:
        [wanted] = reference.margins(net, x, y, ball, method)
        torch.testing.assert_close(bounds.margins(net, x, y, ball, method), wanted, rtol=1e-10, atol=1e-10)


class Outputs(nn.Module):
    """Logits made in other ways than by a last linear layer of one path."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.hidden, self.short = nn.Linear(16, 8), nn.Linear(16, 3)
        self.first, self.second = nn.Linear(8, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Any:
        x = x.flatten(1)
        z = self.first(nn.functional.relu(self.hidden(x)))
        return {
            "an exit on an exit": lambda: (z, self.second(nn.functional.relu(z))),
            "the same exit twice": lambda: (z, z),
            "an affine exit": lambda: (self.short(x), z),
            "a tuple of one": lambda: (z,),
            "a sum of heads": lambda: z + self.short(x),
            "a difference of heads": lambda: z - self.short(x),
            "relu last": lambda: nn.functional.relu(z),
            "scaled logits": lambda: (z - 0.5) / 0.3,
        }[self.kind]()


KINDS = [
    "an exit on an exit", "the same exit twice", "an affine exit", "a tuple of one",
    "a sum of heads", "a difference of heads", "relu last", "scaled logits",
]  # fmt: skip


@pytest.mark.parametrize("norm", ["inf", "2", "1"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_of_every_form_equal_the_reference(kind: str, norm: str) -> None:
    torch.manual_seed(0)
    net, ball = Outputs(kind).double(), Ball(0.3, norm)
    x, y = torch.rand(3, 1, 4, 4).double(), torch.tensor([0, 1, 2])
    wanted = reference.margins(net, x, y, ball, "symbolic")
    found = bounds.margins(net, x, y, ball, "symbolic")
    assert isinstance(found, tuple) == isinstance(net(x), tuple)
    torch.testing.assert_close(networks.outputs(found), wanted, rtol=1e-10, atol=1e-10)
    for method in METHODS:
        pairs = reference.output_bounds(net, x, ball, method)
        boxes = networks.outputs(bounds.output_bounds(net, x, ball, method), pairs=True)
        torch.testing.assert_close(boxes, pairs, rtol=1e-10, atol=1e-10)


def test_a_large_batch_equals_its_images() -> None:
    """Enough unstable units that they cannot all be bounded at once."""
    torch.manual_seed(0)
    net = models.build("digits_small", width=8, hidden=32).eval()
    x, y = torch.rand(300, 1, 8, 8), torch.arange(300) % 10
    together = bounds.margins(net, x, y, Ball(0.3), "symbolic")
    for i in (0, 150, 299):
        alone = bounds.margins(net, x[i : i + 1], y[i : i + 1], Ball(0.3), "symbolic")
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


def norms_after_relu(seed: int) -> nn.Module:
    """Each ReLU is followed by batch norm and by another ReLU: there intervals, which know that a ReLU's output is
    never negative, prove units stable whose symbolic bounds cross zero."""
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU(),
        nn.Conv2d(3, 2, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(2), nn.ReLU(),
        nn.Flatten(), nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip
    return networks.randomise(net, torch.Generator().manual_seed(seed)).eval()


def test_units_that_intervals_settle() -> None:
    """Intervals tighten the l, u of many units here.

    That mostly tightens the margins, but not always: a unit that passes keeps in full what its slope would have scaled.
    """
    x, y, ball = torch.full((1, 1, 4, 4), 0.4), torch.tensor([1]), Ball(0.3)
    settled = differing = tighter = looser = 0
    for seed in range(30):
        net = norms_after_relu(seed).double()
        units = reference.hidden_units(net, x, ball)
        here = sum(unit.tightened_by_interval for unit in units)
        [margin] = reference.margins(net, x, y, ball, "symbolic")
        [pure] = reference.margins(net, x, y, ball, "symbolic", pure=True)
        assert here > 0 or torch.equal(margin, pure)
        settled, differing = settled + here, differing + (not torch.equal(margin, pure))
        tighter, looser = (
            tighter + bool((margin > pure + 1e-9).any()),
            looser + bool((margin < pure - 1e-9).any()),
        )
        found = bounds.margins(net, x.double(), y, ball, "symbolic")
        torch.testing.assert_close(found, margin, rtol=1e-10, atol=1e-10)
    assert 15 <= differing <= 30
    assert settled >= 100
    assert tighter > looser
