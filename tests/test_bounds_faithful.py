"""The bounds are those of the network as it stands now, and the network is left as it was found."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from swiftsure import bounds, models
from swiftsure.ball import Ball
from swiftsure.errors import InputError

METHODS = tuple(bounds.TECHNIQUES)
NOT_FOR_TRAINING = "alpha-crown"
POINT = Ball(0.0)


class Body(nn.Module):
    """A linear layer behind any function of (module, x)."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], **parts: object) -> None:
        super().__init__()
        self.function = function
        self.last = nn.Linear(16, 3)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self, x).flatten(1))


def images(count: int = 2) -> Tensor:
    return torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        models.Normalize([0.3], [0.4]),
        nn.Conv2d(1, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(48, 3),
    ).eval()


def assert_true_to(net: nn.Module, x: Tensor) -> None:
    """A ball of radius zero holds exactly the output of the network."""
    training = [module.training for module in net.modules()]
    with torch.no_grad():
        logits = net.eval()(x.clone())
    for module, mode in zip(net.modules(), training, strict=True):
        module.training = mode
    for method in METHODS:
        lower, upper = bounds.output_bounds(net, x, POINT, method)
        torch.testing.assert_close(lower.detach(), logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(upper.detach(), logits, rtol=1e-5, atol=1e-5)


def new_statistics(net: nn.Sequential) -> None:
    net[2].running_mean = torch.tensor([0.5, -0.5, 1.0])
    net[2].running_var.mul_(3)


def new_constant(net: nn.Sequential) -> None:
    net[0].std = torch.tensor([0.1])


def constant_in_place(net: nn.Sequential) -> None:
    net[0].mean.add_(0.5)


def new_parameter(net: nn.Sequential) -> None:
    net[1].weight = nn.Parameter(torch.ones(3, 1, 3, 3))


def new_module(net: nn.Sequential) -> None:
    net[1] = nn.Conv2d(1, 3, 5, padding=2)


def no_relu(net: nn.Sequential) -> None:
    net[3] = nn.Identity()


def new_state(net: nn.Sequential) -> None:
    state = {name: value + 0.5 for name, value in net.state_dict().items() if value.is_floating_point()}
    net.load_state_dict(state, strict=False, assign=True)


def optimizer_step(net: nn.Sequential) -> None:
    net(images()).square().sum().backward()
    torch.optim.SGD(net.parameters(), 0.1).step()


@pytest.mark.parametrize(
    "change",
    [
        new_statistics, new_constant, constant_in_place, new_parameter, new_module, no_relu, new_state, optimizer_step,
    ],
)  # fmt: skip
def test_bounds_follow_a_change_of_the_network(change: Callable[[nn.Sequential], None]) -> None:
    net, x = small(), images()
    assert_true_to(net, x)
    with torch.no_grad():
        before = net(x)
    change(net)
    with torch.no_grad():
        assert not torch.allclose(before, net(x))
    assert_true_to(net, x)


def test_bounds_follow_a_change_of_dtype() -> None:
    net, x = small(), images()
    assert_true_to(net, x)
    net.double()
    # One third is not a float32 number: a constant kept from before would be off by 1e-8.
    net[0].std.fill_(1 / 3)
    logits = net(x.double())
    for method in METHODS:
        torch.testing.assert_close(
            bounds.output_bounds(net, x.double(), POINT, method)[0], logits, rtol=1e-12, atol=1e-12
        )


def test_bounds_follow_a_plain_attribute() -> None:
    net, x = Body(lambda self, x: x * self.scale, scale=2.0), images()
    assert_true_to(net, x)
    net.scale = 3.0
    assert_true_to(net, x)


def test_bounds_take_images_of_another_size() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 3, (1, 1)), nn.Flatten())
    for size in (4, 2):
        assert_true_to(net, torch.rand(2, 1, size, size))


def in_place_relu_read_twice(self: nn.Module, x: Tensor) -> Tensor:
    centred = x - 0.5
    return F.relu(centred, inplace=True) + centred


def in_place_sum_under_a_view(self: nn.Module, x: Tensor) -> Tensor:
    centred = x - 0.5
    rows = centred.flatten(1)
    centred += 1.0
    return rows


