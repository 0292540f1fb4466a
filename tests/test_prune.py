"""Pruned networks: channels are really gone, the least important ones, and what is left is an ordinary network."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import swiftsure as ss
from swiftsure import data, recipe_file, run
from swiftsure.errors import InputError
from swiftsure.exits import parameters, static_macs
from swiftsure.models.rdi import BasicBlock, channel_options
from swiftsure.recipe import Loss, ModelChoice, Optimizer, Recipe, Schedule

pytest.importorskip("torch_pruning")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import prune

SMALL = {"widths": [4, 4, 6, 6, 8, 8]}
RESNET = {"widths": [4, 4, 6], "inside": [4] * 18}


def network(name: str, **options: object) -> nn.Module:
    """Weights that all matter, those that are zero at first and batch norms included."""
    torch.manual_seed(0)
    net = ss.models.build(name, **options).eval()
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            nn.init.normal_(module.weight, 0.5 if isinstance(module, nn.BatchNorm2d) else 0.0, 0.3)
            if module.bias is not None:
                nn.init.normal_(module.bias, 0.0, 0.3)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0.0, 0.3)
    return net


def silence(layers: list[nn.Module], channels: list[int]) -> None:
    """Take away what makes some channels of convolutions, linear layers or batch norms."""
    for layer in layers:
        layer.weight.data[channels] = 0.0
        if layer.bias is not None:
            layer.bias.data[channels] = 0.0


def silenced_small() -> nn.Module:
    net = network("rdi_smallcnn_static", **SMALL)
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer, reader in pairwise(layers):
        channels = list(range(0, len(layer.weight), 2))
        silence([layer], channels)
        # Importance looks at both ends. Of the flattened map 16 columns belong to a channel.
        reader.weight.data.unflatten(1, (len(layer.weight), -1))[:, channels] = 0.0
    return net


def silenced_resnet() -> nn.Module:
    net = network("rdi_resnet38_static", **RESNET)
    stem = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)][:2]
    silence(stem, [1])
    before = [1]
    for number, block in enumerate(m for m in net.modules() if isinstance(m, BasicBlock)):
        after = [1] if number < 6 else [2] if number < 12 else [0, 3]
        silence([block.conv_a, block.norm_a], [3])
        silence([block.conv_b, block.norm_b, *block.shortcut], after)
        block.conv_b.weight.data[:, [3]] = 0.0
        for layer in (block.conv_a, *block.shortcut[:1]):
            layer.weight.data[:, before] = 0.0
        before = after
    net.heads[0][-1].weight.data[:, before] = 0.0
    return net


@pytest.mark.parametrize(
    ("masked", "left"),
    [
        (silenced_small, {"widths": [3, 3, 4, 4, 5, 5]}),
        (silenced_resnet, {"widths": [3, 3, 5], "inside": [4, *[3] * 17]}),
    ],
)
def test_to_remove_masked_channels_changes_nothing_but_the_cost(masked, left) -> None:
    net = masked()
    config = net.config
    before = {name: value.clone() for name, value in net.state_dict().items()}
    goal = static_macs(ss.models.build(config["name"], **left))
    smaller = prune.pruned(net, goal)
    assert static_macs(smaller) <= goal < static_macs(net)
    assert static_macs(smaller) > 0.8 * goal
    assert parameters(smaller) < parameters(net)
    # It is the network that its options say, layer by layer.
    rebuilt = ss.models.build(config["name"], **smaller.config["options"])
    assert [p.shape for p in smaller.parameters()] == [p.shape for p in rebuilt.parameters()]
    assert channel_options(smaller) == smaller.config["options"]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    x = torch.rand(5, *config["input_shape"])
    with torch.no_grad():
        torch.testing.assert_close(smaller(x), net(x), rtol=1e-4, atol=1e-4)
        assert net(x).std() > 0.01


def test_the_gradients_importance_finds_what_the_loss_does_not_need() -> None:
    net = network("rdi_smallcnn_static", **SMALL)
    # Large weights that lead nowhere: magnitude keeps them, gradients do not.
    first, second = net.stages[0][0][1], net.stages[0][1][0]
    first.weight.data[2] *= 100
    second.weight.data[:, 2] = 0.0
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 1, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (40,), generator=generator)
    recipe = Recipe()
    recipe.loss.attack.steps = 2
    prune.note_gradients(net, recipe, data.ImageSet.from_tensors(images, labels))
    goal = 0.75 * static_macs(net)
    loud = [
        prune.pruned(net, goal, name).stages[0][0][1].weight.abs().max() > 10 for name in prune.IMPORTANCE
    ]
    assert loud == [True, False]


def test_a_pruned_start_and_its_recipe(tmp_path: Path, monkeypatch, capsys) -> None:
    net = network("rdi_smallcnn_static", **SMALL)
    folder = tmp_path / "defended"
    ss.models.save(net, folder)
    recipe = Recipe(
        name="defended",
        model=ModelChoice("rdi_smallcnn_static", SMALL),
        loss=Loss(clean=0.5, attacked=0.5, proven=False),
        optimizer=Optimizer(name="sgd", rate=0.03, decay="step", decay_epochs=[9, 18]),
        schedule=Schedule(epochs=20, ramp=5),
    )
    (folder / "recipe.yaml").write_text(recipe_file.dump(recipe))
    out = tmp_path / "out"
    words = [
        "prune.py",
        str(folder),
        "--macs",
        str(0.7 * static_macs(net)),
        "--out",
        str(out),
        "--epochs",
        "10",
    ]
    monkeypatch.setattr(sys, "argv", words)
    assert prune.main() == 0
    assert "multiply-adds" in capsys.readouterr().out
    smaller = ss.load(out / "start")
    assert 0.6 * static_macs(net) < static_macs(smaller) <= 0.7 * static_macs(net)
    after = recipe_file.read(out / "recipe.yaml")
    assert after.loss == recipe.loss
    assert after.optimizer.rate == pytest.approx(0.003)
    assert after.optimizer.decay_epochs == [4, 9]
    assert (after.schedule.epochs, after.schedule.ramp) == (10, 0)
    # Training begins with the weights that were left.
    begun = ss.models.build(after.model.name, **after.model.options)
    run._warm_start(begun, Path(after.model.warm_start) / "model.safetensors")
    for name, value in begun.state_dict().items():
        assert torch.equal(value, smaller.state_dict()[name])
    assert prune.main() == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "options", "macs", "words"),
    [
        ("rdi_smallcnn_static", SMALL, 1e9, "macs is 1,000,000,000; allowed: above 0, below what the network costs"),
        ("rdi_smallcnn_static", SMALL, 0, "macs is 0; allowed"),
        ("rdi_smallcnn_static", SMALL, float("nan"), "macs is nan"),
        ("rdi_smallcnn_static", SMALL, 100, "one channel in each layer costs"),
        ("rdi_smallcnn", SMALL, 1e5, "several exits; allowed: one"),
        ("mnist_small", {}, 1e5, "mnist_small does not take its channels as options; allowed: rdi_smallcnn"),
    ],
)  # fmt: skip
def test_what_cannot_be_pruned(name: str, options: dict[str, object], macs: float, words: str) -> None:
    with pytest.raises(InputError) as caught:
        prune.pruned(ss.models.build(name, **options), macs)
    assert words in str(caught.value)
