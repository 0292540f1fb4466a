"""Rows of linear functions on the values of one node, as backward substitution carries them to the input.

A row is the coefficient tensor of one linear function, for one sample. A row that starts at a unit of a convolution
sees only a window of each earlier map, so it is kept as that window and its place: a unit of mnist_small's second
convolution holds 10 x 10 input coefficients instead of 28 x 28. Rows become dense where windows stop to pay.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Window(NamedTuple):
    """Where the windows of some rows lie: row r, at unit (i, j), starts at (i, j) * stride - offset.

    The offset is a pair of Python integers shared by all rows, so that two windows of the same units (the branches of
    a residual sum) are aligned without looking at the data.
    """

    unit: Tensor
    """(rows, 2): the place of each row's unit on the map where it started."""
    grid: tuple[int, int]
    """Height and width of that map."""
    stride: tuple[int, int]
    offset: tuple[int, int]


@dataclass(frozen=True)
class Rows:
    """Coefficients (rows, *shape), or (rows, channels, h, w) inside a window, and the sample each row belongs to."""

    values: Tensor
    sample: Tensor | None
    """(rows,): index into the batch; None where the batch holds one sample."""
    shape: tuple[int, ...]
    """Shape of the node's values for one sample."""
    window: Window | None = None
    spills: bool = False
    """Whether coefficients may lie outside the map (on zero padding), where they mean nothing."""
    channel: Tensor | None = None
    """(rows,): set while each row is a single unit with coefficient 1; `values` (rows, 1, ...) are then ones."""
    function: Tensor | None = None
    """(rows,): which of the asked functions a row belongs to, where slopes differ between functions."""
    each: int = 0
    """How many rows every sample has, if rows are in order of samples; 0: not so."""
    negated: bool = False
    """Whether `values` still have the opposite sign of what they mean."""

    def onto(
        self, values: Tensor, shape: tuple[int, ...], window: Window | None = None, spills: bool = False
    ) -> Rows:
        """The same functions as coefficients on another node's values."""
        return Rows(values, self.sample, shape, window, spills, None, self.function, self.each, self.negated)

    def negative(self) -> Rows:
        """Minus the same functions."""
        return replace(self, negated=not self.negated)

    def spread(self) -> Rows:
        """The same rows with their own signs and a coefficient for every channel, where they were kept as units."""
        values = -self.values if self.negated else self.values
        if self.channel is None:
            return replace(self, values=values, negated=False)
        one_hot = F.one_hot(self.channel, self.shape[0]).to(values.dtype)
        values = values * one_hot.view(-1, self.shape[0], *[1] * (values.dim() - 2))
        return replace(self, values=values, channel=None, negated=False)

    def place(self, best: Tensor, shape: tuple[int, ...]) -> Rows:
        """Rows on the outputs of a max pooling as rows on the inputs that they rest on.

        Args:
            best: (batch, channels, h, w), flat index into its channel of the input of each output.
            shape: the inputs' shape for one sample.
        """
        rows = self.dense().spread()
        index = rows.gather(best).flatten(2).expand(len(rows.values), -1, -1)
        flat = rows.values.new_zeros(len(rows.values), shape[0], shape[1] * shape[2])
        values = flat.scatter_add(2, index, rows.values.flatten(2))
        return rows.onto(values.view(len(values), *shape), shape)

    def with_values(self, values: Tensor) -> Rows:
        """The same rows with other coefficients."""
        return replace(self, values=values)

    def gather(self, field: Tensor) -> Tensor:
        """A per-sample field (batch, *shape) at the rows' places, zero outside the map: like `values`, or
        broadcastable to it. A field (functions, batch, *shape) is read for each row's own function."""
        if field.dim() > len(self.shape) + 1:
            return self._gather_of_function(field)
        if self.window is not None:
            return _gather_windows(field, self.sample, self.window, self.values.shape[-2:])
        if self.sample is None:
            return field
        if field.dim() != 4:
            return field.index_select(0, self.sample)
        # Channels last, as convolutions leave the rows.
        return field.permute(0, 2, 3, 1).contiguous().index_select(0, self.sample).permute(0, 3, 1, 2)

    def _gather_of_function(self, field: Tensor) -> Tensor:
        assert self.function is not None
        functions, batch = field.shape[:2]
        sample = self.function * batch if self.sample is None else self.function * batch + self.sample
        return replace(self, sample=sample).gather(field.reshape(functions * batch, *field.shape[2:]))

    def multiply(self, field: Tensor) -> Rows:
        """Each coefficient times the field's value at its place (0 outside the map)."""
        rows = self.spread()
        if rows.each and rows.window is None and field.dim() == len(rows.shape) + 1:
            # All samples have equally many rows, one sample after the other: the field need not be copied for each.
            values = rows.values.view(len(field), rows.each, *rows.shape) * field[:, None]
            return replace(rows, values=values.view(rows.values.shape), spills=False)
        return replace(rows, values=rows.values * rows.gather(field), spills=False)

    def weigh(self, field: Tensor) -> Tensor:
        """Sum of |coefficient| * field: (rows,)."""
        rows = self.spread()
        if rows.each and rows.window is None and field.dim() == len(rows.shape) + 1:
            values = rows.values
            if values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last):
                values, field = values.permute(0, 2, 3, 1), field.permute(0, 2, 3, 1)
            flat = values.flatten(1).view(len(field), rows.each, torch.Size(rows.shape).numel()).abs()
            return (flat @ field.flatten(1)[..., None]).flatten()
        return (rows.values.abs() * rows.gather(field)).flatten(1).sum(1)

    def inside(self) -> Rows:
        """The same rows with coefficients on zero padding removed."""
        if not self.spills or self.window is None:
            return self
        ones = self.values.new_ones(1, 1, *self.shape[1:])
        mask = _gather_windows(ones, None, self.window, self.values.shape[-2:])
        return replace(self, values=self.values * mask, spills=False)

    def dense(self) -> Rows:
        """The same rows as full coefficient tensors (rows, *shape)."""
        if self.window is None:
            return self.spread()
        if self.channel is not None:
            return self.spread().dense()
        (top, left), (height, width) = self.window.offset, self.values.shape[-2:]
        (rows, channels), (stride_h, stride_w) = self.values.shape[:2], self.window.stride
        below, right = _overhang(self.window, (height, width), self.shape[1:])
        padded_h, padded_w = top + self.shape[1] + below, left + self.shape[2] + right
        first = self.window.unit[:, 0] * stride_h * padded_w + self.window.unit[:, 1] * stride_w
        index = first[:, None] + _offsets(height, width, padded_w, first.device)
        canvas = self.values.new_zeros(rows, channels, padded_h * padded_w)
        canvas = canvas.scatter(2, index[:, None].expand(-1, channels, -1), self.values.flatten(2))
        canvas = canvas.view(rows, channels, padded_h, padded_w)
        return self.onto(canvas[:, :, top : top + self.shape[1], left : left + self.shape[2]], self.shape)

    def reshape(self, shape: tuple[int, ...]) -> Rows:
        """The same linear functions on values of another shape for one sample."""
        rows = self.dense()
        return rows.onto(rows.values.reshape(-1, *shape), shape)


