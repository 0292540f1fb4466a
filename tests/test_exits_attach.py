"""Side exits for a backbone: stages that need not run, the backbone's own weights, its own answer at the end."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import swiftsure as ss
from attached import Backbone, backbone, images, tuple_of
from swiftsure.errors import InputError
from swiftsure.exits import MultiExit, Policy, attach, equal_share

# In the order in which they end.
NAMES = [
    "stem",
    "first.0.a",
    "first.0.norm",
    "first.0",
    "first.1.b",
    "first",
    "second.0",
    "second.1.norm",
    "second.1.b",
]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.sampled_from(NAMES), unique=True, max_size=4),
    st.integers(0, 99),
    st.sampled_from(["linear", "conv"]),
)
def test_the_last_exit_is_the_backbone_wherever_it_is_cut(names: list[str], seed: int, head: str) -> None:
    trunk = backbone(seed)
    net = attach(trunk, dict.fromkeys(names, head), images(1))
    assert net.exits == len(names) + 1
    x = images(5, seed)
    for mode in (False, True):
        net.train(mode)
        torch.manual_seed(seed)
        expected = trunk(x)
        torch.manual_seed(seed)
        assert torch.equal(tuple_of(net(x))[-1], expected)
    net.eval()
    order = [name for name in NAMES if name in names]
    assert list(net.config["exits"]) == order
    if names:
        # The same from stage to stage, with some images gone at each.
        with torch.no_grad():
            logits = net(x)
            net.policy = equal_share(logits)
            scores = [net.policy.score(z) - t for z, t in zip(logits, net.policy.thresholds, strict=False)]
            assume(torch.stack(scores).abs().min() > 1e-5)
            torch.testing.assert_close(
                net.adaptive(x).logits, net.policy.logits_of(logits), rtol=1e-4, atol=1e-5
            )
            assert net.adaptive(x).exit.max() > 0


def test_weights_are_shared_not_copied() -> None:
    trunk = backbone()
    net = attach(trunk, {"first.0": "linear", "second.0": "conv"}, images(1))
    assert net.backbone is trunk
    own = {id(parameter) for parameter in trunk.parameters()}
    heads = {id(parameter) for parameter in net.heads.parameters()}
    assert {id(parameter) for parameter in net.parameters()} == own | heads
    names = set(net.state_dict())
    assert names == {f"backbone.{name}" for name in trunk.state_dict()} | {
        f"heads.{name}" for name in net.heads.state_dict()
    }
    with torch.no_grad():
        trunk.fc.bias[2] = 1e6
    assert net.eval()(images())[-1].argmax(1).tolist() == [2] * 6
    trunk.load_state_dict(backbone(1).state_dict())
    assert torch.equal(net(images())[-1], backbone(1).eval()(images()))


def test_later_stages_need_not_run() -> None:
    trunk = backbone().eval()
    ran: list[str] = []
    for name, module in trunk.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    net = attach(trunk, {"first.0": "linear", "first.1": "linear"}, images(1)).eval()
    net.macs((3, 8, 8))
    ran.clear()
    net.adaptive(images(), Policy("entropy", [100.0, 100.0]))
    assert set(ran) == {"stem", "first.0", *(f"first.0.{part}" for part in ("a", "norm", "b", "relu"))}
    net.adaptive(images(), Policy("entropy", [0.0, 100.0]))
    assert "first.1" in ran
    assert "second.0" not in ran


def test_no_exit_of_its_own_is_no_special_case() -> None:
    trunk = backbone().eval()
    net = attach(trunk, {}, images(1))
    assert isinstance(net, MultiExit)
    assert torch.equal(net(images()), trunk(images()))
    assert net.adaptive(images()).exit.tolist() == [0] * 6
    assert torch.equal(attach(trunk, 1, images(1))(images()), trunk(images()))


def test_gradients_reach_the_trunk_from_every_exit() -> None:
    trunk = backbone()
    net = attach(trunk, {"first.0": "linear", "second.0.norm": "linear"}, images(1))
    for exit, reached in enumerate((True, True, True)):
        net.zero_grad()
        net(images())[exit].square().sum().backward()
        assert (trunk.stem.weight.grad is not None) == reached
        assert (trunk.second[1].a.weight.grad is not None) == (exit == 2)
        assert (net.heads[0][2].weight.grad is not None) == (exit == 0)


class Changing(nn.Module):
    """Layers whose activations write into what they get."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3, 1, 1), nn.Conv2d(6, 6, 3, 1, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x.relu_()
        x = F.relu(self.b(x), inplace=True)
        return self.c(x.mean((2, 3)))


