"""The three networks of RDI-Nets (Hu et al. 2020, as in its released code), and their static versions of one exit.

A static version is the same trunk without branches: what RDI-Nets are compared with. All take other numbers of
channels than the paper's, so that a network whose channels were removed is built again by name and options.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor, nn

from swiftsure.errors import InputError
from swiftsure.exits.multi_exit import MultiExit
from swiftsure.models.layers import Normalize
from swiftsure.models.mixtrain import MNIST_STATISTICS
from swiftsure.models.registry import register

_CIFAR = ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616])
_MNIST_SHAPE, _CIFAR_SHAPE = (1, 28, 28), (3, 32, 32)
_NAMES = ("rdi_smallcnn", "rdi_resnet38", "rdi_mobilenetv2")
_SMALL_WIDTHS = (32, 32, 64, 64, 200, 200)
_RESNET_WIDTHS = (16, 32, 64)
_MOBILE_WIDTHS = (32, 16, 24, 32, 64, 96, 160, 320, 1280)


class BasicBlock(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)), 3x3 convolutions without bias.

    Args:
        channels_in, channels_out: channels.
        stride: of the first convolution.
        inside: channels between the convolutions; None: channels_out.
    """

    def __init__(
        self, channels_in: int, channels_out: int, stride: int = 1, inside: int | None = None
    ) -> None:
        super().__init__()
        inside = channels_out if inside is None else inside
        self.conv_a = nn.Conv2d(channels_in, inside, 3, stride, 1, bias=False)
        self.norm_a = nn.BatchNorm2d(inside)
        self.relu_a = nn.ReLU()
        self.conv_b = nn.Conv2d(inside, channels_out, 3, 1, 1, bias=False)
        self.norm_b = nn.BatchNorm2d(channels_out)
        self.shortcut = nn.Sequential()
        if stride > 1 or channels_in != channels_out:
            self.shortcut = _projection(channels_in, channels_out, stride)
        self.relu_b = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels_in, H, W) to (batch, channels_out, H / stride, W / stride)."""
        inner = self.relu_a(self.norm_a(self.conv_a(x)))
        return self.relu_b(self.norm_b(self.conv_b(inner)) + self.shortcut(x))


class InvertedBlock(nn.Module):
    """1x1 to more channels, 3x3 on each, 1x1 back to few; no activation at the end (Sandler et al. 2018).

    Args:
        channels_in, channels_out: channels.
        inside: channels of the 3x3 convolution.
        stride: of the 3x3 convolution; at 1 the input is added.
        project: whether it is added by way of a 1x1 projection.
    """

    def __init__(
        self, channels_in: int, channels_out: int, inside: int, stride: int, project: bool = False
    ) -> None:
        super().__init__()
        self.widen = nn.Conv2d(channels_in, inside, 1, bias=False)
        self.norm_a = nn.BatchNorm2d(inside)
        self.relu_a = nn.ReLU()
        self.each = nn.Conv2d(inside, inside, 3, stride, 1, groups=inside, bias=False)
        self.norm_b = nn.BatchNorm2d(inside)
        self.relu_b = nn.ReLU()
        self.narrow = nn.Conv2d(inside, channels_out, 1, bias=False)
        self.norm_c = nn.BatchNorm2d(channels_out)
        self.adds = stride == 1
        self.shortcut = nn.Sequential()
        if self.adds and project:
            self.shortcut = _projection(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels_in, H, W) to (batch, channels_out, H / stride, W / stride)."""
        wide = self.relu_a(self.norm_a(self.widen(x)))
        out = self.norm_c(self.narrow(self.relu_b(self.norm_b(self.each(wide)))))
        return out + self.shortcut(x) if self.adds else out


def _projection(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
    )


def _pooled_linear(channels: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]


def _network(
    trunk: Sequence[nn.Module], heads: Sequence[nn.Module], static: bool, shape: tuple[int, ...], classes: int
) -> MultiExit:
    """All exits, or the last one behind the whole trunk."""
    net = MultiExit([nn.Sequential(*trunk)], [heads[-1]]) if static else MultiExit(trunk, heads)
    net.input_shape, net.classes = shape, classes  # type: ignore[assignment]
    return net


