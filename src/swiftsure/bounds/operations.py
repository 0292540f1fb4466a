"""One small class for each operation a traced network may hold: its value, its interval rule, its transpose.

Every operation but `Relu` is affine in its inputs. An affine operation f(z) = W z + b has three methods:

- ``value(*z)``: f itself, on points (batch, *shape);
- ``radius(*r)``: |W| r, the half-width of f over a box of half-widths r (batch, *shape);
- ``transpose(rows)``: for rows a on f's values, the rows a W on each input's values.

Parameters are read from the live module at each call, so one trace serves a whole training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftsure.bounds.rows import Rows

Shape = tuple[int, ...]


class Affine(Protocol):
    """What bounds need to know of an affine operation."""

    def value(self, *z: Tensor) -> Tensor:
        """The operation on points: (batch, *input shape) each, to (batch, *output shape)."""

    def radius(self, *r: Tensor) -> Tensor:
        """The operation on half-widths: shapes as in `value`, all entries >= 0."""

    def transpose(self, rows: Rows) -> tuple[Rows, ...]:
        """Rows on the output, as rows on each input."""


@dataclass(frozen=True)
class Linear:
    """nn.Linear on the last axis of a flat input."""

    module: nn.Linear

    def value(self, z: Tensor) -> Tensor:
        """W z + b: (batch, in) to (batch, out)."""
        return F.linear(z, self.module.weight, self.module.bias)

    def radius(self, r: Tensor) -> Tensor:
        """|W| r: (batch, in) to (batch, out)."""
        return F.linear(r, self.module.weight.abs())

    def transpose(self, rows: Rows) -> tuple[Rows, ...]:
        """a W."""
        weight = self.module.weight
        values = rows.values @ weight if rows.channel is None else weight.index_select(0, rows.channel)
        return (Rows(values, rows.sample, (self.module.in_features,)),)


@dataclass(frozen=True)
class Conv2d:
    """nn.Conv2d with zero padding: any kernel, stride, dilation and groups."""

    module: nn.Conv2d
    padding: tuple[int, int]
    input_shape: Shape

    def _convolve(self, z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        m = self.module
        return F.conv2d(z, weight, bias, m.stride, self.padding, m.dilation, m.groups)

    def value(self, z: Tensor) -> Tensor:
        """The convolution: (batch, C_in, H, W) to (batch, C_out, H', W')."""
        return self._convolve(z, self.module.weight, self.module.bias)

    def radius(self, r: Tensor) -> Tensor:
        """The convolution with |W| and no bias."""
        return self._convolve(r, self.module.weight.abs(), None)

    def transpose(self, rows: Rows) -> tuple[Rows, ...]:
        """The transposed convolution; inside windows without padding, which moves into the windows' offset."""
        m, (stride_h, stride_w), (pad_h, pad_w) = self.module, self.module.stride, self.padding
        if rows.window is None:
            values = transposed(rows.values, m, self.padding, self.input_shape[1:])
            return (Rows(values, rows.sample, self.input_shape),)
        rows = rows.inside()
        assert rows.window is not None
        if rows.channel is not None and m.groups == 1 and m.dilation == (1, 1):
            # A single unit's coefficients are its kernel.
            kernels = m.weight.permute(0, 2, 3, 1).contiguous().index_select(0, rows.channel)
            values = kernels.permute(0, 3, 1, 2)
        else:
            values = transposed(rows.spread().values, m)
        (step_h, step_w), (top, left) = rows.window.stride, rows.window.offset
        window = rows.window._replace(
            stride=(step_h * stride_h, step_w * stride_w),
            offset=(top * stride_h + pad_h, left * stride_w + pad_w),
        )
        wide = Rows(values, rows.sample, self.input_shape, window, spills=True)
        return (wide.dense() if values[0, 0].numel() >= self.input_shape[1] * self.input_shape[2] else wide,)


@dataclass(frozen=True)
class Scale:
    """scale * z + shift, element by element: batch norm with fixed statistics, normalisation, constants.

    ``read`` returns (scale, shift), each broadcastable to one sample's values (channels first) or None.
    """

    read: Callable[[], tuple[Tensor | None, Tensor | None]]

    def value(self, z: Tensor) -> Tensor:
        """scale * z + shift."""
        scale, shift = self.read()
        z = z if scale is None else z * scale
        return z if shift is None else z + shift

    def radius(self, r: Tensor) -> Tensor:
        """|scale| * r."""
        scale, _ = self.read()
        return r if scale is None else r * scale.abs()

    def transpose(self, rows: Rows) -> tuple[Rows, ...]:
        """a * scale."""
        scale, _ = self.read()
        if scale is None:
            return (rows,)
        rows, scale = rows.spread(), scale.to(rows.values)
        if rows.window is not None and scale.dim() == 3 and scale.shape[1:] == (1, 1):
            return (rows.with_values(rows.values * scale),)
        field = scale.expand(1, *rows.shape)
        alone = replace(rows, sample=None)
        return (rows.with_values(alone.scale(field).values),)