def unit_rows(unit: Tensor, shape: tuple[int, ...], sample: Tensor | None, dtype: torch.dtype) -> Rows:
    """One row for each unit of a node: coefficient 1 on itself.

    Args:
        unit: (rows,) index into the flattened node of one sample.
        shape: the node's shape for one sample.
        sample: (rows,) or None.
        dtype: of the coefficients.
    """
    ones = torch.ones(1, dtype=dtype, device=unit.device)
    if len(shape) == 1:
        return Rows(ones.expand(len(unit), 1), sample, shape, channel=unit)
    if len(shape) != 3:
        size = torch.Size(shape).numel()
        return Rows(F.one_hot(unit, size).to(dtype).view(-1, *shape), sample, shape)
    _, height, width = shape
    place = torch.stack([unit % (height * width) // width, unit % width], 1)
    values = ones.expand(len(unit), 1, 1, 1)
    window = Window(place, (height, width), (1, 1), (0, 0))
    return Rows(values, sample, shape, window, channel=unit // (height * width))


def add(a: Rows, b: Rows) -> Rows:
    """The sum of two sets of rows on the same node: their windows are joined, or both become dense."""
    a, b = a.spread(), b.spread()
    if a.window is None or b.window is None or a.window.stride != b.window.stride:
        a, b = a.dense(), b.dense()
        return a.with_values(a.values + b.values)
    start = [max(p, q) for p, q in zip(a.window.offset, b.window.offset, strict=True)]
    ends = [
        max(n - p, m - q)
        for p, n, q, m in zip(
            a.window.offset, a.values.shape[-2:], b.window.offset, b.values.shape[-2:], strict=True
        )
    ]

    def widened(rows: Rows) -> Tensor:
        assert rows.window is not None
        (top, left), (height, width) = rows.window.offset, rows.values.shape[-2:]
        pads = (start[1] - left, ends[1] + left - width, start[0] - top, ends[0] + top - height)
        return F.pad(rows.values, pads) if any(pads) else rows.values

    window = a.window._replace(offset=(start[0], start[1]))
    return replace(a, values=widened(a) + widened(b), window=window, spills=a.spills or b.spills)


def _overhang(window: Window, size: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, int]:
    """How far the last windows reach over the lower and right edge of the map."""
    below, right = (
        max(0, (n - 1) * s - p + k - m)
        for n, s, p, k, m in zip(window.grid, window.stride, window.offset, size, shape, strict=True)
    )
    return below, right


def _offsets(height: int, width: int, row_length: int, device: torch.device) -> Tensor:
    rows = torch.arange(height, device=device) * row_length
    return (rows[:, None] + torch.arange(width, device=device)).flatten()


def _gather_windows(
    field: Tensor, sample: Tensor | None, window: Window, size: tuple[int, ...] | torch.Size
) -> Tensor:
    """field (batch, channels, H, W), zero-padded, at the windows: (rows, channels, h, w)."""
    (top, left), (height, width) = window.offset, size
    below, right = _overhang(window, (height, width), tuple(field.shape[2:]))
    # Channels last: one index_select copies all channels of a pixel at once, and its backward is an index_add.
    padded = F.pad(field.permute(0, 2, 3, 1), (0, 0, left, right, top, below))
    padded_h, padded_w, channels = padded.shape[1:]
    first = window.unit[:, 0] * (window.stride[0] * padded_w) + window.unit[:, 1] * window.stride[1]
    if sample is not None:
        first = first + sample * (padded_h * padded_w)
    index = (first[:, None] + _offsets(height, width, padded_w, first.device)).flatten()
    picked = padded.reshape(-1, channels).index_select(0, index)
    return picked.view(-1, height, width, channels).permute(0, 3, 1, 2)
