"""The spellings of every operation: modules, functions and tensor methods, and the rule for each."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from swiftsure.bounds import operations as ops
from swiftsure.bounds.tracing.activations import (
    activation,
    clamp,
    clamp_one_side,
    gelu,
    leaky_relu,
    refused,
    softplus,
)
from swiftsure.bounds.tracing.calls import Rule
from swiftsure.bounds.tracing.layers import batch_norm, convolution, linear, matmul, transposed_convolution
from swiftsure.bounds.tracing.order import (
    PADDINGS,
    arrange,
    cat,
    dropout,
    expand,
    getitem,
    pad,
    same,
    split,
    stack,
    upsample,
)
from swiftsure.bounds.tracing.pools import adaptive_max_pool, average_pool, largest, max_pool
from swiftsure.bounds.tracing.sums import add, divide, multiply, negative, subtract, subtract_from

_RELU6 = activation(lambda: ops.clamp(0.0, 6.0))
_HARDTANH = clamp("min_val", "max_val", -1.0, 1.0)
_CLAMP = clamp("min", "max", None, None)
_STATISTICS = refused("it divides by statistics of the image")
_SOFTMAX = refused("it divides by a sum over classes; bounds are of logits")

MODULES: dict[type[nn.Module], Rule] = {
    nn.Linear: linear,
    nn.Conv1d: convolution(1), nn.Conv2d: convolution(2), nn.Conv3d: convolution(3),
    nn.ConvTranspose1d: transposed_convolution(1), nn.ConvTranspose2d: transposed_convolution(2),
    nn.ConvTranspose3d: transposed_convolution(3),
    nn.BatchNorm1d: batch_norm, nn.BatchNorm2d: batch_norm, nn.BatchNorm3d: batch_norm, nn.SyncBatchNorm: batch_norm,
    nn.Identity: same, nn.Flatten: same, nn.Unflatten: same,
    nn.Dropout: dropout, nn.Dropout1d: dropout, nn.Dropout2d: dropout, nn.Dropout3d: dropout,
    nn.AlphaDropout: dropout, nn.FeatureAlphaDropout: dropout,
    nn.AvgPool1d: average_pool(1), nn.AvgPool2d: average_pool(2), nn.AvgPool3d: average_pool(3),
    nn.AdaptiveAvgPool1d: arrange, nn.AdaptiveAvgPool2d: arrange, nn.AdaptiveAvgPool3d: arrange,
    nn.MaxPool1d: max_pool(1), nn.MaxPool2d: max_pool(2),
    nn.AdaptiveMaxPool1d: adaptive_max_pool(1), nn.AdaptiveMaxPool2d: adaptive_max_pool(2),
    nn.PixelShuffle: arrange, nn.PixelUnshuffle: arrange, nn.ChannelShuffle: arrange,
    nn.Fold: arrange, nn.Unfold: arrange,
    nn.Upsample: upsample, nn.UpsamplingNearest2d: upsample, nn.UpsamplingBilinear2d: upsample,
    **dict.fromkeys(PADDINGS, pad),
    nn.ReLU: activation(ops.Relu), nn.ReLU6: _RELU6, nn.LeakyReLU: leaky_relu, nn.Hardtanh: _HARDTANH,
    nn.Hardsigmoid: activation(ops.hardsigmoid), nn.Hardswish: activation(ops.hardswish),
    nn.Sigmoid: activation(ops.sigmoid), nn.Tanh: activation(ops.tanh), nn.SiLU: activation(ops.silu),
    nn.GELU: gelu, nn.Softplus: softplus,
    nn.PReLU: refused("its slopes are learnt; LeakyReLU has a rule"),
    nn.Softmax: _SOFTMAX, nn.Softmax2d: _SOFTMAX, nn.LogSoftmax: _SOFTMAX,
    nn.LayerNorm: _STATISTICS, nn.GroupNorm: _STATISTICS, nn.LocalResponseNorm: _STATISTICS,
    nn.InstanceNorm1d: _STATISTICS, nn.InstanceNorm2d: _STATISTICS, nn.InstanceNorm3d: _STATISTICS,
}  # fmt: skip

# a += b is traced as a + b; F.sigmoid, F.tanh and F.upsample as what they call.
FUNCTIONS: dict[Any, Rule] = {
    # Layers
    F.linear: linear, torch.matmul: matmul, operator.matmul: matmul,
    F.conv1d: convolution(1), F.conv2d: convolution(2), F.conv3d: convolution(3),
    F.conv_transpose1d: transposed_convolution(1), F.conv_transpose2d: transposed_convolution(2),
    F.conv_transpose3d: transposed_convolution(3),
    F.batch_norm: batch_norm,
    # Shape and order
    F.dropout: dropout, F.dropout1d: dropout, F.dropout2d: dropout, F.dropout3d: dropout, F.alpha_dropout: dropout,
    torch.flatten: same, torch.reshape: same, torch.squeeze: same, torch.unsqueeze: same,
    torch.unflatten: same, torch.clone: same,
    torch.permute: arrange, torch.transpose: arrange, torch.swapaxes: arrange, torch.movedim: arrange,
    torch.flip: arrange, torch.roll: arrange, torch.narrow: arrange, torch.select: arrange,
    torch.index_select: arrange, torch.tile: arrange, torch.repeat_interleave: arrange,
    torch.chunk: split, torch.split: split, torch.unbind: split, operator.getitem: getitem,
    torch.cat: cat, torch.concat: cat, torch.stack: stack,
    F.pad: pad, F.interpolate: upsample,
    F.pixel_shuffle: arrange, F.pixel_unshuffle: arrange, torch.channel_shuffle: arrange,
    F.fold: arrange, F.unfold: arrange,
    # Sums and products
    operator.add: add, torch.add: add,
    operator.sub: subtract, torch.sub: subtract, torch.subtract: subtract,
    torch.rsub: subtract_from, operator.neg: negative, torch.neg: negative,
    operator.mul: multiply, torch.mul: multiply, torch.multiply: multiply,
    operator.truediv: divide, torch.div: divide, torch.divide: divide,
    torch.true_divide: divide,
    # Pooling
    torch.mean: arrange, torch.sum: arrange, torch.amax: largest,
    F.avg_pool1d: average_pool(1), F.avg_pool2d: average_pool(2), F.avg_pool3d: average_pool(3),
    F.adaptive_avg_pool1d: arrange, F.adaptive_avg_pool2d: arrange, F.adaptive_avg_pool3d: arrange,
    F.max_pool1d: max_pool(1), F.max_pool2d: max_pool(2), torch.max_pool1d: max_pool(1), torch.max_pool2d: max_pool(2),
    F.adaptive_max_pool1d: adaptive_max_pool(1), F.adaptive_max_pool2d: adaptive_max_pool(2),
    # Activations
    F.relu: activation(ops.Relu), torch.relu: activation(ops.Relu), torch.relu_: activation(ops.Relu),
    F.relu_: activation(ops.Relu), F.relu6: _RELU6, F.leaky_relu: leaky_relu, F.leaky_relu_: leaky_relu,
    F.hardtanh: _HARDTANH, F.hardtanh_: _HARDTANH,
    torch.clamp: _CLAMP, torch.clip: _CLAMP, torch.clamp_min: clamp_one_side("min"),
    torch.clamp_max: clamp_one_side("max"), torch.maximum: clamp_one_side("maximum"),
    torch.minimum: clamp_one_side("minimum"),
    F.hardsigmoid: activation(ops.hardsigmoid), F.hardswish: activation(ops.hardswish),
    torch.sigmoid: activation(ops.sigmoid), torch.sigmoid_: activation(ops.sigmoid),
    torch.tanh: activation(ops.tanh), torch.tanh_: activation(ops.tanh),
    F.silu: activation(ops.silu), F.gelu: gelu, F.softplus: softplus,
    F.softmax: _SOFTMAX, torch.softmax: _SOFTMAX, F.log_softmax: _SOFTMAX, torch.log_softmax: _SOFTMAX,
    F.layer_norm: _STATISTICS, F.group_norm: _STATISTICS, F.instance_norm: _STATISTICS,
}  # fmt: skip

METHODS: dict[str, Rule] = {
    **dict.fromkeys(
        ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "view_as", "reshape_as"),
        same,
    ),
    **dict.fromkeys(("clone", "to", "float", "double", "type"), same),
    **dict.fromkeys(
        ("permute", "transpose", "swapaxes", "movedim", "flip", "roll", "narrow", "select", "index_select", "repeat",
         "tile", "repeat_interleave", "mean", "sum"), arrange
    ),
    **dict.fromkeys(("chunk", "split", "unbind"), split),
    "expand": expand, "expand_as": expand, "amax": largest, "matmul": matmul,
    **dict.fromkeys(("add", "add_"), add), **dict.fromkeys(("sub", "sub_"), subtract),
    **dict.fromkeys(("neg", "neg_"), negative), **dict.fromkeys(("mul", "mul_"), multiply),
    **dict.fromkeys(("div", "div_"), divide),
    **dict.fromkeys(("relu", "relu_"), activation(ops.Relu)),
    **dict.fromkeys(("clamp", "clamp_", "clip", "clip_"), _CLAMP),
    **dict.fromkeys(("clamp_min", "clamp_min_"), clamp_one_side("min")),
    **dict.fromkeys(("clamp_max", "clamp_max_"), clamp_one_side("max")),
    "maximum": clamp_one_side("maximum"), "minimum": clamp_one_side("minimum"),
    **dict.fromkeys(("sigmoid", "sigmoid_"), activation(ops.sigmoid)),
    **dict.fromkeys(("tanh", "tanh_"), activation(ops.tanh)),
    "softmax": _SOFTMAX, "log_softmax": _SOFTMAX,
}  # fmt: skip
"""Tensor methods; rules read their arguments in the functions' order."""
