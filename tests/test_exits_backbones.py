"""Backbones of torchvision and timm with exits, at modules named by hand and at default ones."""

from __future__ import annotations

import pytest
import torch

import backbones
from swiftsure.exits import attach, equal_share


@pytest.mark.parametrize(
    ("name", "cuts"),
    [
        ("resnet18", {"layer1.1": "linear", "layer2.0.conv1": "conv", "layer3": "linear"}),
        ("mobilenet_v3_small", {"features.3": "linear", "features.7": "conv"}),
        ("densenet121", {"features.denseblock2": "linear"}),
        ("shufflenet_v2_x0_5", {"stage2.1": "linear", "stage3": "linear"}),
        ("vgg11_bn", {"features.4": "linear", "features.14": "linear"}),
        ("resnet18", 4),
        ("efficientnet_b0", 3),
        ("convnext_tiny", 3),
        ("swin_t", 3),
    ],
)
def test_torchvision_backbones(name: str, cuts) -> None:
    models = backbones.load("torchvision.models")
    torch.manual_seed(0)
    trunk = getattr(models, name)(num_classes=7)
    x = torch.rand(4, 3, 64, 64)
    net = attach(trunk, cuts, x).eval()
    with torch.no_grad():
        logits = net(x)
        assert torch.equal(logits[-1], trunk(x))
        net.policy = equal_share(logits)
        torch.testing.assert_close(net.adaptive(x).logits, net.policy.logits_of(logits), rtol=1e-3, atol=1e-4)
    net.train()
    sum(z.sum() for z in net(x)).backward()


@pytest.mark.parametrize(
    ("name", "cuts"),
    [
        ("resnet10t", {"layer1": "linear", "layer3": "conv"}),
        ("mobilenetv2_050", {"blocks.2": "linear"}),
        ("vit_tiny_patch16_224", {"blocks.3": "linear", "blocks.7": "linear"}),
        ("resnet10t", 3),
    ],
)
def test_timm_backbones(name: str, cuts) -> None:
    timm = backbones.load("timm")
    torch.manual_seed(0)
    sized = {"img_size": 64} if name.startswith("vit") else {}
    trunk = timm.create_model(name, num_classes=7, **sized)
    x = torch.rand(4, 3, 64, 64)
    net = attach(trunk, cuts, x).eval()
    with torch.no_grad():
        assert torch.equal(net(x)[-1], trunk(x))
    net.train()
    sum(z.sum() for z in net(x)).backward()
