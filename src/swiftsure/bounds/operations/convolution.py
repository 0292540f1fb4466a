"""Convolutions of maps, and average pooling as one: rows that stand on single units stay inside windows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from swiftsure.bounds.operations.affine import Read, Shape
from swiftsure.bounds.rows import Rows

Pair = tuple[int, int]


@dataclass(frozen=True)
class Conv2d:
    """A convolution with zero padding: any kernel, stride, dilation and groups.

    Args:
        read: weight (C_out, C_in / groups, *kernel) and bias (C_out,).
        kernel, stride, padding, dilation: pairs, rows first.
        groups: as in F.conv2d.
        input_shape: (C_in, height, width).
    """

    read: Read
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    input_shape: Shape

    def value(self, z: Tensor) -> Tensor:
        """The convolution: (batch, C_in, H, W) to (batch, C_out, H', W')."""
        return F.conv2d(z, *self.read(), self.stride, self.padding, self.dilation, self.groups)

    def radius(self, r: Tensor) -> Tensor:
        """The convolution with |W| and no bias."""
        weight = self.read()[0].abs()
        return F.conv2d(r, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def transpose(self, rows: Rows) -> tuple[Rows, ...]:
        """The transposed convolution; inside windows without padding, which moves into the windows' offset."""
        weight = self.read()[0]
        if rows.window is None:
            rows = rows.spread()
            return (rows.onto(self._transposed(rows.values, weight, whole=True), self.input_shape),)
        rows = rows.inside()
        assert rows.window is not None
        if rows.channel is not None and self.groups == 1 and self.dilation == (1, 1):
            # A single unit's coefficients are its kernel.
            kernels = weight.permute(0, 2, 3, 1).contiguous().index_select(0, rows.channel)
            values = kernels.permute(0, 3, 1, 2)
        else:
            rows = rows.spread()
            values = self._transposed(rows.values, weight)
        assert rows.window is not None
        (step_h, step_w), (top, left) = rows.window.stride, rows.window.offset
        (stride_h, stride_w), (pad_h, pad_w) = self.stride, self.padding
        window = rows.window._replace(
            stride=(step_h * stride_h, step_w * stride_w),
            offset=(top * stride_h + pad_h, left * stride_w + pad_w),
        )
        wide = rows.onto(values, self.input_shape, window, spills=True)
        return (wide.dense() if values[0, 0].numel() >= self.input_shape[1] * self.input_shape[2] else wide,)

    def _transposed(self, values: Tensor, weight: Tensor, *, whole: bool = False) -> Tensor:
        """The transpose: (rows, C_out, h, w) to (rows, C_in, H, W), the whole map or, unpadded, what the rows reach.

        For few input channels (the image) torch's transposed convolution is several times slower than a convolution,
        so there each of the stride * stride phases of the result is one, and they are interleaved.
        """
        padding = self.padding if whole else (0, 0)
        stride, kernel = self.stride[0], self.kernel[0]
        square = self.stride == (stride, stride) and self.kernel == (kernel, kernel)
        least = [
            (n - 1) * s - 2 * p + d * (k - 1) + 1
            for n, s, p, d, k in zip(
                values.shape[2:], self.stride, padding, self.dilation, self.kernel, strict=True
            )
        ]
        # A strided kernel may never reach the last rows and columns of the input: they get zeros.
        beyond = [n - k for n, k in zip(self.input_shape[1:], least, strict=True)] if whole else [0, 0]
        channels = self.input_shape[0]
        if channels > 4 or self.groups != 1 or self.dilation != (1, 1) or not square or kernel % stride:
            # Channels last halves its time.
            values = values.contiguous(memory_format=torch.channels_last)
            return F.conv_transpose2d(
                values, weight, None, self.stride, padding, beyond, self.groups, self.dilation
            )
        taps, out = kernel // stride, len(weight)
        # (C_out, C_in, tap, phase, tap, phase) to kernels (phase, phase, C_in; C_out, tap, tap), flipped.
        weight = weight.reshape(out, channels, taps, stride, taps, stride)
        weight = weight.permute(3, 5, 1, 0, 2, 4).reshape(-1, out, taps, taps).flip(2, 3)
        phases = F.conv2d(values, weight, padding=taps - 1)
        rows, _, height, width = phases.shape
        phases = phases.view(rows, stride, stride, channels, height, width).permute(0, 3, 4, 1, 5, 2)
        result = phases.reshape(rows, channels, height * stride, width * stride)
        (top, left), (lost_h, lost_w) = padding, beyond
        edges = (-left, lost_w - left, -top, lost_h - top)
        return F.pad(result, edges) if any(edges) else result


@dataclass(frozen=True)
class AvgPool2d(Conv2d):
    """Average pooling that divides every window by one number: a convolution of each channel by itself.

    Args:
        divisor: that number, if it is not the kernel's size; the others are `Conv2d`'s.
    """

    divisor: int | None = None

    def value(self, z: Tensor) -> Tensor:
        """The average of each window: (batch, C, H, W) to (batch, C, H', W')."""
        return F.avg_pool2d(z, self.kernel, self.stride, self.padding, divisor_override=self.divisor)

    def radius(self, r: Tensor) -> Tensor:
        """The same average."""
        return self.value(r)


def avg_pool(
    kernel: Pair, stride: Pair, padding: Pair, divisor: int | None, input_shape: Shape, like: Tensor
) -> AvgPool2d:
    """Average pooling of maps (C, height, width); its weights are of ``like``'s type and on its device."""
    share = 1 / (divisor or kernel[0] * kernel[1])
    weight = like.new_full((input_shape[0], 1, *kernel), share)
    return AvgPool2d(
        lambda: (weight, None), kernel, stride, padding, (1, 1), input_shape[0], input_shape, divisor
    )
