"""Networks of torchvision and timm as they come: read, bounded, and refused where they must be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import backbones
from swiftsure import bounds
from swiftsure.ball import Ball
from swiftsure.errors import InputError

SIDE = 32


def torchvision(name: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: getattr(backbones.load("torchvision.models"), name)(**options)


def timm(name: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: backbones.load("timm").create_model(name, num_classes=3, **options)


def timm_vgg() -> nn.Module:
    """Asks for the size of its maps, and branches on it."""
    return backbones.load("timm.models.vgg").VGG([8, "M", 16, "M"], num_classes=3, mlp_ratio=0.01)


READ = {
    "resnet18": torchvision("resnet18", num_classes=3),
    "mobilenet_v2": torchvision("mobilenet_v2", num_classes=3, width_mult=0.35),
    "densenet": torchvision(
        "DenseNet", growth_rate=8, block_config=(2, 2, 2, 2), num_init_features=16, num_classes=3
    ),
    "shufflenet": torchvision("shufflenet_v2_x0_5", num_classes=3),
    "googlenet": torchvision("googlenet", num_classes=3, aux_logits=False, init_weights=False),
    "squeezenet": torchvision("squeezenet1_1", num_classes=3),
    "timm resnet18": timm("resnet18"),
    "timm vgg": timm_vgg,
}


def rising(net: nn.Module) -> nn.Module:
    """With weights >= 0 no output ever falls as a pixel rises; then the ends of the box are the truth."""
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data.abs_()
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, 0.0, 0.5, generator=generator)
            module.momentum = None  # all of the next batch's statistics
    with torch.no_grad():
        net.train()(torch.rand(8, 3, SIDE, SIDE, generator=generator))
    return net.double().eval()


def images(count: int) -> Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", READ)
def test_bounds_of_a_backbone(name: str) -> None:
    torch.manual_seed(0)
    net, x, y, ball = rising(READ[name]()), images(2), torch.tensor([0, 2]), Ball("1/255")
    lower, upper = ball.box(x)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        least, greatest = net(lower), net(upper)
        assert (greatest > least).any()
        low, high = bounds.output_bounds(net, x, ball, "interval")
        torch.testing.assert_close(low, least, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(high, greatest, rtol=1e-7, atol=1e-9)
        low, high = bounds.output_bounds(net, x, ball, "crown-ibp")
        proofs = {method: bounds.margins(net, x, y, ball, method) for method in ("interval", "crown-ibp")}
        slack = 1e-9 * (1 + greatest.abs().max())
        assert (low <= least + slack).all()
        assert (high >= greatest - slack).all()
        for point in (x, lower, upper, *(ball.sample(x, generator) for _ in range(3))):
            logits = net(point.clone())
            margin = logits.gather(1, y[:, None]) - logits
            for method, proof in proofs.items():
                assert (margin >= proof - slack).all(), method


@pytest.mark.parametrize(
    ("make", "place", "reason"),
    [
        (torchvision("mobilenet_v3_small"), "features.1.block.1", "both factors depend on the image"),
        (torchvision("convnext_tiny"), "features.0.1", "statistics of the image"),
    ],
    ids=["mobilenet_v3", "convnext"],
)
def test_a_backbone_that_no_rule_covers_is_refused_in_one_line(
    make: Callable[[], nn.Module], place: str, reason: str
) -> None:
    with pytest.raises(InputError) as caught:
        bounds.output_bounds(make(), images(1).float(), Ball("1/255"))
    line = str(caught.value)
    assert place in line
    assert reason in line
    assert "replace it" in line
    assert "\n" not in line
