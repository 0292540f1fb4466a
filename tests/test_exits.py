"""MultiExit: all logits, the adaptive pass, what it costs, and what it does not depend on."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import swiftsure as ss
from swiftsure import data, exits
from swiftsure.errors import InputError
from swiftsure.exits import MultiExit, Policy, equal_share

NEAR = 1e-5
"""Entropies this near to a threshold may fall on either side of it, as float32 logits differ between batch sizes."""


class Seen(nn.Module):
    """Notes how many images pass."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.batches = inner, []

    def forward(self, *state: Tensor) -> Tensor:
        self.batches.append(len(state[0]))
        return self.inner(*state)


def three_exits(seed: int = 0, gain: float = 12.0) -> MultiExit:
    """For 8x8 digits, with logits large enough for entropies of all sizes."""
    torch.manual_seed(seed)
    stages = [
        Seen(nn.Sequential(nn.Conv2d(1, 6, 3, 1, 1), nn.BatchNorm2d(6), nn.ReLU())),
        Seen(nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU(), nn.Dropout(0.5))),
        Seen(nn.Sequential(nn.Flatten(), nn.Linear(128, 20), nn.ReLU())),
    ]
    heads = [
        Seen(nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(24, 10))),
        Seen(nn.Sequential(nn.Flatten(), nn.Linear(128, 10))),
        Seen(nn.Linear(20, 10)),
    ]
    net = MultiExit(stages, heads).eval()
    with torch.no_grad():
        for head in net.heads:
            next(iter(head.parameters())).mul_(gain)
    for part in (*net.stages, *net.heads):
        part.batches.clear()
    return net


def digits(count: int) -> tuple[Tensor, Tensor]:
    return data.load("digits").train.batch(slice(0, count))


def with_thresholds(net: MultiExit, x: Tensor, rule: str = "entropy") -> MultiExit:
    with torch.no_grad():
        net.policy = equal_share(net(x), rule)
    for part in (*net.stages, *net.heads):
        part.batches.clear()
    return net


def test_all_logits_or_the_one() -> None:
    net, (x, _) = three_exits(), digits(5)
    assert [tuple(z.shape) for z in net(x)] == [(5, 10)] * 3
    one = MultiExit(net.stages[:1], net.heads[:1])
    assert torch.equal(one(x), net(x)[0])
    assert one.adaptive(x).label.tolist() == one(x).argmax(1).tolist()
    assert one.adaptive(x).exit.tolist() == [0] * 5
    assert one.adaptive(x).macs.tolist() == [exits.static_macs(one, (1, 8, 8))] * 5


@pytest.mark.parametrize("rule", ["entropy", "confidence"])
def test_the_adaptive_pass_is_the_policy_on_all_logits(rule: str) -> None:
    x, _ = digits(96)
    net = with_thresholds(three_exits(), x, rule)
    answer = net.adaptive(x)
    with torch.no_grad():
        logits = net(x)
    assert torch.equal(answer.exit, net.policy.exit_of(logits))
    assert answer.exit.bincount().tolist() == [32, 32, 32]
    torch.testing.assert_close(answer.logits, net.policy.logits_of(logits))
    assert torch.equal(answer.label, answer.logits.argmax(1))
    assert answer.label.dtype == answer.exit.dtype == answer.macs.dtype == torch.int64
    costs = torch.tensor(exits.exit_macs(net, (1, 8, 8)))
    assert torch.equal(answer.macs, costs[answer.exit])
    # Another policy for one call: nobody leaves before the end.
    never = Policy("entropy", [0.0, 0.0])
    assert net.adaptive(x, never).exit.tolist() == [2] * 96
    torch.testing.assert_close(net.adaptive(x, never).logits, logits[-1])


def test_later_stages_see_only_those_still_inside() -> None:
    x, _ = digits(96)
    net = with_thresholds(three_exits(), x)
    net.adaptive(x)  # counts what the exits cost, with an image of its own
    for part in (*net.stages, *net.heads):
        part.batches.clear()
    net.adaptive(x)
    assert [part.batches for part in net.stages] == [[96], [64], [32]]
    assert [part.batches for part in net.heads] == [[96], [64], [32]]
    everybody = Policy("entropy", [100.0, 0.0])
    net.adaptive(x, everybody)
    assert [part.batches for part in net.stages] == [[96, 96], [64], [32]]