@pytest.mark.parametrize(
    "net",
    [
        Body(in_place_relu_read_twice),
        Body(in_place_sum_under_a_view),
        Body(lambda self, x: 2 - x),
        Body(lambda self, x: x - x / 2),
        Body(lambda self, x: torch.add(x, x, alpha=3)),
        Body(lambda self, x: torch.div(x, 0.3, rounding_mode="floor")),
        Body(lambda self, x: x.transpose(2, 3)),
        Body(lambda self, x: x - x.mean(0, keepdim=True)),
        Body(lambda self, x: self.layer(x), layer=nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")),
        Body(lambda self, x: self.layer(x), layer=nn.Conv2d(1, 1, 3, padding="same", dilation=2)),
        Body(lambda self, x: self.layer(x), layer=nn.BatchNorm2d(1, track_running_stats=False)),
        Body(lambda self, x: self.layer(x), layer=nn.Linear(4, 4)),
        Body(lambda self, x: F.linear(x, self.weight), weight=nn.Parameter(torch.eye(4) * 2)),
    ],
)
def test_an_operation_is_bounded_truly_or_refused(net: nn.Module) -> None:
    try:
        bounds.output_bounds(net, images(), POINT)
    except InputError:
        return
    assert_true_to(net, images())


def test_a_forward_hook_is_obeyed_or_refused() -> None:
    net = small()
    net[6].register_forward_hook(lambda module, inputs, output: output * 2)
    try:
        bounds.output_bounds(net, images(), POINT)
    except InputError:
        return
    assert_true_to(net, images())


@pytest.mark.parametrize("everywhere", [False, True], ids=["one module", "all modules"])
def test_bounds_follow_a_hook_that_is_replaced(everywhere: bool) -> None:
    """There are as many as before."""
    net, x = small(), images()
    for factor in (2.0, -1.0):

        def scaled(module: nn.Module, inputs: object, output: Tensor, factor: float = factor) -> Tensor:
            return output * factor if module is net[6] else output

        register = register_module_forward_hook if everywhere else net[6].register_forward_hook
        handle = register(scaled)
        try:
            if everywhere:
                with pytest.raises(InputError, match="do not compute"):
                    bounds.output_bounds(net, x, POINT)
            else:
                assert_true_to(net, x)
        finally:
            handle.remove()
        if everywhere:
            assert_true_to(net, x)


def test_a_module_that_a_hook_changes_before_each_pass_is_refused() -> None:
    """Its weight would be the last pass's, as old weight norms leave it there."""
    net = small()
    net[6].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    with pytest.raises(InputError, match="hook"):
        bounds.output_bounds(net, images(), POINT)


def test_bounds_follow_a_list_changed_in_place() -> None:
    net, x = Body(lambda self, x: x * self.scales[0], scales=[2.0]), images()
    assert_true_to(net, x)
    net.scales[0] = 3.0
    assert_true_to(net, x)


class Deep(nn.Module):
    """An operation two modules down, to be found by its path."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Sequential(inner))
        self.last = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.trunk(x).flatten(1))


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


@pytest.mark.parametrize(
    ("inner", "operation"), [(nn.GELU("tanh"), "GELU"), (Sine(), "sin"), (nn.Softmax(1), "Softmax")]
)
@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_operation_is_named_with_its_module_and_a_way_out(
    inner: nn.Module, operation: str, method: str
) -> None:
    with pytest.raises(InputError) as caught:
        bounds.margins(Deep(inner), images(), torch.tensor([0, 1]), Ball(0.1), method)
    line = str(caught.value)
    assert operation in line
    assert "trunk.1.0" in line
    assert "replace" in line or "use " in line
    assert "\n" not in line


@pytest.mark.parametrize(
    "net",
    [
        Body(lambda self, x: x if x.sum() > 0 else -x),
        nn.Sequential(nn.Flatten(0), nn.Linear(32, 3)),
        nn.Sequential(nn.Flatten(), nn.Linear(9, 3)),
        nn.Sequential(nn.Conv2d(1, 2, 3)),
        nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(8, 2)),
    ],
    ids=["branch on data", "mixes the batch", "wrong size", "logits are maps", "wrong channels"],
)
@pytest.mark.parametrize("method", METHODS)
def test_a_network_that_cannot_be_bounded_is_refused_in_one_line(
    net: nn.Module, method: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError) as caught:
        bounds.margins(net, images(), torch.tensor([0, 1]), Ball(0.1), method)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("method", METHODS)
def test_the_network_is_left_as_it_was_found(method: str) -> None:
    net = small()
    net.train()
    net[2].eval()
    net[1].weight.requires_grad_(False)
    net[6].weight.grad = torch.ones_like(net[6].weight)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    attributes = [set(vars(module)) for module in net.modules()]
    modes = [module.training for module in net.modules()]
    x = images()
    before, random_state = x.clone(), torch.get_rng_state()
    margins = bounds.margins(net, x, torch.tensor([0, 1]), Ball(0.1), method)
    assert net[1].weight.grad is None
    assert torch.equal(net[6].weight.grad, torch.ones_like(net[6].weight))
    if method != NOT_FOR_TRAINING:
        margins.sum().backward()
        assert not torch.equal(net[6].weight.grad, torch.ones_like(net[6].weight))
    assert [module.training for module in net.modules()] == modes
    assert [parameter.requires_grad for parameter in net.parameters()] == [False, *[True] * 5]
    assert [set(vars(module)) for module in net.modules()] == attributes
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert net.state_dict().keys() == state.keys()
    assert net[1].weight.grad is None
    assert torch.equal(x, before)
    assert x.grad is None
    assert torch.equal(torch.get_rng_state(), random_state)


def test_the_network_is_left_as_it_was_found_after_an_error() -> None:
    net = Deep(nn.ELU()).train()
    with pytest.raises(InputError):
        bounds.margins(net, images(), torch.tensor([0, 1]), Ball(0.1))
    assert all(module.training for module in net.modules())


def test_a_network_can_be_forgotten() -> None:
    """No memory of past traces keeps a network alive."""
    net = small()
    bounds.margins(net, images(), torch.tensor([0, 1]), Ball(0.1), "symbolic")
    watch = weakref.ref(net)
    del net
    gc.collect()
    assert watch() is None


@pytest.mark.parametrize("norm", ["inf", "2", "1"])
@pytest.mark.parametrize("method", METHODS)
def test_no_images_give_no_bounds(method: str, norm: str) -> None:
    net, ball = small(), Ball(0.1, norm)
    none = torch.zeros(0, dtype=torch.long)
    margins = bounds.margins(net, images(0), none, ball, method)
    assert margins.shape == (0, 3)
    if method != NOT_FOR_TRAINING:
        margins.sum().backward()
    assert [end.shape for end in bounds.output_bounds(net, images(0), ball, method)] == [(0, 3)] * 2


@pytest.mark.parametrize("method", METHODS)
def test_bad_images_and_labels_are_refused(method: str) -> None:
    net, x, y, ball = small(), images(), torch.tensor([0, 1]), Ball(0.1)
    broken = x.clone()
    broken[1, 0, 2, 2] = float("nan")
    for images_, labels in [
        (broken, y), (x / 0.0, y), (x * 3, y), (x[0], y), ((x * 255).byte(), y),
        (x, y + 2), (x, y - 1), (x, y.float()), (x, y[:1]),
    ]:  # fmt: skip
        with pytest.raises(InputError) as caught:
            bounds.margins(net, images_, labels, ball, method)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="image 1"):
        bounds.output_bounds(net, broken, ball, method)
    with pytest.raises(InputError, match="symbolic"):
        bounds.margins(net, x, y, ball, "symbolik")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_of_any_integer_dtype(method: str, dtype: torch.dtype) -> None:
    """Three images and three classes: a uint8 label must not act as a mask."""
    net, x, y = small(), images(3), torch.tensor([0, 2, 1])
    wanted = bounds.margins(net, x, y, Ball(0.1), method)
    assert torch.equal(bounds.margins(net, x, y.to(dtype), Ball(0.1), method), wanted)


@pytest.mark.parametrize("method", METHODS)
def test_images_of_another_dtype_than_the_network_are_refused(method: str) -> None:
    with pytest.raises(InputError, match=r"float64.*float32"):
        bounds.margins(small(), images().double(), torch.tensor([0, 1]), Ball(0.1), method)


class Exits(nn.Module):
    def __init__(self, *classes: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(16, count) for count in classes)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(head(x.flatten(1)) for head in self.heads)


@pytest.mark.parametrize("method", METHODS)
def test_exits_with_different_classes_have_no_margins(method: str) -> None:
    """Their logits can still be bounded."""
    net, x = Exits(3, 4), images()
    assert [low.shape for low, _ in bounds.output_bounds(net, x, Ball(0.1), method)] == [(2, 3), (2, 4)]
    with pytest.raises(InputError, match="classes"):
        bounds.margins(net, x, torch.tensor([0, 1]), Ball(0.1), method)


def test_bounds_raise_no_warning_and_print_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in METHODS:
            bounds.margins(small(), images(), torch.tensor([0, 1]), Ball(0.1), method)
    assert capfd.readouterr() == ("", "")
