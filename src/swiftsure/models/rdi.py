"""The three networks of RDI-Nets (Hu et al. 2020, as in its released code), and their static versions of one exit.

A static version is the same trunk without branches: what RDI-Nets are compared with.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from swiftsure.exits.multi_exit import MultiExit
from swiftsure.models.layers import Normalize
from swiftsure.models.mixtrain import MNIST_STATISTICS
from swiftsure.models.registry import register

_CIFAR = ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616])
_MNIST_SHAPE, _CIFAR_SHAPE = (1, 28, 28), (3, 32, 32)


class BasicBlock(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)), 3x3 convolutions without bias.

    Args:
        channels_in, channels_out: channels.
        stride: of the first convolution.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv_a = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.norm_a = nn.BatchNorm2d(channels_out)
        self.relu_a = nn.ReLU()
        self.conv_b = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
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
        expand: how many times more channels inside.
        stride: of the 3x3 convolution; at 1 the input is added, by a 1x1 projection where channels differ.
    """

    def __init__(self, channels_in: int, channels_out: int, expand: int, stride: int) -> None:
        super().__init__()
        inside = expand * channels_in
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
        if self.adds and channels_in != channels_out:
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


def _small_cnn(static: bool, classes: int) -> MultiExit:
    trunk = [
        nn.Sequential(Normalize(*MNIST_STATISTICS), nn.Conv2d(1, 32, 3), nn.ReLU()),
        nn.Sequential(nn.Conv2d(32, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3), nn.ReLU()),
        nn.Sequential(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
    ]

    def branch(*pooled: nn.Module, features: int) -> nn.Sequential:
        hidden = (nn.Linear(features, 200), nn.Dropout(0.5), nn.Linear(200, 200))
        return nn.Sequential(*pooled, nn.Flatten(), *hidden, nn.Linear(200, classes))

    last = nn.Linear(200, classes)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    heads = [
        branch(nn.Conv2d(32, 16, 3, 2), nn.MaxPool2d(2), features=576),
        branch(nn.MaxPool2d(2), features=1600),
        nn.Sequential(nn.Linear(1024, 200), nn.ReLU(), nn.Dropout(0.5), nn.Linear(200, 200), nn.ReLU(), last),
    ]
    return _network(trunk, heads, static, _MNIST_SHAPE, classes)


def _resnet38(static: bool, classes: int) -> MultiExit:
    blocks: list[nn.Module] = []
    channels = 16
    for group, width in enumerate((16, 32, 64)):
        for number in range(6):
            blocks.append(BasicBlock(channels, width, 2 if group > 0 and number == 0 else 1))
            channels = width
    # Taps after blocks 1 and 4, from 0, of each group.
    ends = [6 * group + number + 1 for group in range(3) for number in (1, 4)]
    trunk = [nn.Sequential(*blocks[a:b]) for a, b in zip([0, *ends], [*ends, 18], strict=True)]
    stem = (
        Normalize(*_CIFAR),
        nn.Conv2d(3, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
    )
    trunk[0] = nn.Sequential(*stem, *trunk[0])

    def early() -> nn.Sequential:
        return nn.Sequential(
            *(nn.MaxPool2d(2), nn.Conv2d(16, 64, 5, 1, 2, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.MaxPool2d(2), nn.Conv2d(64, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32)),
            *_pooled_linear(32, classes),
        )

    def middle() -> nn.Sequential:
        return nn.Sequential(nn.MaxPool2d(2), BasicBlock(32, 32), *_pooled_linear(32, classes))

    def late() -> nn.Sequential:
        return nn.Sequential(*_pooled_linear(64, classes))

    heads = [early(), early(), middle(), middle(), late(), late(), late()]
    return _network(trunk, heads, static, _CIFAR_SHAPE, classes)


# Expansion, channels, blocks, stride of the first: strides for 32x32 images, as is usual on CIFAR.
_MOBILE = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _mobilenetv2(static: bool, classes: int) -> MultiExit:
    blocks: list[nn.Module] = []
    channels = 32
    for expand, width, count, stride in _MOBILE:
        for number in range(count):
            blocks.append(InvertedBlock(channels, width, expand, stride if number == 0 else 1))
            channels = width
    # The paper's layers 2, 5, 8, 10, 13, 16 count the stem as the first.
    ends = [layer - 1 for layer in (2, 5, 8, 10, 13, 16)]
    trunk = [nn.Sequential(*blocks[a:b]) for a, b in zip([0, *ends], [*ends, len(blocks)], strict=True)]
    stem = (Normalize(*_CIFAR), nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    trunk[0] = nn.Sequential(*stem, *trunk[0])
    trunk[-1] = nn.Sequential(
        *trunk[-1], nn.Conv2d(320, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU()
    )
    heads = [
        nn.Sequential(
            *(InvertedBlock(16, 32, 6, 2), nn.BatchNorm2d(32), nn.ReLU()),
            *(InvertedBlock(32, 64, 6, 2), nn.BatchNorm2d(64)),
            *_pooled_linear(64, classes),
        ),
        nn.Sequential(InvertedBlock(32, 32, 6, 2), *_pooled_linear(32, classes)),
        *(nn.Sequential(*_pooled_linear(width, classes)) for width in (64, 64, 96, 160, 1280)),
    ]
    return _network(trunk, heads, static, _CIFAR_SHAPE, classes)


@register("rdi_smallcnn")
def rdi_smallcnn(classes: int = 10) -> MultiExit:
    """Four 3x3 convolutions without padding and three linear layers, 3 exits, for 1x28x28 images."""
    return _small_cnn(False, classes)


@register("rdi_smallcnn_static")
def rdi_smallcnn_static(classes: int = 10) -> MultiExit:
    """The trunk of `rdi_smallcnn` with its last exit alone."""
    return _small_cnn(True, classes)


@register("rdi_resnet38")
def rdi_resnet38(classes: int = 10) -> MultiExit:
    """Three groups of six basic blocks (16, 32, 64 channels), 7 exits, for 3x32x32 images."""
    return _resnet38(False, classes)


@register("rdi_resnet38_static")
def rdi_resnet38_static(classes: int = 10) -> MultiExit:
    """The trunk of `rdi_resnet38` with its last exit alone."""
    return _resnet38(True, classes)


@register("rdi_mobilenetv2")
def rdi_mobilenetv2(classes: int = 10) -> MultiExit:
    """Seventeen inverted blocks between a 3x3 and a 1x1 convolution, 7 exits, for 3x32x32 images."""
    return _mobilenetv2(False, classes)


@register("rdi_mobilenetv2_static")
def rdi_mobilenetv2_static(classes: int = 10) -> MultiExit:
    """The trunk of `rdi_mobilenetv2` with its last exit alone."""
    return _mobilenetv2(True, classes)