def test_operations_in_place_disturb_neither_head_nor_trunk() -> None:
    torch.manual_seed(0)
    trunk, x = Changing(), images()
    greedy = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(6 * 64, 4))
    net = attach(trunk, {"a": nn.Sequential(nn.Flatten(), nn.Linear(6 * 64, 4)), "b": greedy}, x)
    early, middle, last = net(x)
    a = trunk.a(x)
    torch.testing.assert_close(early, net.heads[0](a))
    torch.testing.assert_close(middle, net.heads[1](trunk.b(a.relu())))
    assert torch.equal(last, trunk(x))
    (early.sum() + middle.sum() + last.sum()).backward()
    expected = torch.autograd.grad(net.heads[0](trunk.a(x)).sum() + net.heads[1](trunk.b(trunk.a(x).relu())).sum()
                                   + trunk(x).sum(), trunk.a.weight)[0]  # fmt: skip
    torch.testing.assert_close(trunk.a.weight.grad, expected)


def test_copies_and_other_types_of_numbers() -> None:
    trunk = backbone()
    net = attach(trunk, {"first.0": "linear", "second.0": "linear"}, images(1)).eval()
    twin = copy.deepcopy(net).double()
    assert twin.backbone is not trunk
    assert twin.stages[1].backbone is twin.backbone
    for found, expected in zip(twin(images().double()), net(images()), strict=True):
        assert found.dtype == torch.float64
        torch.testing.assert_close(found.float(), expected)
    with torch.no_grad():
        twin.backbone.fc.bias[1] = 1e9
    assert not torch.equal(twin(images().double())[-1].float(), net(images())[-1])
    assert torch.equal(net(images())[-1], trunk(images()))


def test_bounds_see_every_exit_and_the_trunk_once() -> None:
    net = attach(backbone(), {"first.0": "linear", "second.0": "conv"}, images(1)).eval()
    x, ball = images(2), ss.Ball(0.002)
    graph = ss.bounds.trace(net, x)
    whole = attach(net.backbone, {}, x).eval()
    alone = ss.bounds.trace(whole, x)
    assert len(graph.outputs) == 3
    assert len(graph.nodes) < len(alone.nodes) + 15
    y = net(x)[-1].argmax(1)
    lower = ss.margins(net, x, y, ball)
    torch.testing.assert_close(lower[-1], ss.margins(whole, x, y, ball))
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        logits = net(ball.sample(x, generator))
        for low, z in zip(lower, logits, strict=True):
            assert (z.gather(1, y[:, None]) - z >= low - 1e-5).all()


