"""Costs against counts by hand."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftsure import models
from swiftsure.errors import InputError
from swiftsure.exits import attach, exit_macs, latency_ms, parameters, static_macs


def conv(size: int, out: int, taps: int, into: int) -> int:
    return size * size * out * into * taps * taps


def block(size: int, into: int, out: int, down: bool) -> int:
    first, skip = (
        (conv(size, out, 4, into), conv(size, out, 2, into))
        if down
        else (conv(size, out, 3, into), conv(size, out, 1, into))
    )
    return first + conv(size, out, 3, out) + skip


def large(channels: int, size: int) -> int:
    convolutions = (
        conv(size, 32, 3, channels)
        + conv(size // 2, 32, 4, 32)
        + conv(size // 2, 64, 3, 32)
        + conv(size // 4, 64, 4, 64)
    )
    return convolutions + 64 * (size // 4) ** 2 * 512 + 512 * 512 + 5120


def blocks(size: int) -> int:
    """The four residual blocks behind a stem of 16 channels that ends at twice this size."""
    first = block(size, 16, 16, True) + block(size, 16, 16, False)
    return first + block(size // 2, 16, 32, True) + block(size // 4, 32, 64, True)


BY_HAND = {
    "mnist_small": 3136 * 16 + 1568 * 256 + 1568 * 100 + 1000,
    "cifar_small": 16 * 16 * 16 * 48 + 8 * 8 * 32 * 256 + 2048 * 100 + 1000,
    "mnist_large": large(1, 28),
    "cifar_large": large(3, 32),
    "cifar_resnet": conv(32, 16, 3, 3) + blocks(16) + 1024 * 1000 + 10_000,
    "imagenet200_resnet": conv(32, 16, 7, 3) + blocks(16) + 1024 * 512 + 512 * 200,
    "digits_small": conv(8, 16, 3, 1) + conv(4, 32, 4, 16) + 512 * 64 + 640,
}


@pytest.mark.parametrize("name", sorted(BY_HAND))
def test_multiply_adds_equal_the_count_by_hand(name: str) -> None:
    assert static_macs(models.build(name)) == BY_HAND[name]


class Branching(nn.Module):
    """Two heads, a batch norm that one image would upset in training mode, and nothing that says its input."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5), nn.Dropout(0.5))
        self.early, self.late = nn.Linear(5, 2), nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = F.relu(self.body(x))
        return self.early(z), self.late(z)


def test_all_heads_count_and_parameters_are_counted_once() -> None:
    net = Branching()
    assert static_macs(net, (3, 2, 2)) == 12 * 5 + 5 * 2 + 5 * 3
    assert parameters(net) == 12 * 5 + 5 + 10 + 12 + 15
    net.again = net.late
    assert parameters(net) == 12 * 5 + 5 + 10 + 12 + 15


def test_counting_and_timing_change_nothing() -> None:
    net = Branching().train()
    net.early.eval()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            assert static_macs(net, [3, 2, 2]) == 85
            assert latency_ms(net, 1, 2, input_shape=(3, 2, 2)) > 0
    assert net.training
    assert net.body.training
    assert not net.early.training
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_latency_is_the_median_of_a_sample() -> None:
    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.runs, self.training_seen, self.grad_seen = 0, False, False

        def forward(self, x: Tensor) -> Tensor:
            self.runs += 1
            self.training_seen |= self.training
            self.grad_seen |= torch.is_grad_enabled()
            # The warm-up and one straggler are slow; the median must not see them.
            time.sleep(0.2 if self.runs in (1, 5) else 0.02)
            return x.flatten(1)

    net = Slow()
    found = latency_ms(net, 4, 5, input_shape=(1, 2, 2))
    assert 5 <= found < 20
    assert not net.training_seen
    assert not net.grad_seen


def test_the_config_names_the_images() -> None:
    net = models.build("digits_small", width=2, hidden=4).double()
    assert latency_ms(net, 3, 2, "cpu") > 0
    assert latency_ms(net, 3, 2, device=None) > 0


def test_bad_input_is_one_line() -> None:
    net = models.build("digits_small")
    for call in (
        lambda: static_macs(Branching()),
        lambda: static_macs(net, (1, 12, 12)),
        lambda: latency_ms(net, input_shape=(3, 8, 8)),
        lambda: latency_ms(net, 0),
        lambda: latency_ms(net, 1, 0),
        lambda: latency_ms(net, 1, 2.5),
    ):
        with pytest.raises(InputError) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_attention_counts_whatever_form_it_runs_in() -> None:
    tokens, width, inside = 8, 16, 32

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(8, width)
            self.layer = nn.TransformerEncoderLayer(width, 2, inside, batch_first=True)
            self.last = nn.Linear(width, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.layer(self.embed(x[:, 0])).mean(1))

    projections = tokens * width * 4 * width + 2 * tokens * width * inside
    products = 2 * tokens * tokens * width  # scores, and the weighted sum of values
    by_hand = tokens * 8 * width + projections + products + width * 10
    net = Tokens().eval()
    assert static_macs(net, (1, 8, 8)) == by_hand
    exits = exit_macs(attach(net, {"embed": "linear"}, torch.zeros(1, 1, 8, 8)))
    assert exits == [tokens * 8 * width + width * 10, by_hand + width * 10]
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers_count_whatever_form_they_run_in(kind, gates: int) -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(8, 16)
            self.layer = kind(16, 12, batch_first=True)
            self.last = nn.Linear(12, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.layer(self.embed(x[:, 0]))[0][:, -1])

    by_hand = 8 * 8 * 16 + 8 * gates * 12 * (16 + 12) + 12 * 10
    assert static_macs(Rows().eval(), (1, 8, 8)) == by_hand
    assert torch.backends.mkldnn.enabled
