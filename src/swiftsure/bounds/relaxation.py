"""A ReLU, another activation or a max pooling between two lines, as backward substitution passes through it.

Each output z' of a unit with input z, c the input's value at the centre, lies between two lines,

    c' + s_low (z - c) + gap_low  <=  z'  <=  c' + s_up (z - c) + gap_up,

where c' = slope * c + lift is what the *reference* line makes of the centre. A row with coefficient a on z' becomes
a s_low on z and loses a gap_low where a > 0, and a s_up, a gap_up where a < 0, if a lower bound is wanted. Biases and
intercepts all live in the centres, which go forward once; what rows still add up is gaps, and those are 0 at units
where the activation is a straight line. So a row's way back costs one product, and a few sums at bent units.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swiftsure.bounds.rows import Rows

DENSE_SHARE = 0.2
"""From this share of bent units on, whole fields are multiplied rather than single entries picked."""


@dataclass(frozen=True)
class Relaxation:
    """Two lines around each unit of an activation.

    Lines of single units are given for those that bend; the others follow `slope` and `lift`. All four line tensors
    are (units,), or (functions, units) where each asked function has slopes of its own.
    """

    slope: Tensor
    """Slope of the reference line, (batch, *shape); at bent units any line near the two others."""
    lift: Tensor | None
    """Intercept of the reference line, (batch, *shape); None: 0 everywhere."""
    unit: Tensor
    """(units,): flat index of the bent units into the batch, increasing."""
    low_slope: Tensor
    low_gap: Tensor
    up_slope: Tensor
    up_gap: Tensor | None
    """None: 0, as the reference line is the one above."""
    parallel: bool
    """Whether both lines have one slope and equal gaps, so that one row serves both of its sides."""

    @classmethod
    def straight(cls, slope: Tensor, lift: Tensor | None, *, parallel: bool) -> Relaxation:
        """No unit bends."""
        none = slope.new_empty(0)
        unit = torch.empty(0, dtype=torch.int64, device=slope.device)
        return cls(slope, lift, unit, none, none, none, none if parallel else None, parallel)

    def restricted(self, samples: Tensor, place: Tensor) -> tuple[Relaxation, Tensor]:
        """The same for some samples; ``place`` (batch,) is each one's new index, or -1. Also a mask of kept units."""
        size = self.slope[0].numel()
        sample = place[self.unit // size]
        kept = sample >= 0
        low_slope, low_gap = self.low_slope[..., kept], self.low_gap[..., kept]
        up_slope = self.up_slope[..., kept]
        up_gap = None if self.up_gap is None else self.up_gap[..., kept]
        unit = (sample * size + self.unit % size)[kept]
        lift = None if self.lift is None else self.lift[samples]
        some = Relaxation(
            self.slope[samples], lift, unit, low_slope, low_gap, up_slope, up_gap, self.parallel
        )
        return some, kept

    def stretch(self, start: int, stop: int) -> Relaxation:
        """The same for samples that follow one another; all tensors but `unit` are views."""
        size = self.slope[0].numel()
        ends = torch.tensor([start * size, stop * size], device=self.unit.device)
        first, last = torch.searchsorted(self.unit, ends).tolist()

        return Relaxation(
            self.slope[start:stop],
            None if self.lift is None else self.lift[start:stop],
            self.unit[first:last] - start * size,
            self.low_slope[..., first:last],
            self.low_gap[..., first:last],
            self.up_slope[..., first:last],
            None if self.up_gap is None else self.up_gap[..., first:last],
            self.parallel,
        )

    def center(self, center: Tensor) -> Tensor:
        """The reference line at the inputs' centres: (batch, *shape)."""
        return self.slope * center if self.lift is None else torch.addcmul(self.lift, self.slope, center)

    @property
    def errors(self) -> Tensor:
        """How far the output may lie from the reference line of parallel ones: (batch, *shape)."""
        assert self.up_gap is not None
        return self._field(self.up_gap)

    def transpose(self, rows: Rows) -> tuple[Rows, Tensor]:
        """Rows on the output as rows on the input, and how much lower the lines let them fall: (rows,), >= 0."""
        rows = rows.spread()
        if not len(self.unit):
            return rows.multiply(self.slope.detach()), rows.values.new_zeros(len(rows.values))
        if len(self.unit) > DENSE_SHARE * self.slope.numel():
            return self._dense(rows)
        entry, unit = self._entries(rows)
        flat, (slope,) = _aligned(rows, self.slope.detach())
        row = entry // max(1, flat.shape[-1])
        if self.parallel:
            scaled, fall = _Parallel.apply(flat, slope, entry, row, unit, self.low_slope, self.up_gap)
        else:
            if self.low_slope.dim() == 2:
                assert rows.function is not None
                unit = rows.function[row] * len(self.unit) + unit
            low_slope, low_gap, up_slope = (
                line.reshape(-1) for line in (self.low_slope, self.low_gap, self.up_slope)
            )
            up_gap = None if self.up_gap is None else self.up_gap.reshape(-1)
            lines = (low_slope, low_gap, up_slope, up_gap)
            scaled, fall = _TwoLines.apply(flat, slope, entry, row, unit, *lines)
        return _restored(rows, scaled), fall

    def _dense(self, rows: Rows) -> tuple[Rows, Tensor]:
        """The same by whole fields: a base for every coefficient, and a turn and a gap for |a| or max(a, 0)."""
        if self.parallel:
            flat, (base, gap) = _aligned(rows, self._field(self.low_slope, self.slope), self.errors)
            turn, lift = None, None
        else:
            up_gap = self.up_gap
            fields = [
                self._field(self.up_slope, self.slope),
                self._field(self.low_slope - self.up_slope),
                self._field(self.low_gap if up_gap is None else self.low_gap - up_gap),
            ]
            if up_gap is not None:
                fields.append(self._field(up_gap))
            flat, (base, turn, gap, *rest) = _aligned(rows, *fields)
            gap, lift = -gap, -rest[0] if rest else None
        scaled, fall = _Dense.apply(flat, base, turn, gap, lift, self.parallel)
        return _restored(rows, scaled), fall

    def _field(self, line: Tensor, others: Tensor | None = None) -> Tensor:
        """A line tensor with the value 0, or that of another field, at units that do not bend.

        (batch, *shape), or (functions, batch, *shape).
        """
        base = torch.zeros_like(self.slope) if others is None else others
        base = base.reshape(-1).expand(*line.shape[:-1], -1)
        return base.index_copy(-1, self.unit, line).view(*line.shape[:-1], *self.slope.shape)

    def _entries(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Which coefficients (flat, channels last) stand on which bent unit (index into `unit`)."""
        batch, size = len(self.slope), self.slope[0].numel()
        if rows.window is not None:
            number = torch.full((self.slope.numel(),), -1, dtype=torch.int32, device=self.unit.device)
            number[self.unit] = torch.arange(len(self.unit), dtype=torch.int32, device=self.unit.device)
            # Shifted by one, so that what lies outside the map reads 0: no unit.
            met = _channels_last(rows.gather(number.view(self.slope.shape) + 1)).reshape(-1)
            entry = met.nonzero()[:, 0]
            return entry, met[entry].to(torch.int64) - 1
        place = self.unit % size
        if self.slope.dim() == 4:
            # From (channel, row, column) to (row, column, channel).
            area = self.slope[0, 0].numel()
            place = place % area * len(self.slope[0]) + place // area
        count = len(rows.values)
        if batch == 1:
            entry = torch.arange(count, device=place.device)[:, None] * size + place
            return entry.view(-1), torch.arange(len(place), device=place.device).repeat(count)
        assert rows.sample is not None
        per_sample = torch.bincount(self.unit // size, minlength=batch)
        first = per_sample.cumsum(0) - per_sample
        repeats = per_sample[rows.sample]
        row = torch.arange(count, device=place.device).repeat_interleave(repeats)
        within = torch.arange(len(row), device=place.device) - (repeats.cumsum(0) - repeats)[row]
        unit = first[rows.sample][row] + within
        return row * size + place[unit], unit


def _channels_last(values: Tensor) -> Tensor:
    """(rows, channels, h, w) as contiguous (rows, h, w, channels); other shapes contiguous as they are."""
    return (values.permute(0, 2, 3, 1) if values.dim() == 4 else values).contiguous()


def _aligned(rows: Rows, *fields: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Coefficients and per-sample fields side by side: (samples, rows of each, size) and (samples, 1, size).

    Where samples have different numbers of rows, every row counts as a sample.
    """
    values = _channels_last(rows.values)
    size = values[:1].numel()
    if rows.each and rows.window is None and fields[0].dim() == len(rows.shape) + 1:
        # One field for all rows of a sample: it need not be copied for each.
        known = tuple(_channels_last(field).view(len(field), 1, size) for field in fields)
        return values.view(len(fields[0]), rows.each, size), known
    return values.view(len(values), 1, size), tuple(
        _channels_last(rows.gather(field)).view(-1, 1, size) for field in fields
    )


def _restored(rows: Rows, scaled: Tensor) -> Rows:
    """Aligned coefficients in the shape of the rows."""
    if rows.values.dim() == 4:
        count, channels, height, width = rows.values.shape
        scaled = scaled.view(count, height, width, channels).permute(0, 3, 1, 2)
    return replace(rows, values=scaled.view(rows.values.shape), spills=False)


class _Parallel(torch.autograd.Function):
    """values * slope and sum |value| * gap, with gradients to slopes and gaps at bent units only.

    Written by hand, because of all coefficients only a few in a hundred stand on a bent unit: autograd would send
    the gradient of every slope through index arithmetic of the size of all rows, several times the forward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        slope: Tensor,
        entry: Tensor,
        row: Tensor,
        unit: Tensor,
        unit_slope: Tensor,
        unit_gap: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """values (samples, rows, size), contiguous, slope (samples or 1, 1, size); entry, row and unit (met,); the last
        two (units,)."""
        met = values.view(-1)[entry]
        rows = values.shape[:-1].numel()
        fall = values.new_zeros(rows).index_add(0, row, met.abs() * unit_gap[unit])
        ctx.save_for_backward(slope, entry, unit, unit_gap, met, row)
        ctx.units = len(unit_slope)
        return values * slope, fall

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of both outputs to values, unit_slope and unit_gap."""
        from_values, from_fall = gradients
        slope, entry, unit, unit_gap, met, row = ctx.saved_tensors
        from_values = from_values.contiguous()
        to_values = from_values * slope
        at_row = from_fall[row]
        to_values.view(-1).index_add_(0, entry, at_row * met.sign() * unit_gap[unit])
        none = from_values.new_zeros(ctx.units)
        to_slope = none.index_add(0, unit, from_values.view(-1)[entry] * met)
        to_gap = none.index_add(0, unit, at_row * met.abs())
        return to_values, None, None, None, None, to_slope, to_gap


class _TwoLines(torch.autograd.Function):
    """The same with one line for positive and another for negative coefficients."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        slope: Tensor,
        entry: Tensor,
        row: Tensor,
        unit: Tensor,
        low_slope: Tensor,
        low_gap: Tensor,
        up_slope: Tensor,
        up_gap: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Shapes as in `_Parallel`; the four lines (units,), flattened where functions have lines of their own."""
        met = values.view(-1)[entry]
        above = met > 0
        picked = torch.where(above, low_slope[unit], up_slope[unit])
        gap = low_gap[unit] * above if up_gap is None else torch.where(above, low_gap[unit], up_gap[unit])
        scaled = values * slope
        scaled.view(-1)[entry] = met * picked
        fall = values.new_zeros(values.shape[:-1].numel()).index_add(0, row, -met * gap)
        ctx.save_for_backward(slope, entry, unit, met, row, picked, gap)
        ctx.units, ctx.level = len(low_slope), up_gap is None
        return scaled, fall

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of both outputs to values and the four lines."""
        from_values, from_fall = gradients
        slope, entry, unit, met, row, picked, gap = ctx.saved_tensors
        from_values = from_values.contiguous()
        at_entry, at_row = from_values.view(-1)[entry], from_fall[row]
        to_values = from_values * slope
        to_values.view(-1)[entry] = at_entry * picked - at_row * gap
        none = from_values.new_zeros(ctx.units)
        positive, negative = met.clamp_min(0), met.clamp_max(0)
        lines: list[Tensor | None] = [
            none.index_add(0, unit, part)
            for part in (at_entry * positive, -at_row * positive, at_entry * negative, -at_row * negative)
        ]
        if ctx.level:
            lines[3] = None
        return to_values, None, None, None, None, *lines


CACHED = 1 << 17
"""How many coefficients of a dense relaxation are worked on at once: 512 KiB of float32, so that they stay in cache."""


class _Dense(torch.autograd.Function):
    """values * base + h * turn, and sum (h * gap + values * lift), where h = |values| or max(values, 0).

    Written by hand, a few samples at a time: a dozen passes over all coefficients, forward and backward, are bound by
    memory, and several times as fast in cache.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        base: Tensor,
        turn: Tensor | None,
        gap: Tensor,
        lift: Tensor | None,
        absolute: bool,
    ) -> tuple[Tensor, Tensor]:
        """values (samples, rows, size), contiguous; the fields (samples or 1, 1, size), turn and lift None for 0."""
        scaled = torch.empty_like(values)
        fall = values.new_empty(values.shape[:-1])
        for part in _parts(values):
            v, bent = values[part], (values[part].abs() if absolute else values[part].relu())
            torch.mul(v, _at(base, part), out=scaled[part])
            if turn is not None:
                scaled[part].addcmul_(bent, _at(turn, part))
            fall[part] = _dot(bent, _at(gap, part))
            if lift is not None:
                fall[part] += _dot(v, _at(lift, part))
        ctx.save_for_backward(values, base, turn, gap, lift)
        ctx.absolute = absolute
        return scaled, fall.view(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of both outputs to values and the fields."""
        values, base, turn, gap, lift = ctx.saved_tensors
        from_scaled, from_fall = gradients[0].contiguous(), gradients[1].view(*values.shape[:-1], 1)
        to_values = torch.empty_like(values)
        to = [None if field is None else torch.zeros_like(field) for field in (base, turn, gap, lift)]
        for part in _parts(values):
            v, g, f = values[part], from_scaled[part], from_fall[part]
            bent = v.abs() if ctx.absolute else v.relu()
            turned = f * _at(gap, part)
            if turn is not None:
                turned.addcmul_(g, _at(turn, part))
            turned.mul_(v.sign() if ctx.absolute else bent.sign())
            turned.addcmul_(g, _at(base, part))
            if lift is not None:
                turned.addcmul_(f, _at(lift, part))
            to_values[part] = turned
            # Over the rows of a sample, or over all rows where one field serves them all.
            for field, left, right in zip(to, (g, g, f, f), (v, bent, bent, v), strict=True):
                if field is not None:
                    where = part if len(field) > 1 else slice(0, 1)
                    total = left.mT @ right if left is f else (left * right).sum(1, keepdim=True)
                    field[where] += total if len(field) > 1 else total.sum(0, keepdim=True)
        return to_values, *to, None


def _parts(values: Tensor) -> list[slice]:
    """Samples whose coefficients fit into cache together."""
    step = max(1, CACHED // max(1, values[:1].numel()))
    return [slice(start, start + step) for start in range(0, len(values), step)]


def _at(field: Tensor, part: slice) -> Tensor:
    return field[part] if len(field) > 1 else field


def _dot(values: Tensor, field: Tensor) -> Tensor:
    """(samples, rows, size) and (samples or 1, 1, size) to (samples, rows)."""
    return (values @ field.mT)[..., 0]
