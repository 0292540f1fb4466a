"""Networks with exits on disk: heads and thresholds come back, or one line says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import swiftsure as ss
from swiftsure import exits, files, models
from swiftsure.errors import InputError
from swiftsure.exits import MultiExit, Policy
from swiftsure.recipe import Loss, Schedule


def own(width: int = 6) -> nn.Module:
    """A backbone that no name is registered for."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 4, 3, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip


def same(net: nn.Module, again: nn.Module, shape: tuple[int, ...] = (1, 8, 8)) -> None:
    x = torch.rand(20, *shape, generator=torch.Generator().manual_seed(0))
    net.eval()
    assert not again.training
    assert again.config == net.config
    assert again.policy == net.policy
    first, second = net(x), again(x)
    for a, b in zip(*[[z] if isinstance(z, torch.Tensor) else z for z in (first, second)], strict=True):
        assert torch.equal(a, b)
    if net.policy is not None or not isinstance(net, MultiExit):
        assert torch.equal(net.adaptive(x).exit, again.adaptive(x).exit)


@pytest.mark.parametrize(
    "cuts", [{"2": "linear"}, {"4": {"kind": "conv", "width": 5}, "2": "pooled"}, 3, {}]
)  # fmt: skip
def test_a_registered_backbone_needs_no_help(tmp_path: Path, cuts: Any) -> None:
    torch.manual_seed(0)
    backbone = models.build("digits_small", width=4, hidden=12)
    net = ss.attach(backbone, cuts)
    for parameter in net.parameters():
        nn.init.normal_(parameter, 0, 0.5)
    net.policy = Policy("entropy", [0.3] * (net.exits - 1)) if net.exits > 1 else None
    models.save(net, tmp_path, note="mine")
    same(net, ss.load(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["policy"] == (
        None if net.policy is None else {"rule": "entropy", "thresholds": [0.3] * (net.exits - 1)}
    )
    assert config["model"]["name"] == "digits_small"
    assert list(config["model"]["exits"]) == list(net.config["exits"])


@pytest.mark.parametrize("name", ["rdi_smallcnn", "rdi_smallcnn_static", "rdi_resnet38", "rdi_mobilenetv2"])
def test_networks_that_have_exits_by_name(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    net = models.build(name)
    nn.init.normal_(net.heads[-1][-1].weight)
    net.policy = Policy("confidence", [0.4] * (net.exits - 1)) if net.exits > 1 else None
    models.save(net, tmp_path)
    same(net, ss.load(tmp_path), tuple(net.config["input_shape"]))


def test_an_unregistered_backbone_is_passed_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = ss.attach(own(), {"2": "linear"}, example=torch.rand(1, 1, 8, 8))
    net.policy = Policy("entropy", [0.5])
    models.save(net, tmp_path)
    same(net, ss.load(tmp_path, model=own()))
    same(net, ss.load(tmp_path, model=ss.attach(own(), {"2": "linear"}, torch.rand(1, 1, 8, 8))))
    with pytest.raises(InputError, match="names no architecture; pass the module"):
        ss.load(tmp_path)
    with pytest.raises(
        InputError, match=r"heads\.0\.2\.weight has shape \(3, 6\), the network needs \(3, 5\)"
    ):
        ss.load(tmp_path, model=own(5))
    with pytest.raises(InputError, match="has exits behind 2; the network passed has them behind 4"):
        ss.load(tmp_path, model=ss.attach(own(), {"4": "linear"}, torch.rand(1, 1, 8, 8)))
    with pytest.raises(InputError, match="unknown module '2'"):
        ss.load(tmp_path, model=nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))


def test_a_head_of_ones_own_is_passed_again(tmp_path: Path) -> None:
    def mine() -> MultiExit:
        head = nn.Sequential(nn.Flatten(), nn.Linear(6 * 64, 3))
        return ss.attach(own(), {"2": head}, torch.rand(1, 1, 8, 8))

    torch.manual_seed(0)
    net = mine()
    models.save(net, tmp_path)
    again = ss.load(tmp_path, model=mine())
    same(net, again)
    assert again.policy is None
    with pytest.raises(
        InputError, match="the head behind '2' was a module of your own; pass the whole network"
    ):
        ss.load(tmp_path, model=own())


def test_stages_and_heads_of_ones_own(tmp_path: Path) -> None:
    def mine() -> MultiExit:
        return MultiExit([nn.Flatten(), nn.Linear(64, 8)], [nn.Linear(64, 3), nn.Linear(8, 3)])

    net = mine()
    net.policy = Policy("entropy", [0.7])
    models.save(net, tmp_path)
    again = ss.load(tmp_path, model=mine())
    assert again.policy == net.policy
    assert torch.equal(again.heads[0].weight, net.heads[0].weight)
    with pytest.raises(InputError, match="has thresholds of exits; the network has one exit"):
        ss.load(tmp_path, model=nn.Linear(64, 3))


def test_thresholds_are_put_into_a_saved_network(tmp_path: Path) -> None:
    net = ss.attach(models.build("digits_small", width=4, hidden=12), {"2": "linear"})
    models.save(net, tmp_path, note="mine")
    weights = (tmp_path / "model.safetensors").read_bytes()
    net.policy = Policy("entropy", [0.25])
    models.save_policy(net, tmp_path)
    assert ss.load(tmp_path).policy == net.policy
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["note"] == "mine"
    assert (tmp_path / "model.safetensors").read_bytes() == weights


def damage(folder: Path, place: tuple[str, ...], value: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    inner = config
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("policy",), {"rule": "entropy", "thresholds": [0.1, 0.2]}, "2 thresholds for 2 exits; allowed: 1"),
        (("policy",), {"rule": "entropy", "thresholds": ["NaN"]}, "threshold 0 of entropy is 'NaN'"),
        (("policy",), {"rule": "guess", "thresholds": [0.1]}, "unknown rule of exits 'guess'"),
        (("policy",), 3, "a policy is 3"),
        (("model", "exits"), {"9": {"kind": "linear"}}, "unknown module '9'"),
        (("model", "exits"), {"2": {"kind": "lineer"}}, "unknown head 'lineer'; did you mean 'linear'"),
        (("model", "exits"), {"4": {"kind": "linear"}}, "has shape"),
        (("model", "exits"), [1], "the stored exits are damaged"),
        (("model", "exits"), {"2": 7}, "a head is 7"),
    ],
)
def test_damaged_configs_are_refused_in_one_line(
    tmp_path: Path, place: tuple[str, ...], value: Any, words: str
) -> None:
    net = ss.attach(models.build("digits_small", width=4, hidden=12), {"2": "linear"})
    net.policy = Policy("entropy", [0.2])
    models.save(net, tmp_path)
    damage(tmp_path, place, value)
    with pytest.raises(InputError) as caught:
        ss.load(tmp_path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_from_before_there_were_policies(tmp_path: Path) -> None:
    net = models.build("digits_small", width=4, hidden=12)
    models.save(net, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["policy"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    same(net, ss.load(tmp_path))
    assert exits.exit_macs(ss.load(tmp_path)) == exits.exit_macs(net)


class Versioned(nn.Linear):
    """A layer that looks for the version it was stored by, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, local_metadata, *rest) -> None:  # type: ignore[no-untyped-def]
        if local_metadata.get("version") != 2:
            raise ValueError("version should be set")
        super()._load_from_state_dict(state, prefix, local_metadata, *rest)


def test_layers_with_versions_are_trained_and_loaded(tmp_path: Path) -> None:
    def mine() -> MultiExit:
        torch.manual_seed(0)
        trunk = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), Versioned(12, 3))
        return ss.attach(trunk, {"1": "linear"}, torch.rand(1, 1, 8, 8))

    net, x, y = mine(), torch.rand(20, 1, 8, 8), torch.arange(20) % 3
    ss.fit(net, (x, y), (x, y), loss=Loss(proven=False), schedule=Schedule(epochs=1, ramp=0, batch=10))
    models.save(net, tmp_path)
    same(net, ss.load(tmp_path, model=mine()))


@pytest.mark.parametrize("shape", [["a", 8, 8], [1, -8, 8], [1, 1e7, 1e7], [1, 8]])
def test_a_damaged_input_shape_is_one_line(tmp_path: Path, shape: list[object]) -> None:
    models.save(ss.attach(own(), {"2": "linear"}, example=torch.rand(1, 1, 8, 8)), tmp_path)
    config = files.read_json(tmp_path / "config.json")
    config["model"]["input_shape"] = shape
    files.write_json(tmp_path / "config.json", config)
    with pytest.raises(InputError):
        ss.load(tmp_path, model=own())
