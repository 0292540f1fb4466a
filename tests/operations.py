"""Spellings of every operation in docs/operations.md."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spelling import CHANNELS, SIZE, Spelling, buffer, call, lines, module, parameter, solid, weighed


def normed(norm: nn.Module) -> nn.Module:
    """With random statistics and scales of both signs."""
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.2, 3.0)
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:, :2], x[:, 2:]


def uneven(self: Any, x: Tensor) -> Tensor:
    a, b = x.split([1, 3], 1)
    return torch.cat([b, a], dim=1)


def shuffled(self: Any, x: Tensor) -> Tensor:
    batch, channels, height, width = x.size()
    x = x.view(batch, 2, channels // 2, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(batch, -1, height, width)


def joined_late(self: Any, x: Tensor) -> Tensor:
    features = [x]
    for _ in range(2):
        features.append(self.grow(torch.cat(features, 1)[:, :CHANNELS]))
    return torch.cat(features, 1)


ATTAINED: dict[str, list[Spelling]] = {
    "linear layer, product with a constant matrix": [
        module(lambda: nn.Linear(CHANNELS * SIZE * SIZE, 5), lambda x: x.flatten(1)),
        module(lambda: nn.Linear(SIZE, 3, bias=False)),
        weighed(
            "F.linear", lambda self, x: F.linear(x.flatten(1), self.w, self.b), w=parameter(5, 144), b=parameter(5)
        ),
        weighed(
            "F.linear masked", lambda self, x: F.linear(x, weight=self.w * self.m), w=parameter(3, 6), m=buffer(3, 6)
        ),
        weighed("x @ w", lambda self, x: x @ self.w, w=parameter(SIZE, 3)),
        weighed("torch.matmul", lambda self, x: torch.matmul(x.flatten(1), self.w), w=buffer(144, 3)),
    ],
    "convolution of 1, 2, 3 axes (stride, zero padding, dilation, groups)": [
        module(lambda: nn.Conv2d(CHANNELS, 3, 3)),
        module(lambda: nn.Conv2d(CHANNELS, 6, (3, 2), (2, 1), (1, 2), groups=2, bias=False)),
        module(lambda: nn.Conv2d(CHANNELS, 4, 3, padding=2, dilation=2, groups=4)),
        module(lambda: nn.Conv2d(CHANNELS, 2, 4, padding="same")),
        module(lambda: nn.Conv2d(CHANNELS, 2, (2, 3), padding="same", dilation=(3, 2))),
        module(lambda: nn.Conv2d(CHANNELS, 2, 3, padding="valid")),
        module(lambda: nn.Conv1d(CHANNELS, 3, 3, 2, 1, groups=1), lines),
        module(lambda: nn.Conv3d(2, 2, (1, 3, 3), padding=(0, 1, 1)), solid),
        weighed("F.conv2d", lambda self, x: F.conv2d(x, self.w, self.b, 2, 1), w=parameter(3, 4, 3, 3), b=parameter(3)),
        weighed(
            "F.conv2d same", lambda self, x: F.conv2d(x, self.w, padding="same", groups=2), w=parameter(2, 2, 2, 2)
        ),
        weighed(
            "torch.conv2d",
            lambda self, x: torch.conv2d(x, self.w, None, (1, 2), dilation=(1, 2)),
            w=buffer(3, 4, 3, 2),
        ),
        weighed("F.conv1d", lambda self, x: F.conv1d(lines(x), self.w, stride=3, padding=1), w=parameter(2, 4, 5)),
    ],
    "convolution padded by reflection, replication or wrapping": [
        *(
            module(lambda mode=mode: nn.Conv2d(CHANNELS, 2, 3, 2, (1, 2), padding_mode=mode))
            for mode in ("reflect", "replicate", "circular")
        ),
        module(lambda: nn.Conv2d(CHANNELS, 2, 2, padding="same", padding_mode="reflect")),
        module(lambda: nn.Conv1d(CHANNELS, 4, 4, padding="same", padding_mode="circular", groups=2), lines),
    ],
    "transposed convolution of 1, 2, 3 axes": [
        module(lambda: nn.ConvTranspose2d(CHANNELS, 3, 3)),
        module(lambda: nn.ConvTranspose2d(CHANNELS, 4, 3, 2, 1, output_padding=1, groups=2, dilation=(1, 2))),
        module(lambda: nn.ConvTranspose1d(CHANNELS, 2, 3, stride=2, bias=False), lines),
        module(lambda: nn.ConvTranspose3d(2, 1, 2), solid),
        weighed(
            "F.conv_transpose2d",
            lambda self, x: F.conv_transpose2d(x, self.w, self.b, stride=2, padding=1),
            w=parameter(4, 3, 4, 4),
            b=parameter(3),
        ),
        weighed(
            "F.conv_transpose1d",
            lambda self, x: F.conv_transpose1d(lines(x), self.w, None, 2, 1, 1, 2),
            w=parameter(4, 1, 3),
        ),
    ],
    "batch norm with population statistics": [
        module(lambda: normed(nn.BatchNorm2d(CHANNELS))),
        module(lambda: normed(nn.BatchNorm2d(CHANNELS, affine=False, eps=0.1))),
        module(lambda: normed(nn.BatchNorm1d(CHANNELS)), lines),
        module(lambda: normed(nn.BatchNorm1d(144)), lambda x: x.flatten(1)),
        module(lambda: normed(nn.BatchNorm3d(2)), solid),
        Spelling(
            "F.batch_norm",
            lambda self, x: F.batch_norm(
                x, self.n.running_mean, self.n.running_var, self.n.weight, self.n.bias, self.training, 0.1, 0.5
            ),
            {"n": lambda: normed(nn.BatchNorm2d(CHANNELS))},
        ),
        weighed(
            "written out",
            lambda self, x: x * (self.w * (self.v.square() + 1e-5).rsqrt()).view(1, -1, 1, 1) + self.w[:, None, None],
            w=buffer(CHANNELS),
            v=buffer(CHANNELS),
        ),
    ],
    "average pooling, adaptive average pooling": [
        module(lambda: nn.AvgPool2d(2)),
        module(lambda: nn.AvgPool2d((3, 2), (1, 2), padding=1)),
        module(lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
        module(lambda: nn.AvgPool2d(3, 2, ceil_mode=True, padding=1)),
        module(lambda: nn.AvgPool2d(2, divisor_override=3)),
        module(lambda: nn.AvgPool1d(3, 2, 1), lines),
        module(lambda: nn.AvgPool3d((1, 2, 2)), solid),
        module(lambda: nn.AdaptiveAvgPool2d(1)),
        module(lambda: nn.AdaptiveAvgPool2d((4, None))),
        module(lambda: nn.AdaptiveAvgPool2d(7)),
        module(lambda: nn.AdaptiveAvgPool1d(5), lines),
        call("F.avg_pool2d", lambda x: F.avg_pool2d(x, 3, 1, 1)),
        call("F.avg_pool2d keywords", lambda x: F.avg_pool2d(x, kernel_size=2, count_include_pad=False, padding=1)),
        call("F.avg_pool1d", lambda x: F.avg_pool1d(lines(x), 4)),
        call("F.adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x, (1, 1))),
        call("F.adaptive_avg_pool2d uneven", lambda x: F.adaptive_avg_pool2d(x, output_size=4)),
    ],
    "mean and sum over axes": [
        call("x.mean([2, 3])", lambda x: x.mean([2, 3])),
        call("x.mean((2, 3), keepdim=True)", lambda x: x.mean((2, 3), keepdim=True)),
        call("x.mean(-1).mean(-1)", lambda x: x.mean(-1).mean(-1)),
        call("torch.mean", lambda x: torch.mean(x, dim=1)),
        call("x.sum(1)", lambda x: x.sum(1)),
        call("torch.sum", lambda x: torch.sum(x, (1, -1), True)),
    ],
    "sum and difference of two values": [
        call("a + b", lambda x: operator.add(*halves(x))),
        call("a - b", lambda x: operator.sub(*halves(x))),
        call("a += b", lambda x: operator.iadd(x[:, :2] * 1.0, x[:, 2:])),
        call("torch.add alpha", lambda x: torch.add(x[:, :2], x[:, 2:], alpha=-3)),
        call("torch.sub alpha", lambda x: torch.sub(x[:, :2], x[:, 2:], alpha=0.5)),
        call("torch.rsub", lambda x: torch.rsub(x[:, :2], x[:, 2:], alpha=2)),
        call("a.sub(b)", lambda x: x[:, :2].sub(x[:, 2:])),
        call("of unlike shapes", lambda x: x[:, :1] - x[:, 1:]),
        call("with a mean", lambda x: x[:, :2] + x[:, 2:].mean((2, 3), keepdim=True)),
        call("sum([a, b])", lambda x: sum(halves(x))),
    ],
    "sum, difference, product, quotient with a constant; minus": [
        call("-x", lambda x: -x),
        call("torch.neg", torch.neg),
        call("2 - x", lambda x: 2 - x),
        call("1 + 2 * x / 3 - 0.5", lambda x: 1 + 2 * x / 3 - 0.5),
        call("x.mul(-2).add(1, alpha=3)", lambda x: x.mul(-2).add(1, alpha=3)),
        call("x.div_(4)", lambda x: x.mul(1).div_(4).sub_(1).mul_(2).add_(3)),
        call("torch.rsub", lambda x: torch.rsub(x, 1, alpha=2)),
        call("x / x.shape[1]", lambda x: x / x.shape[1]),
        weighed("x * w", lambda self, x: x * self.w, w=parameter(CHANNELS, 1, 1)),
        weighed("w * x, each value", lambda self, x: self.w * x, w=parameter(1, CHANNELS, SIZE, SIZE)),
        weighed("x * w, last axis", lambda self, x: x * self.w, w=parameter(SIZE)),
        weighed("x - w", lambda self, x: x - self.w, w=buffer(1, CHANNELS, 1, 1)),
        weighed("w - x", lambda self, x: torch.sub(self.w, x, alpha=2), w=buffer(SIZE, 1)),
        weighed("x / w", lambda self, x: x / (self.w.abs() + 1), w=buffer(CHANNELS, 1, 1)),
        weighed("wider than x", lambda self, x: x[:, :1] * self.w + self.b, w=buffer(3, 1, 1), b=parameter(1, 1, 1)),
    ],
    "flatten, view, reshape, squeeze, dropout, identity": [
        module(nn.Flatten),
        module(lambda: nn.Unflatten(1, (2, 2))),
        module(nn.Identity),
        module(nn.Dropout2d),
        module(lambda: nn.AlphaDropout(0.3)),
        Spelling("F.dropout", lambda self, x: F.dropout(x, 0.4, self.training), {}),
        Spelling("F.dropout2d", lambda self, x: F.dropout2d(x, training=self.training, p=0.2), {}),
        call("x.view(size(0), -1)", lambda x: x.view(x.size(0), -1)),
        call("x.view(size(0), 2, -1, size(3))", lambda x: x.view(x.size(0), 2, -1, x.size(3))),
        call("reshape like", lambda x: x.flatten(1).reshape(x.shape)),
        call("flatten, unflatten", lambda x: torch.flatten(x, 1).unflatten(1, (-1, 12))),
        call("squeeze, unsqueeze", lambda x: x.unsqueeze(1).squeeze(1)[:, :, None].squeeze(2)),
        call("mean, squeeze", lambda x: F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1)),
        call("clone, contiguous", lambda x: x.clone().contiguous().to(x.dtype)),
    ],
    "permute, transpose, flip, roll, pixel and channel shuffle": [
        call("x.permute", lambda x: x.permute(0, 2, 3, 1)),
        call("torch.permute", lambda x: torch.permute(x, (0, 3, 1, 2))),
        call("x.transpose", lambda x: x.transpose(1, -1)),
        call("torch.transpose", lambda x: torch.transpose(x, 2, 3).flatten(1)),
        call("movedim", lambda x: torch.movedim(x, 1, -1)),
        call("flip", lambda x: x.flip(2, 3)),
        call("roll", lambda x: torch.roll(x, (1, 2), (1, 3))),
        Spelling("channel shuffle by hand", shuffled),
        module(lambda: nn.ChannelShuffle(2)),
        module(lambda: nn.PixelShuffle(2)),
        call("F.pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 3)),
    ],
    "slice, select, narrow, chunk, split, unbind": [
        call("x[:, 1:3]", lambda x: x[:, 1:3]),
        call("x[:, :, ::2, 1::2]", lambda x: x[:, :, ::2, 1::2]),
        call("x[..., -1]", lambda x: x[..., -1]),
        call("x[:, None, 0]", lambda x: x[:, None, 0]),
        call("x[:, [0, 0, 3]]", lambda x: x[:, [0, 0, 3]]),
        call("x[:, :size // 2]", lambda x: x[:, : x.size(1) // 2]),
        call("x.select", lambda x: x.select(2, 1)),
        call("narrow", lambda x: torch.narrow(x, 3, 1, 4)),
        call("a branch on shapes", lambda x: x[:, :2] if x.shape[-1] > 3 and x.ndim == 4 else -x),
        call("chunk", lambda x: x.chunk(2, 1)[1]),
        call("torch.chunk", lambda x: torch.chunk(x, chunks=3, dim=3)[2]),
        Spelling("split", uneven),
        call("split of size", lambda x: torch.split(x, x.shape[1] // 2, 1)[0]),
        call("unbind", lambda x: x.unbind(1)[-1]),
        weighed("index_select", lambda self, x: torch.index_select(x, 1, self.i), i=lambda: torch.tensor([3, 1])),
    ],
    "cat, stack": [
        call("torch.cat channels", lambda x: torch.cat([x[:, 2:], x[:, :1]], 1)),
        call("torch.cat lines", lambda x: torch.cat((x[:, :2], x[:, 2:]), dim=-1)),
        call("torch.cat flat", lambda x: torch.cat(tensors=[x[:, :2].flatten(1), x[:, 2].flatten(1)], dim=1)),
        call("torch.concat", lambda x: torch.concat([x[:, :2], x[:, 2:]], 2)),
        call("torch.stack", lambda x: torch.stack([x[:, 0], x[:, 1], x[:, 3]], 1)),
        call("torch.stack last", lambda x: torch.stack(halves(x), -1)),
    ],
    "padding by a constant, reflection, replication, wrapping": [
        call("F.pad", lambda x: F.pad(x, (1, 2, 0, 1))),
        call("F.pad value", lambda x: F.pad(x, [1, 1], value=-2.5)),
        call("F.pad channels", lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 2), "constant", 0)),
        call("F.pad cuts", lambda x: F.pad(x, (-1, 1, -2, 0))),
        call("F.pad reflect", lambda x: F.pad(x, (2, 1, 0, 2), mode="reflect")),
        call("F.pad circular", lambda x: F.pad(x, (1, 1, 1, 1), "circular")),
        module(lambda: nn.ZeroPad2d((1, 0, 2, 1))),
        module(lambda: nn.ConstantPad2d(1, 3.0)),
        module(lambda: nn.ConstantPad1d(2, -1.0), lines),
        module(lambda: nn.ReflectionPad2d(2)),
        module(lambda: nn.ReplicationPad2d((1, 2, 3, 0))),
        module(lambda: nn.CircularPad2d(1)),
        module(lambda: nn.ReplicationPad1d(3), lines),
    ],
    "expand, repeat, upsampling (nearest, linear), fold, unfold": [
        call("expand", lambda x: x[:, :1].expand(-1, 3, -1, -1)),
        call("expand size(0)", lambda x: x[:, 1:2].expand(x.size(0), 2, SIZE, SIZE)),
        call("repeat", lambda x: x.repeat(1, 2, 1, 1)),
        call("repeat_interleave", lambda x: torch.repeat_interleave(x, 2, dim=2)),
        module(lambda: nn.Upsample(scale_factor=2)),
        module(lambda: nn.Upsample(size=(5, 9), mode="bilinear", align_corners=True)),
        module(lambda: nn.Upsample(scale_factor=3, mode="linear"), lines),
        module(lambda: nn.UpsamplingBilinear2d(scale_factor=2)),
        call("F.interpolate", lambda x: F.interpolate(x, scale_factor=1.5, mode="bilinear")),
        call("F.interpolate nearest", lambda x: F.interpolate(x, size=4)),
        module(lambda: nn.Unfold(3, stride=2)),
        call("F.fold", lambda x: F.fold(x.flatten(2)[:, :, :9], (4, 4), 2)),
    ],
}  # fmt: skip
"""Operations whose bounds are exact under every technique."""

SHAPES_OF_POOLS: list[Spelling] = [
    module(lambda: nn.MaxPool2d(2)),
    module(lambda: nn.MaxPool2d(3, 2, 1)),
    module(lambda: nn.MaxPool2d((2, 3), (1, 2), (1, 0), (1, 2))),
    module(lambda: nn.MaxPool2d(3, 2, ceil_mode=True)),
    module(lambda: nn.MaxPool1d(4, 3, 1), lines),
    module(lambda: nn.AdaptiveMaxPool2d(3)),
    module(lambda: nn.AdaptiveMaxPool2d((4, 1))),
    module(lambda: nn.AdaptiveMaxPool1d(5), lines),
    call("F.max_pool2d", lambda x: F.max_pool2d(x, 2)),
    call("F.max_pool2d positional", lambda x: F.max_pool2d(x, 3, 2, 1, 1, True)),
    call("F.max_pool2d keywords", lambda x: F.max_pool2d(x, kernel_size=(3, 3), stride=1, padding=1)),
    call("torch.max_pool2d", lambda x: torch.max_pool2d(x, 2)),
    call("F.max_pool1d", lambda x: F.max_pool1d(lines(x), 2, 1)),
    call("F.adaptive_max_pool2d", lambda x: F.adaptive_max_pool2d(x, 1)),
    call("x.amax", lambda x: x.amax((2, 3))),
    call("torch.amax", lambda x: torch.amax(x, dim=(-1, -2), keepdim=True)),
]

BENT: dict[str, list[Spelling]] = {
    "max pooling of 1, 2 axes, adaptive max pooling, amax": SHAPES_OF_POOLS,
    "ReLU, leaky ReLU": [
        module(nn.ReLU),
        module(lambda: nn.LeakyReLU(0.2)),
        module(lambda: nn.LeakyReLU(1.5)),
        call("F.relu", F.relu),
        call("F.relu in place", lambda x: F.relu(x * 1, inplace=True)),
        call("torch.relu", torch.relu),
        call("x.relu_", lambda x: (x + 0).relu_()),
        call("F.leaky_relu", F.leaky_relu),
        call("F.leaky_relu slope", lambda x: F.leaky_relu(x, negative_slope=0.3)),
    ],
    "clamp, hardtanh, ReLU6, maximum and minimum with a number": [
        module(nn.ReLU6),
        module(lambda: nn.Hardtanh(-0.4, 1.2, inplace=False)),
        call("F.relu6", F.relu6),
        call("F.hardtanh", lambda x: F.hardtanh(x, 0.0, 2.0)),
        call("torch.clamp", lambda x: torch.clamp(x, -1, 0.5)),
        call("x.clamp(min=)", lambda x: x.clamp(min=0.1)),
        call("x.clamp(max=)", lambda x: x.clamp(max=0.1)),
        call("x.clamp_", lambda x: (x * 1).clamp_(-1, 1)),
        call("x.clip", lambda x: x.clip(-0.3, 0.2)),
        call("x.clamp_min", lambda x: x.clamp_min(-0.5)),
        call("torch.clamp_max", lambda x: torch.clamp_max(x, 0.7)),
        call("torch.maximum", lambda x: torch.maximum(x, torch.tensor(0.25))),
        call("torch.minimum", lambda x: torch.minimum(x, torch.tensor(0.0))),
    ],
    "hardsigmoid, hardswish": [
        module(nn.Hardsigmoid),
        module(nn.Hardswish),
        call("F.hardsigmoid", F.hardsigmoid),
        call("F.hardswish", lambda x: F.hardswish(2 * x)),
    ],
    "sigmoid, tanh, softplus": [
        module(nn.Sigmoid),
        module(nn.Tanh),
        module(nn.Softplus),
        call("torch.sigmoid", torch.sigmoid),
        call("x.sigmoid", lambda x: x.sigmoid()),
        call("torch.tanh", torch.tanh),
        call("x.tanh_", lambda x: (x * 1).tanh_()),
        call("F.softplus", F.softplus),
        call("F.softplus beyond its threshold", lambda x: F.softplus(20 + x)),
    ],
    "GELU, SiLU": [
        module(nn.GELU),
        module(nn.SiLU),
        call("F.gelu", F.gelu),
        call("F.silu", F.silu),
    ],
}
"""Operations that are exact over a box alone."""

REFUSED: dict[str, list[Spelling]] = {
    "product or quotient of two values, power": [
        call("x * x", lambda x: x * x, "depend on the image"),
        call("1 / x", lambda x: 1 / (x + 9), "divisor"),
        call("x / x", lambda x: x / (x.mean((2, 3), keepdim=True) + 9), "divisor"),
        call("x ** 2", lambda x: x**2),
        call("matmul", lambda x: x @ x.transpose(2, 3), "constant matrix"),
        weighed("conv by x", lambda self, x: F.conv2d(self.w, x), "'conv2d'", w=buffer(3, 4, 6, 6)),
    ],
    "softmax, log-softmax": [
        module(lambda: nn.Softmax(1), line="Softmax"),
        call("F.log_softmax", lambda x: F.log_softmax(x, 1), "sum over classes"),
        call("x.softmax", lambda x: x.softmax(1), "sum over classes"),
    ],
    "layer, group and instance norm; batch norm with batch statistics": [
        module(lambda: nn.LayerNorm(SIZE), line="statistics"),
        module(lambda: nn.GroupNorm(2, CHANNELS), line="statistics"),
        module(lambda: nn.InstanceNorm2d(CHANNELS), line="statistics"),
        module(lambda: nn.BatchNorm2d(CHANNELS, track_running_stats=False), line="track_running_stats"),
        call("F.layer_norm", lambda x: F.layer_norm(x, (SIZE,)), "statistics"),
        call("F.batch_norm", lambda x: F.batch_norm(x, None, None, training=True), "statistics"),
    ],
    "GELU by tanh, PReLU, ELU, leaky ReLU of a slope below 0, softplus of another beta": [
        module(lambda: nn.GELU("tanh"), line="approximate='none'"),
        call("F.gelu", lambda x: F.gelu(x, approximate="tanh"), "approximate='none'"),
        module(nn.PReLU, line="LeakyReLU"),
        module(nn.ELU, line="ELU"),
        module(lambda: nn.LeakyReLU(-0.1), line="below 0"),
        call("F.softplus", lambda x: F.softplus(x, 2), "beta=1"),
        call("torch.sin", torch.sin, "'sin'"),
        weighed("x.clamp of a tensor", lambda self, x: x.clamp(self.low), "tensor", low=buffer(1)),
        weighed("torch.maximum of a buffer", lambda self, x: torch.maximum(x, self.low), "number", low=buffer(1)),
    ],
    "bicubic upsampling, max pooling with indices or of 3 axes": [
        module(lambda: nn.Upsample(scale_factor=2, mode="bicubic"), line="signs"),
        module(lambda: nn.MaxPool3d(2), solid, line="MaxPool3d"),
        call("F.interpolate", lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), "signs"),
        call("x.max", lambda x: x.amax(1), "both axes"),
        call("F.max_pool2d", lambda x: F.max_pool2d(x[:, :, :2, :2], 2, 1, 1, dilation=3), "padding alone"),
    ],
    "dropout that stays on, shapes that mix samples, what depends on how many there are": [
        call("F.dropout", F.dropout, "training"),
        call("x.flip(0)", lambda x: x.flip(0), "mixes the samples"),
        call("x.roll", lambda x: x.roll(1), "mixes the samples"),
        call("x - x.mean(0)", lambda x: x - x.mean(0, keepdim=True), "mixes the samples"),
        call("x.transpose(0, 1)", lambda x: x.transpose(0, 1), "mixes the samples"),
        call("a branch on len(x)", lambda x: x if x.size(0) > 2 else -x, "number of images"),
        call("a branch on x", lambda x: x if x.sum() > 0 else -x, "branches on data"),
        call("x / len(x)", lambda x: x / x.size(0), "number of images"),
        call("x * zeros_like", lambda x: x + torch.ones_like(x), "ones_like"),
        call("rounding", lambda x: torch.div(x, 2, rounding_mode="floor"), "rounding_mode"),
        call("double", lambda x: x.double().float(), "float64"),
        call("x.item()", lambda x: x * x[0, 0, 0, 0].item(), ""),
    ],
}  # fmt: skip
"""Operations that must be refused in one line."""