def test_cost_is_cumulative() -> None:
    net = three_exits()
    stages = [64 * 6 * 9, 16 * 8 * 54, 128 * 20]
    heads = [240, 1280, 200]
    expected = [sum(stages[: k + 1]) + sum(heads[: k + 1]) for k in range(3)]
    assert exits.exit_macs(net, (1, 8, 8)) == net.macs((1, 8, 8)) == expected
    assert exits.static_macs(net, (1, 8, 8)) == expected[-1]
    paper = [64 * 54, 64 * 54 + 16 * 432, 64 * 54 + 16 * 432]
    assert exits.paper_macs(net, (1, 8, 8)) == pytest.approx([value / 2**20 for value in paper])
    # A pruned network costs less, though it was counted before.
    net.heads[0].inner[2] = nn.Linear(24, 5)
    assert net.macs((1, 8, 8))[0] == expected[0] - 120


def answers_in_batches(net: MultiExit, x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    found = [net.adaptive(part) for part in x.split(size)]
    return torch.cat([one.label for one in found]), torch.cat([one.exit for one in found])


@pytest.mark.parametrize("rule", ["entropy", "confidence"])
def test_the_same_answer_whatever_the_batch(rule: str) -> None:
    x, _ = digits(256)
    net = with_thresholds(three_exits(), x, rule)
    with torch.no_grad():
        scores = [net.policy.score(z) for z in net(x)[:2]]
    near = torch.stack(
        [(s - t).abs() < NEAR for s, t in zip(scores, net.policy.thresholds, strict=True)]
    ).any(0)
    listed = near.nonzero()[:, 0].tolist()
    assert len(listed) <= 2, listed
    label, exit = answers_in_batches(net, x, 256)
    assert exit.bincount().min() > 50
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    shuffled = net.adaptive(x[order])
    back = order.argsort()
    tried = [answers_in_batches(net, x, 1), answers_in_batches(net, x, 7)]
    tried.append((shuffled.label[back], shuffled.exit[back]))
    for other_label, other_exit in tried:
        differ = ((other_label != label) | (other_exit != exit)).nonzero()[:, 0].tolist()
        assert set(differ) <= set(listed)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**20), st.lists(st.floats(0, 2.4), min_size=2, max_size=2), st.integers(1, 40))
def test_any_subset_in_any_order(seed: int, thresholds: list[float], count: int) -> None:
    net, (x, _) = three_exits(), digits(64)
    policy = Policy("entropy", thresholds)
    whole = net.adaptive(x, policy)
    chosen = torch.randint(64, (count,), generator=torch.Generator().manual_seed(seed))
    part = net.adaptive(x[chosen], policy)
    with torch.no_grad():
        scores = [policy.score(z) for z in net(x)[:2]]
    near = torch.stack([(s - t).abs() < NEAR for s, t in zip(scores, thresholds, strict=True)]).any(0)[chosen]
    assert torch.equal(part.label[~near], whole.label[chosen][~near])
    assert torch.equal(part.exit[~near], whole.exit[chosen][~near])


def test_modes_and_gradients_are_left_alone() -> None:
    x, _ = digits(48)
    net = with_thresholds(three_exits(), x)
    expected = net.adaptive(x)
    net.train()
    net.stages[1].eval()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    found = net.adaptive(x.requires_grad_())
    assert torch.equal(found.label, expected.label)
    assert torch.equal(found.exit, expected.exit)
    assert not found.logits.requires_grad
    assert net.training
    assert not net.stages[1].training
    assert net.stages[0].training
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_no_image_at_all() -> None:
    x, _ = digits(3)
    net = three_exits()
    net.policy = Policy("entropy", [0.1, 0.1])
    found = net.adaptive(x[:0])
    assert [len(part) for part in (found.label, found.exit, found.macs, found.logits)] == [0] * 4


def test_a_state_of_several_tensors_is_parted_together() -> None:
    class Fork(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.flatten(1), x.amax((1, 2, 3))

    class Join(nn.Module):
        def forward(self, features: Tensor, top: Tensor) -> Tensor:
            return features * top[:, None]

    torch.manual_seed(0)
    net = MultiExit([Fork(), Join()], [nn.Linear(64, 10), nn.Linear(64, 10)]).eval()
    x, _ = digits(40)
    x = x * torch.linspace(0.1, 1, 40)[:, None, None, None]
    with torch.no_grad():
        net.heads[0].weight.mul_(9)
        net.policy = equal_share(net(x))
        expected = net.policy.logits_of(net(x))
    found = net.adaptive(x)
    assert found.exit.bincount().tolist() == [20, 20]
    torch.testing.assert_close(found.logits, expected)


def test_plain_networks_have_the_same_face() -> None:
    net = ss.models.build("digits_small", width=4, hidden=12).eval()
    x, _ = digits(6)
    assert net.policy is None
    for one in (net, copy.deepcopy(net)):
        found = one.adaptive(x)
        assert torch.equal(found.label, one(x).argmax(1))
        assert found.exit.tolist() == [0] * 6
        assert found.macs.tolist() == [exits.static_macs(one)] * 6
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin[-1].bias[3] = 1e6
    assert twin.adaptive(x).label.tolist() == [3] * 6
    assert torch.equal(net.adaptive(x).label, net(x).argmax(1))
    # It can still be stored whole.
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again.adaptive(x).label, net(x).argmax(1))
    with pytest.raises(InputError, match="1 thresholds for 1 exits"):
        net.adaptive(x, Policy("entropy", [0.5]))