@dataclass(frozen=True)
class Add:
    """z_1 + z_2, or z_1 - z_2."""

    sign: float = 1.0

    def value(self, a: Tensor, b: Tensor) -> Tensor:
        """a + sign * b: equal shapes."""
        return torch.add(a, b, alpha=self.sign)

    def radius(self, a: Tensor, b: Tensor) -> Tensor:
        """a + b."""
        return a + b

    def transpose(self, rows: Rows) -> tuple[Rows, ...]:
        """The same rows for both, negated for the second of a difference."""
        return rows, rows if self.sign == 1 else rows.with_values(-rows.values)


@dataclass(frozen=True)
class Reshape:
    """Flatten, view and reshape of each sample, and operations that leave values as they are (dropout, identity)."""

    input_shape: Shape
    output_shape: Shape

    def value(self, z: Tensor) -> Tensor:
        """(batch, *input_shape) to (batch, *output_shape)."""
        return z.reshape(len(z), *self.output_shape)

    radius = value

    def transpose(self, rows: Rows) -> tuple[Rows, ...]:
        """The same coefficients in the input's shape."""
        return (rows if self.input_shape == self.output_shape else rows.reshape(self.input_shape),)


@dataclass(frozen=True)
class Relu:
    """max(z, 0): the one operation that each technique relaxes in its own way."""


@dataclass(frozen=True)
class Input:
    """The image."""


def transposed(
    values: Tensor, conv: nn.Conv2d, padding: tuple[int, int] = (0, 0), size: tuple[int, ...] | None = None
) -> Tensor:
    """The transpose of a convolution: (rows, C_out, h, w) to (rows, C_in, *size), by default the least size it has.

    For few input channels (the image) torch's transposed convolution is several times slower than a convolution, so
    there each of the stride * stride phases of the result is one, and they are interleaved.
    """
    m = conv
    stride, kernel = m.stride[0], m.kernel_size[0]
    square = m.stride == (stride, stride) and m.kernel_size == (kernel, kernel)
    least = [
        (n - 1) * s - 2 * p + d * (k - 1) + 1
        for n, s, p, d, k in zip(values.shape[2:], m.stride, padding, m.dilation, m.kernel_size, strict=True)
    ]
    # A strided kernel may never reach the last rows and columns of the input: they get zeros.
    beyond = [0, 0] if size is None else [n - k for n, k in zip(size, least, strict=True)]
    if m.in_channels > 4 or m.groups != 1 or m.dilation != (1, 1) or not square or kernel % stride:
        # Channels last halves its time.
        values = values.contiguous(memory_format=torch.channels_last)
        return F.conv_transpose2d(values, m.weight, None, m.stride, padding, beyond, m.groups, m.dilation)
    taps = kernel // stride
    # (C_out, C_in, tap, phase, tap, phase) to kernels (phase, phase, C_in; C_out, tap, tap), flipped.
    weight = m.weight.view(m.out_channels, m.in_channels, taps, stride, taps, stride)
    weight = weight.permute(3, 5, 1, 0, 2, 4).reshape(-1, m.out_channels, taps, taps).flip(2, 3)
    phases = F.conv2d(values, weight, padding=taps - 1)
    rows, _, height, width = phases.shape
    phases = phases.view(rows, stride, stride, m.in_channels, height, width).permute(0, 3, 4, 1, 5, 2)
    result = phases.reshape(rows, m.in_channels, height * stride, width * stride)
    (top, left), (lost_h, lost_w) = padding, beyond
    edges = (-left, lost_w - left, -top, lost_h - top)
    return F.pad(result, edges) if any(edges) else result


Operation = Linear | Conv2d | Scale | Add | Reshape | Relu | Input


def batch_norm(module: nn.modules.batchnorm._BatchNorm, dims: int) -> Scale:
    """Batch norm with its running statistics as a per-channel affine map.

    Args:
        module: the layer; its mode does not matter, population statistics are meant.
        dims: number of axes of one sample's values, channels first.
    """
    shape = (-1,) + (1,) * (dims - 1)

    def read() -> tuple[Tensor, Tensor]:
        mean, variance = module.running_mean, module.running_var
        assert mean is not None and variance is not None
        scale = torch.rsqrt(variance + module.eps)
        if module.weight is not None:
            scale = scale * module.weight
        shift = -mean * scale if module.bias is None else module.bias - mean * scale
        return scale.view(shape), shift.view(shape)

    return Scale(read)


def same_padding(module: nn.Conv2d) -> tuple[int, int] | None:
    """The symmetric zero padding of a convolution, or None where it is not of that kind."""
    padding: Any = module.padding
    if padding == "valid":
        return (0, 0)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return (total[0] // 2, total[1] // 2) if not any(n % 2 for n in total) else None
    return padding[0], padding[1]
