"""Networks in another layout for a while."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import small_run
from swiftsure import run_attacks
from swiftsure.modes import channels_last
from swiftsure.subject import open_subject

X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
NHWC = torch.channels_last


class Viewed(nn.Module):
    """Flattens by `view`, which the other layout does not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).view(len(x), -1))


def flattened() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3),
        nn.BatchNorm2d(6),
        nn.Flatten(),
        nn.Linear(6 * 16, 5),
    ).eval()


def test_the_answers_are_the_same_and_weights_lie_as_they_did() -> None:
    torch.manual_seed(0)
    net = flattened()
    net[2].to(memory_format=NHWC)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    strides = [parameter.stride() for parameter in net.parameters()]
    identities = [id(parameter) for parameter in net.parameters()]
    logits = net(X)

    with channels_last(net, X[:1]):
        assert net[0].weight.is_contiguous(memory_format=NHWC)
        assert not net[0].weight.is_contiguous()
        torch.testing.assert_close(net(X), logits)

    assert [parameter.stride() for parameter in net.parameters()] == strides
    assert [id(parameter) for parameter in net.parameters()] == identities
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_network_that_cannot_take_the_layout_keeps_its_own() -> None:
    net = Viewed().eval()
    with channels_last(net, X[:2]):
        assert net.conv.weight.is_contiguous()
        assert net(X).shape == (4, 5)


def test_weights_come_back_after_an_exception() -> None:
    net = flattened()
    with pytest.raises(KeyError), channels_last(net, X[:1]):
        raise KeyError
    assert net[0].weight.is_contiguous()


def test_attacks_use_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small_run.train(tmp_path / "run", "evaluate.limit=4")
    subject, seen = open_subject(folder, device="cpu"), []
    real = run_attacks.run_suite

    def watched(net: nn.Module, *arguments: object, **options: object) -> object:
        seen.extend(parameter.is_contiguous() for parameter in net.parameters() if parameter.dim() == 4)
        return real(net, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(run_attacks, "run_suite", watched)
    run_attacks.attack(subject, "quick")
    assert not all(seen)
    assert all(parameter.is_contiguous() for parameter in subject.net.parameters())