class Mutating(nn.Module):
    """Writes into a list that it is given, as torch.fx lets nobody do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.inner, self.c = nn.Linear(192, 4), Appending(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.inner([self.a(x.flatten(1))]))


class Appending(nn.Module):
    def forward(self, values: list[Tensor]) -> Tensor:
        values.append(values[0])
        return torch.stack(values).sum(0)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = x * 2
        return x


class Untraceable(Backbone):
    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        x = self.first(self.stem(x))
        if x.max() > 1e9:
            return self.fc(x.mean((2, 3)).repeat(1, 16))
        return self.fc(F.adaptive_avg_pool2d(self.second(x), 4).flatten(1))


def test_what_is_not_cut_may_branch_on_data() -> None:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), Branching(), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(),
                          nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4))  # fmt: skip
    x = images()
    for choice in ({"2": "linear"}, 2):
        assert torch.equal(attach(trunk, choice, x).eval()(x)[-1], trunk.eval()(x))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(192, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x.flatten(1)), x


FLAT = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Linear(8, 3))


TOO_FEW = nn.Sequential(nn.Flatten(), nn.Linear(512, 4))


@pytest.mark.parametrize(
    ("cuts", "words"),
    [
        ({"first.7": "linear"}, "Backbone: unknown module 'first.7'; did you mean 'first.1'?"),
        ({"layer1": "linear"}, "unknown module 'layer1'; allowed: stem, first, second, unused, fc"),
        ({"": "linear"}, "unknown module ''"),
        ({"unused": "linear"}, "module 'unused' is not called in the forward pass"),
        ({"first.0.relu": "linear"}, "module 'first.0.relu' is called 2 times"),
        ({"first": "linear", "first.1": "conv"}, "'first' and 'first.1' end at the same place"),
        ({"fc": "linear"}, "module 'fc' is the end of the backbone"),
        ({"stem": TOO_FEW}, "the head behind 'stem' returns (2, 4) for 2 images; allowed: (2, 5)"),
        (
            {"stem": nn.Linear(3, 5)},
            "the head behind 'stem' cannot take what the module returns, ('batch', 8, 8, 8)",
        ),
        ({"stem": nn.LSTM(8, 5)}, "the head behind 'stem'"),
        ({"stem": "linaer"}, "unknown head 'linaer'; did you mean 'linear'?"),
        ({"stem": {"kind": "conv", "widht": 3}}, "head 'conv' cannot be built with options {'widht': 3}"),
        ({"stem": {"width": 3}}, "a head is {'width': 3}; allowed"),
        (40, "exits is 40, and Backbone has"),
        (0, "exits is 0; allowed: an integer >= 1"),
        (True, "exits is True"),
    ],
)
def test_cuts_and_heads_that_do_not_fit(cuts, words: str) -> None:
    with pytest.raises(InputError) as caught:
        attach(Backbone(), cuts, images(1))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("trunk", "cuts", "example", "words"),
    [
        (Backbone(), {"stem": "linear"}, None, "pass example=x"),
        (Backbone(), {"stem": "linear"}, images(1).double(), "the example is torch.float64"),
        (Backbone(), {"stem": "linear"}, torch.rand(8, 8), "the example is (8, 8); allowed"),
        (Backbone(), {"stem": "linear"}, torch.rand(1, 4, 8, 8), "cannot take images of shape (4, 8, 8)"),
        (FLAT, {"1": "conv"}, images(1), "head 'conv' cannot be built with options {}: it reads (8,)"),
        (Pair(), {"a": "linear"}, images(1), "the backbone returns tuple; allowed: logits"),
        (nn.Sequential(nn.Conv2d(3, 2, 3)), {}, images(1), "the backbone returns (2, 2, 6, 6)"),
        (ss.models.build("rdi_smallcnn"), 3, None, "the backbone has 3 exits already"),
        (Untraceable(), {"first": "linear"}, images(1), "Untraceable cannot be traced by torch.fx at line "),
        (Mutating(), {"a": "linear"}, images(1), "Mutating fails as torch.fx traced it"),
        (Untraceable(), 3, images(1), "of test_exits_attach.py, `if x.max() > 1e9:`"),
    ],
)
def test_backbones_and_examples_that_do_not_fit(trunk: nn.Module, cuts, example, words: str) -> None:
    with pytest.raises(InputError) as caught:
        attach(trunk, cuts, example)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_scripted_backbone_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.trace(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), images(1))
    for cuts in ({"0": "linear"}, 2):
        with pytest.raises(InputError, match="the backbone is a ScriptModule, which"):
            attach(scripted, cuts, images(1))


def test_places_that_carry_a_skip_serve_where_there_are_too_few_others() -> None:
    trunk = backbone().eval()
    five = ["stem", "first.0", "first", "second.0", "second"]
    assert list(attach(trunk, 6, images(1)).config["exits"]) == five
    for exits in range(7, 11):
        net = attach(trunk, exits, images(1)).eval()
        assert net.exits == exits
        assert torch.equal(net(images())[-1], trunk(images()))


def test_a_policy_of_another_number_of_exits() -> None:
    with pytest.raises(InputError, match="2 thresholds for 2 exits; allowed: 1"):
        attach(Backbone(), {"stem": "linear"}, images(1), policy=Policy("entropy", [1, 2]))


def test_a_value_that_cannot_be_parted_is_refused() -> None:
    class Sideways(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(192, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x.flatten(1))
            turned = x.transpose(0, 1)
            return self.c(self.b(x) + turned.transpose(0, 1))

    with pytest.raises(
        InputError, match=r"the cut behind 'b.*' would part .* its first axis is not the batch"
    ):
        attach(Sideways(), {"b": "linear"}, images(1))


def test_hooks_are_kept_and_randomness_is_refused() -> None:
    trunk = backbone().eval()
    trunk.first.register_forward_hook(lambda module, inputs, output: output * 2)
    plain = backbone().eval()(images())
    for name in ("first", "first.0"):
        last = attach(trunk, {name: "linear"}, images(1)).eval()(images())[-1]
        assert torch.equal(last, trunk(images()))
        assert not torch.equal(last, plain)
    trunk.first.register_forward_hook(lambda module, inputs, output: F.dropout(output, 0.5, True))
    with pytest.raises(InputError, match="computes something else"):
        attach(trunk, {"first.0": "linear"}, images(1))


def test_modes_are_kept() -> None:
    trunk = backbone().train()
    trunk.first[0].norm.eval()
    before = {name: value.clone() for name, value in trunk.state_dict().items()}
    net = attach(trunk, {"first.0": "linear"}, images(1))
    assert net.training
    assert trunk.training
    assert not trunk.first[0].norm.training
    assert all(torch.equal(value, before[name]) for name, value in trunk.state_dict().items())
    assert not attach(backbone().eval(), {"first.0": "linear"}, images(1)).training
    assert set(vars(trunk)) == set(vars(backbone()))


def test_a_network_of_one_exit_is_a_backbone_like_any(tmp_path: Path) -> None:
    static = ss.models.build("rdi_smallcnn_static").eval()
    x = torch.rand(3, 1, 28, 28)
    net = ss.attach(static, {"stages.0.0": "pooled"}, x).eval()
    assert net.exits == 2
    assert torch.equal(net(x)[-1], static(x))
    ss.models.save(net, tmp_path)
    again = ss.load(tmp_path)
    for known, found in zip(net(x), again(x), strict=True):
        assert torch.equal(known, found)
    assert torch.equal(ss.load(tmp_path, model=ss.models.build("rdi_smallcnn_static"))(x)[0], net(x)[0])


def test_one_exit_attached_to_a_network_of_one_exit(tmp_path: Path) -> None:
    static = ss.models.build("rdi_smallcnn_static").eval()
    x = torch.rand(3, 1, 28, 28)
    one = ss.attach(static, 1)
    ss.models.save(one, tmp_path)
    passed = (
        None,
        ss.models.build("rdi_smallcnn_static"),
        ss.attach(ss.models.build("rdi_smallcnn_static"), 1),
    )
    for model in passed:
        assert torch.equal(ss.load(tmp_path, model=model)(x), static(x))
    # Exits on it are exits on what it was attached to, and are found again.
    two = ss.attach(one, {"stages.0.0": "linear"}).eval()
    assert two.backbone is static
    ss.models.save(two, tmp_path)
    for known, found in zip(two(x), ss.load(tmp_path)(x), strict=True):
        assert torch.equal(known, found)


def test_dropout_in_place_spoils_neither_trunk_nor_gradient() -> None:
    class Trunk(nn.Module):
        def __init__(self, *between: nn.Module) -> None:
            super().__init__()
            self.a = nn.Sequential(nn.Flatten(), nn.Linear(48, 8))
            self.b = nn.Sequential(*between, nn.Linear(8, 5))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    torch.manual_seed(0)
    x = torch.rand(16, 3, 4, 4)
    head = nn.Sequential(nn.Dropout(0.5, inplace=True), nn.Linear(8, 5))
    net = attach(Trunk(), {"a": head}, x).train()
    assert torch.equal(tuple_of(net(x))[-1], net.backbone(x))
    behind = attach(Trunk(nn.Dropout(0.5, inplace=True)), {"a": "linear"}, x).train()
    torch.stack([z.sum() for z in behind(x)]).sum().backward()


def test_finding_out_what_training_changes_leaves_no_trace() -> None:
    trunk = backbone(0).train()
    before = copy.deepcopy(trunk.state_dict())
    attach(trunk, {"first": "linear"}, images(1))
    for name, value in trunk.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_head_that_looks_at_other_images_is_refused() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x - x.mean(0))

    trunk = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 3))
    with pytest.raises(InputError, match="behind '1' depends on the images beside it"):
        attach(trunk, {"1": Centred()}, torch.rand(1, 1, 8, 8))


@pytest.mark.parametrize("error", [KeyError("k"), IndexError("i"), AssertionError("no")])
def test_what_a_strangers_code_raises_is_one_line(error: Exception) -> None:
    class Raises(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise error

    trunk = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 3))
    with pytest.raises(InputError, match="the head behind '1' cannot take"):
        attach(trunk, {"1": Raises()}, torch.rand(1, 1, 8, 8))
    with pytest.raises(InputError, match="the backbone cannot take"):
        attach(Raises(), {"1": "linear"}, torch.rand(1, 1, 8, 8))


class Shared(nn.Module):
    """What crosses the cut behind c2 is one memory twice, and is changed in place later."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = (
            nn.Conv2d(1, 4, 3, 1, 1),
            nn.Conv2d(1, 4, 3, 1, 1),
            nn.Conv2d(4, 4, 3, 1, 1),
        )
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.c1(x)
        v = y.flatten(2)
        t = self.c2(x)
        self.relu(y)
        return self.fc((self.c3(t).flatten(2) + v).mean(1))


def test_two_views_of_one_memory_do_not_cross_a_cut() -> None:
    torch.manual_seed(0)
    with pytest.raises(InputError, match="share memory"):
        attach(Shared(), {"c2": "pooled"}, torch.rand(1, 1, 8, 8))


def test_a_mean_over_the_batch_is_noticed() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c1, self.fc = nn.Conv2d(1, 4, 3, 1, 1), nn.Linear(256, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.c1(x).relu()
            return self.fc(h.flatten(1)) + h.mean()

    torch.manual_seed(0)
    with pytest.raises(InputError, match="depends on the images beside it"):
        attach(Mean(), {"c1": "pooled"}, torch.rand(1, 1, 8, 8))