def test_copies_are_independent() -> None:
    x, _ = digits(30)
    net = with_thresholds(three_exits(), x)
    twin = copy.deepcopy(net)
    twin.policy = Policy("entropy", [100.0, 0.0])
    with torch.no_grad():
        twin.heads[0].inner[2].bias[7] = 1e6
    assert twin.adaptive(x).label.tolist() == [7] * 30
    assert net.adaptive(x).exit.bincount().tolist() == [10, 10, 10]


def test_thresholds_from_images() -> None:
    x, y = digits(200)
    net = three_exits()
    policy = exits.calibrate(net, (x, y), batch=64)
    assert net.policy is None
    net.policy = policy
    assert net.adaptive(x).exit.bincount(minlength=3).tolist() == [67, 66, 67]
    costs = net.macs((1, 8, 8))
    for rule in ("entropy", "confidence"):
        for budget in (costs[0], (costs[0] + costs[1]) / 2, costs[-1]):
            net.policy = exits.calibrate(net, (x, y), rule=rule, macs=budget)
            found = net.adaptive(x)
            assert net.policy.rule == rule
            assert found.macs.double().mean() <= budget + 1e-6
    # With all the budget there is, it is at least as right as any exit alone.
    alone = [(z.argmax(1) == y).double().mean() for z in net(x)]
    assert (found.label == y).double().mean() >= max(alone)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda net, x: MultiExit([], []), "0 stages and 0 heads"),
        (lambda net, x: MultiExit(net.stages, net.heads[:2]), "3 stages and 2 heads; allowed: one head for each"),
        (lambda net, x: net.adaptive(x), "3 exits and no thresholds; set net.policy"),
        (lambda net, x: net.adaptive(x, Policy("entropy", [0.1])), "1 thresholds for 3 exits; allowed: 2"),
        (lambda net, x: setattr(net, "policy", Policy("entropy", [0.1])), "1 thresholds for 3 exits"),
        (lambda net, x: setattr(net, "policy", [0.1, 0.2]), "policy is [0.1, 0.2]; allowed: a Policy"),
        (lambda net, x: MultiExit(net.stages, net.heads, Policy("entropy", ())), "0 thresholds for 3 exits"),
        (lambda net, x: net.adaptive(x * 3, Policy("entropy", [1, 1])), "pixels range"),
        (lambda net, x: net.adaptive(x.double(), Policy("entropy", [1, 1])), "images are torch.float64"),
        (lambda net, x: exits.calibrate(nn.Linear(2, 2), (x, x)), "a Linear of one exit"),
        (lambda net, x: exits.calibrate(net, (x, torch.zeros(4, dtype=torch.int64)), macs=5), "macs is 5; allowed"),
        (lambda net, x: exits.exit_macs(net, (1, 9, 9)), "the network cannot take images of shape (1, 9, 9)"),
        (lambda net, x: exits.exit_macs(Pair(), (1, 8, 8)), "returns a tuple"),
        (lambda net, x: exits.adaptive_latency_ms(net, x, 0), "batch is 0"),
        (lambda net, x: exits.adaptive_latency_ms(net, x[:0]), "the number of images is 0"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(call, words: str) -> None:
    with pytest.raises(InputError) as caught:
        call(three_exits(), digits(4)[0])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flatten(1), x.flatten(1)


def test_latency_of_the_adaptive_pass() -> None:
    x, _ = digits(20)
    net = with_thresholds(three_exits(), x)
    assert exits.adaptive_latency_ms(net, x, 1, 1) > 0
    for part in (*net.stages, *net.heads):
        part.batches.clear()
    assert exits.adaptive_latency_ms(net, x, 8, 2) > 0
    # Three passes (one to warm up) over two whole batches.
    assert net.stages[0].batches == [8] * 6