def _small_cnn(static: bool, classes: int, widths: Sequence[int]) -> MultiExit:
    a, b, c, d, e, f = _channels("widths", widths, len(_SMALL_WIDTHS))
    trunk = [
        nn.Sequential(Normalize(*MNIST_STATISTICS), nn.Conv2d(1, a, 3), nn.ReLU()),
        nn.Sequential(nn.Conv2d(a, b, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(b, c, 3), nn.ReLU()),
        nn.Sequential(nn.Conv2d(c, d, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
    ]

    def branch(*pooled: nn.Module, features: int) -> nn.Sequential:
        hidden = (nn.Linear(features, 200), nn.Dropout(0.5), nn.Linear(200, 200))
        return nn.Sequential(*pooled, nn.Flatten(), *hidden, nn.Linear(200, classes))

    last = nn.Linear(f, classes)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    heads = [
        branch(nn.Conv2d(a, 16, 3, 2), nn.MaxPool2d(2), features=16 * 6 * 6),
        branch(nn.MaxPool2d(2), features=c * 5 * 5),
        nn.Sequential(nn.Linear(d * 4 * 4, e), nn.ReLU(), nn.Dropout(0.5), nn.Linear(e, f), nn.ReLU(), last),
    ]
    return _network(trunk, heads, static, _MNIST_SHAPE, classes)


def _resnet38(static: bool, classes: int, widths: Sequence[int], inside: Sequence[int] | None) -> MultiExit:
    widths = _channels("widths", widths, len(_RESNET_WIDTHS))
    each = [width for width in widths for _ in range(6)]
    inner = each if inside is None else _channels("inside", inside, len(each))
    blocks: list[nn.Module] = []
    channels = widths[0]
    for number, width in enumerate(each):
        stride = 2 if number in (6, 12) else 1
        blocks.append(BasicBlock(channels, width, stride, inner[number]))
        channels = width
    # Taps after blocks 1 and 4, from 0, of each group.
    ends = [6 * group + number + 1 for group in range(3) for number in (1, 4)]
    trunk = [nn.Sequential(*blocks[a:b]) for a, b in zip([0, *ends], [*ends, 18], strict=True)]
    stem = (
        Normalize(*_CIFAR),
        nn.Conv2d(3, widths[0], 3, 1, 1, bias=False),
        nn.BatchNorm2d(widths[0]),
        nn.ReLU(),
    )
    trunk[0] = nn.Sequential(*stem, *trunk[0])

    def early() -> nn.Sequential:
        return nn.Sequential(
            *(nn.MaxPool2d(2), nn.Conv2d(widths[0], 64, 5, 1, 2, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.MaxPool2d(2), nn.Conv2d(64, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32)),
            *_pooled_linear(32, classes),
        )

    def middle() -> nn.Sequential:
        return nn.Sequential(
            nn.MaxPool2d(2), BasicBlock(widths[1], widths[1]), *_pooled_linear(widths[1], classes)
        )

    def late() -> nn.Sequential:
        return nn.Sequential(*_pooled_linear(widths[2], classes))

    heads = [early(), early(), middle(), middle(), late(), late(), late()]
    return _network(trunk, heads, static, _CIFAR_SHAPE, classes)


# Expansion, blocks, stride of the first, whether it projects: strides for 32x32 images, as is usual on CIFAR.
_MOBILE = (
    (1, 1, 1, True),
    (6, 2, 1, True),
    (6, 3, 2, False),
    (6, 4, 2, False),
    (6, 3, 1, True),
    (6, 3, 2, False),
    (6, 1, 1, True),
)
_MOBILE_BLOCKS = sum(count for _, count, _, _ in _MOBILE)


def _mobilenetv2(
    static: bool, classes: int, widths: Sequence[int], inside: Sequence[int] | None
) -> MultiExit:
    stem_width, *groups, top = _channels("widths", widths, len(_MOBILE_WIDTHS))
    inner = None if inside is None else _channels("inside", inside, _MOBILE_BLOCKS)
    blocks: list[nn.Module] = []
    channels = stem_width
    for width, (expand, count, stride, project) in zip(groups, _MOBILE, strict=True):
        for number in range(count):
            wide = expand * channels if inner is None else inner[len(blocks)]
            first = number == 0
            blocks.append(InvertedBlock(channels, width, wide, stride if first else 1, project and first))
            channels = width
    # The paper's layers 2, 5, 8, 10, 13, 16 count the stem as the first.
    ends = [layer - 1 for layer in (2, 5, 8, 10, 13, 16)]
    trunk = [nn.Sequential(*blocks[a:b]) for a, b in zip([0, *ends], [*ends, len(blocks)], strict=True)]
    stem = (
        *(Normalize(*_CIFAR), nn.Conv2d(3, stem_width, 3, 1, 1, bias=False)),
        *(nn.BatchNorm2d(stem_width), nn.ReLU()),
    )
    trunk[0] = nn.Sequential(*stem, *trunk[0])
    trunk[-1] = nn.Sequential(
        *trunk[-1], nn.Conv2d(groups[-1], top, 1, bias=False), nn.BatchNorm2d(top), nn.ReLU()
    )
    one, _, two, three, four, five, _ = groups
    heads = [
        nn.Sequential(
            *(InvertedBlock(one, 32, 6 * one, 2), nn.BatchNorm2d(32), nn.ReLU()),
            *(InvertedBlock(32, 64, 6 * 32, 2), nn.BatchNorm2d(64)),
            *_pooled_linear(64, classes),
        ),
        nn.Sequential(InvertedBlock(two, 32, 6 * two, 2), *_pooled_linear(32, classes)),
        *(nn.Sequential(*_pooled_linear(width, classes)) for width in (three, three, four, five, top)),
    ]
    return _network(trunk, heads, static, _CIFAR_SHAPE, classes)


def _channels(name: str, given: Sequence[int], count: int) -> Sequence[int]:
    whole = all(isinstance(value, int) and not isinstance(value, bool) and value >= 1 for value in given)
    if len(given) != count or not whole:
        raise ValueError(f"{name} is {list(given)}; allowed: {count} numbers of channels, each 1 or more")
    return given


@register("rdi_smallcnn")
def rdi_smallcnn(classes: int = 10, widths: Sequence[int] = _SMALL_WIDTHS) -> MultiExit:
    """Four 3x3 convolutions without padding and three linear layers, 3 exits, for 1x28x28 images.

    Args:
        classes: classes.
        widths: channels of the four convolutions of the trunk, then of the two hidden linear layers.
    """
    return _small_cnn(False, classes, widths)


@register("rdi_smallcnn_static")
def rdi_smallcnn_static(classes: int = 10, widths: Sequence[int] = _SMALL_WIDTHS) -> MultiExit:
    """The trunk of `rdi_smallcnn` with its last exit alone. Args as there."""
    return _small_cnn(True, classes, widths)


@register("rdi_resnet38")
def rdi_resnet38(
    classes: int = 10, widths: Sequence[int] = _RESNET_WIDTHS, inside: Sequence[int] | None = None
) -> MultiExit:
    """Three groups of six basic blocks (16, 32, 64 channels), 7 exits, for 3x32x32 images.

    Args:
        classes: classes.
        widths: channels of the three groups.
        inside: channels between the two convolutions of each of the 18 blocks; None: those of the group.
    """
    return _resnet38(False, classes, widths, inside)


@register("rdi_resnet38_static")
def rdi_resnet38_static(
    classes: int = 10, widths: Sequence[int] = _RESNET_WIDTHS, inside: Sequence[int] | None = None
) -> MultiExit:
    """The trunk of `rdi_resnet38` with its last exit alone. Args as there."""
    return _resnet38(True, classes, widths, inside)


@register("rdi_mobilenetv2")
def rdi_mobilenetv2(
    classes: int = 10, widths: Sequence[int] = _MOBILE_WIDTHS, inside: Sequence[int] | None = None
) -> MultiExit:
    """Seventeen inverted blocks between a 3x3 and a 1x1 convolution, 7 exits, for 3x32x32 images.

    Args:
        classes: classes.
        widths: channels of the stem, of the seven groups of blocks, and of the last convolution.
        inside: channels of the 3x3 convolution of each of the 17 blocks; None: six times what the block reads, in the
            first as many as it reads.
    """
    return _mobilenetv2(False, classes, widths, inside)


@register("rdi_mobilenetv2_static")
def rdi_mobilenetv2_static(
    classes: int = 10, widths: Sequence[int] = _MOBILE_WIDTHS, inside: Sequence[int] | None = None
) -> MultiExit:
    """The trunk of `rdi_mobilenetv2` with its last exit alone. Args as there."""
    return _mobilenetv2(True, classes, widths, inside)


def channel_options(net: nn.Module) -> dict[str, list[int]]:
    """``widths`` and ``inside`` of a network of this file, as its layers are now: what builds it again.

    Args:
        net: one of the three, or a static version, whose channels may have been removed.

    Raises:
        InputError: it is none of them.
    """
    name = str((getattr(net, "config", None) or {}).get("name")).removesuffix("_static")
    if not isinstance(net, MultiExit) or name not in _NAMES:
        raise InputError(f"{name} does not take its channels as options; allowed: {', '.join(_NAMES)}")
    layers = [module for module in net.stages.modules() if isinstance(module, nn.Conv2d)]
    if name == "rdi_smallcnn":
        hidden = [module for module in net.heads[-1] if isinstance(module, nn.Linear)]  # type: ignore[attr-defined]
        return {
            "widths": [*(layer.out_channels for layer in layers), *(one.out_features for one in hidden[:-1])]
        }
    if name == "rdi_resnet38":
        blocks = [module for module in net.stages.modules() if isinstance(module, BasicBlock)]
        inside = [block.conv_a.out_channels for block in blocks]
        return {"widths": [block.conv_b.out_channels for block in blocks[5::6]], "inside": inside}
    inverted = [module for module in net.stages.modules() if isinstance(module, InvertedBlock)]
    lasts = accumulate(count for _, count, _, _ in _MOBILE)
    groups = [inverted[last - 1].narrow.out_channels for last in lasts]
    return {
        "widths": [layers[0].out_channels, *groups, layers[-1].out_channels],
        "inside": [block.each.out_channels for block in inverted],
    }
