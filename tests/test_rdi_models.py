"""RDI-Nets' three networks against the figures of the paper's code: parameters, multiply-adds, both counts."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch import nn

import swiftsure as ss
from swiftsure.errors import InputError
from swiftsure.exits import MultiExit, exit_macs, paper_macs, parameters, static_macs
from swiftsure.models.rdi import channel_options

PARAMETERS = {"rdi_smallcnn": 836_846, "rdi_resnet38": 692_310}
IN_BRANCHES = {"rdi_resnet38": 128_188}
# Millions of multiply-adds, convolutions and linear layers.
CUMULATIVE = {
    "rdi_smallcnn": [1.015, 8.529, 11.135],
    "rdi_resnet38": [17.61, 39.50, 53.79, 69.12, 82.23, 96.39, 101.11],
}
# 2**20 multiply-adds: what runs before an image leaves. SmallCNN with linear layers, the others convolutions only.
CUMULATIVE_2_20 = {
    "rdi_smallcnn": [0.97, 8.13, 10.62],
    "rdi_resnet38": [16.80, 37.67, 51.30, 65.92, 78.42, 91.92, 96.42],
    "rdi_mobilenetv2": [7.94, 27.72, 36.92, 43.34, 57.96, 74.70, 93.72],
}
PAPER = {
    "rdi_smallcnn": [0.818, 7.00, 9.25],
    "rdi_resnet38": [16.79, 30.29, 36.54, 50.04, 61.42, 74.92, 79.42],
    "rdi_mobilenetv2": [7.94, 22.91, 30.12, 36.55, 51.16, 67.91, 86.92],
}
STATIC = {"rdi_smallcnn": 9.952, "rdi_resnet38": 83.28}
STATIC_CONVOLUTIONS_2_20 = {"rdi_smallcnn": 9.25, "rdi_resnet38": 79.42, "rdi_mobilenetv2": 86.92}
EXITS = {"rdi_smallcnn": 3, "rdi_resnet38": 7, "rdi_mobilenetv2": 7}
# The tables are cut off, not rounded, after their last digit.
DIGIT = 0.0101


def build(name: str) -> MultiExit:
    net = ss.models.build(name)
    assert isinstance(net, MultiExit)
    return net


@pytest.mark.parametrize("name", EXITS)
def test_outputs_parameters_and_normalisation_inside(name: str) -> None:
    net = build(name).eval()
    shape = net.config["input_shape"]
    with torch.no_grad():
        logits = net(torch.rand(2, *shape))
    assert [tuple(z.shape) for z in logits] == [(2, 10)] * EXITS[name]
    if name in PARAMETERS:
        assert parameters(net) == PARAMETERS[name]
    if name in IN_BRANCHES:
        assert sum(parameters(head) for head in net.heads[:-1]) == IN_BRANCHES[name]
    assert isinstance(net.stages[0][0], ss.models.Normalize)


@pytest.mark.parametrize("name", EXITS)
def test_both_tables_of_multiply_adds(name: str) -> None:
    net = build(name)
    found = exit_macs(net)
    if name in CUMULATIVE:
        assert [macs / 1e6 for macs in found] == pytest.approx(CUMULATIVE[name], abs=DIGIT)
    counts = net.counts(net.config["input_shape"])
    convolutions = list(accumulate(stage.convolution + head.convolution for stage, head in counts))
    in_2_20 = [macs / 2**20 for macs in (found if name == "rdi_smallcnn" else convolutions)]
    assert in_2_20 == pytest.approx(CUMULATIVE_2_20[name], abs=DIGIT)
    assert paper_macs(net) == pytest.approx(PAPER[name], abs=DIGIT)
    assert static_macs(net) == found[-1]


@pytest.mark.parametrize("name", EXITS)
def test_the_static_version_is_the_trunk_alone(name: str) -> None:
    net, static = build(name), build(f"{name}_static")
    branches = sum(parameters(head) for head in net.heads[:-1])
    assert parameters(static) == parameters(net) - branches
    if name in STATIC:
        assert static_macs(static) / 1e6 == pytest.approx(STATIC[name], abs=DIGIT)
    assert paper_macs(static) == pytest.approx([STATIC_CONVOLUTIONS_2_20[name]], abs=DIGIT)
    # The same weights in the same order: with them it answers as the last exit does.
    trunk = [*net.stages.state_dict().values(), *net.heads[-1].state_dict().values()]
    static.load_state_dict(dict(zip(static.state_dict(), trunk, strict=True)))
    x = torch.rand(3, *net.config["input_shape"])
    with torch.no_grad():
        assert torch.equal(static.eval()(x), net.eval()(x)[-1])


FEWER = {
    "rdi_smallcnn": {"widths": [3, 4, 5, 6, 7, 8]},
    "rdi_resnet38": {"widths": [3, 4, 5], "inside": list(range(2, 20))},
    # In the third and fourth entry what a block reads and returns are alike, and it projects all the same.
    "rdi_mobilenetv2": {"widths": [3, 2, 4, 4, 5, 5, 6, 7, 9], "inside": list(range(2, 19))},
}


@pytest.mark.parametrize("name", EXITS)
def test_networks_of_other_widths_are_built_by_their_options(name: str) -> None:
    for full in (name, f"{name}_static"):
        plain, narrow = build(full), ss.models.build(full, **FEWER[name])
        assert channel_options(narrow) == FEWER[name]
        again = ss.models.build(full, **channel_options(plain))
        shapes = [
            {key: value.shape for key, value in net.state_dict().items()} for net in (plain, again, narrow)
        ]
        assert shapes[0] == shapes[1]
        assert shapes[0].keys() == shapes[2].keys()
        assert parameters(narrow) < parameters(plain)
        with torch.no_grad():
            logits = narrow.eval()(torch.rand(2, *narrow.config["input_shape"]))
        assert all(z.shape == (2, 10) for z in ([logits] if isinstance(logits, torch.Tensor) else logits))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        (
            "rdi_smallcnn",
            {"widths": [3, 4]},
            "widths is [3, 4]; allowed: 6 numbers of channels, each 1 or more",
        ),
        ("rdi_resnet38", {"widths": [3, 0, 4]}, "widths is [3, 0, 4]; allowed: 3 numbers"),
        ("rdi_resnet38", {"inside": [3]}, "inside is [3]; allowed: 18 numbers"),
        ("rdi_mobilenetv2", {"inside": [2.5] * 17}, "allowed: 17 numbers"),
        ("rdi_mobilenetv2", {"widths": 5}, "cannot be built"),
    ],
)
def test_widths_that_cannot_be(name: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(InputError) as caught:
        ss.models.build(name, **options)
    assert words in str(caught.value)


def test_layers_of_the_small_network() -> None:
    net = build("rdi_smallcnn")
    convolutions = [
        (m.in_channels, m.out_channels, *m.kernel_size, *m.stride, *m.padding)
        for part in (net.stages, net.heads)
        for m in part.modules()
        if isinstance(m, nn.Conv2d)
    ]
    assert convolutions == [
        (1, 32, 3, 3, 1, 1, 0, 0), (32, 32, 3, 3, 1, 1, 0, 0), (32, 64, 3, 3, 1, 1, 0, 0),
        (64, 64, 3, 3, 1, 1, 0, 0), (32, 16, 3, 3, 2, 2, 0, 0),
    ]  # fmt: skip
    linear = [[m for m in head if isinstance(m, nn.Linear)] for head in net.heads]
    assert [[m.in_features for m in layers] for layers in linear] == [
        [576, 200, 200],
        [1600, 200, 200],
        [1024, 200, 200],
    ]
    assert not linear[-1][-1].weight.any()
    assert linear[0][-1].weight.any()
    # Between the linear layers of a branch nothing is bent; of the trunk it is.
    assert [sum(isinstance(m, nn.ReLU) for m in head) for head in net.heads] == [0, 0, 2]


@pytest.mark.parametrize("name", EXITS)
def test_the_shapes_at_the_taps(name: str) -> None:
    taps = {
        "rdi_smallcnn": [(32, 26, 26), (64, 10, 10), (1024,)],
        "rdi_resnet38": [(16, 32, 32), (16, 32, 32), (32, 16, 16), (32, 16, 16), (64, 8, 8), (64, 8, 8), (64, 8, 8)],
        "rdi_mobilenetv2": [
            (16, 32, 32), (32, 16, 16), (64, 8, 8), (64, 8, 8), (96, 8, 8), (160, 4, 4), (1280, 4, 4),
        ],
    }  # fmt: skip
    net = build(name).eval()
    x = torch.rand(1, *net.config["input_shape"])
    found = []
    with torch.no_grad():
        for stage in net.stages:
            x = stage(x)
            found.append(tuple(x.shape[1:]))
    assert found == taps[name]


@pytest.mark.parametrize("name", [f"{base}{end}" for base in EXITS for end in ("", "_static")])
def test_bounds_trace_every_exit_and_share_the_trunk(name: str) -> None:
    net = build(name).eval()
    x = torch.rand(1, *net.config["input_shape"])
    graph = ss.bounds.trace(net, x)
    assert len(graph.outputs) == net.exits
    with torch.no_grad():
        logits = net(x)
        for found, expected in zip(graph.values(x), [logits] if net.exits == 1 else logits, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if net.exits > 1:
        first, last = (set(graph.ancestors(output)) for output in (graph.outputs[0], graph.outputs[-1]))
        assert len(first & last) > 1
        assert len(graph.ancestors(graph.outputs[-1])) < len(graph.nodes)


def test_a_few_steps_of_training_lower_the_loss_of_every_exit() -> None:
    torch.manual_seed(0)
    net = build("rdi_smallcnn").train()
    images = ss.data.load("digits").train
    x, y = images.batch(slice(0, 64))
    x = nn.functional.interpolate(x, 28)
    descent = torch.optim.Adam(net.parameters(), 1e-3)
    losses = []
    for _ in range(15):
        each = torch.stack([nn.functional.cross_entropy(z, y) for z in net(x)])
        losses.append(each.detach())
        descent.zero_grad()
        each.sum().backward()
        descent.step()
    assert bool((losses[-1] < 0.8 * losses[0]).all())
