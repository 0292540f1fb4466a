"""A ReLU over known pre-activation bounds as a linear map with an error: s z + mu, plus or minus mu."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swiftsure.bounds.rows import Rows


@dataclass(frozen=True)
class Relaxation:
    """Slopes s and errors mu of a ReLU's units; for a stable unit mu is 0 and s is 0 or 1.

    `slope` and `error` hold every unit of the batch and follow gradients: centres pass through them. Rows pass through
    `transpose`, which keeps the gradient to the few unstable units and leaves the many stable ones out of it.
    """

    slope: Tensor
    """(batch, *shape)."""
    error: Tensor
    """mu, (batch, *shape): both the lift of the centre and the size of the unit's error symbol."""
    unit: Tensor
    """(units,): flat index of the unstable units into the batch, increasing."""
    unit_slope: Tensor
    unit_error: Tensor

    @classmethod
    def stable(cls, active: Tensor, dtype: torch.dtype) -> Relaxation:
        """All units stable: (batch, *shape) bool says which are on."""
        slope = active.to(dtype)
        none = slope.new_empty(0)
        return cls(
            slope, torch.zeros_like(slope), torch.empty(0, dtype=torch.int64, device=slope.device), none, none
        )

    @classmethod
    def of(cls, active: Tensor, unit: Tensor, slope: Tensor, error: Tensor) -> Relaxation:
        """Given slopes and errors of some units; the others are on or off as ``active`` says."""
        slopes = active.to(slope.dtype).view(-1).index_copy(0, unit, slope).view(active.shape)
        errors = torch.zeros_like(slopes).view(-1).index_copy(0, unit, error).view(active.shape)
        return cls(slopes, errors, unit, slope, error)

    def transpose(self, rows: Rows) -> tuple[Rows, Tensor]:
        """Rows on the ReLU's output as rows on its input, a s, and their errors sum |a| mu: (rows,)."""
        rows = rows.spread()
        slope = rows.gather(self.slope.detach())
        if not len(self.unit):
            return replace(rows, values=rows.values * slope, spills=False), rows.values.new_zeros(
                len(rows.values)
            )
        entry, unit = self._entries(rows)
        values = _channels_last(rows.values)
        scaled, errors = _ThroughRelu.apply(
            values, _channels_last(slope), entry, unit, self.unit_slope, self.unit_error
        )
        if rows.values.dim() == 4:
            scaled = scaled.permute(0, 3, 1, 2)
        return replace(rows, values=scaled, spills=False), errors

    def _entries(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Which coefficients (flat, channels last) stand on which unstable unit (index into `unit`)."""
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


class _ThroughRelu(torch.autograd.Function):
    """values * slope and sum |value| * error, with gradients to slopes and errors at unstable units only.

    Written by hand, because of all coefficients only a few in a hundred stand on an unstable unit: autograd would send
    the gradient of every slope through index arithmetic of the size of all rows, several times the forward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        slope: Tensor,
        entry: Tensor,
        unit: Tensor,
        unit_slope: Tensor,
        unit_error: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """values (rows, ...) contiguous, slope broadcastable to it, entry and unit (met,), the last two (units,)."""
        met = values.view(-1)[entry]
        row = entry // values[0].numel()
        errors = values.new_zeros(len(values)).index_add(0, row, met.abs() * unit_error[unit])
        ctx.save_for_backward(slope, entry, unit, unit_error, met, row)
        ctx.units = len(unit_slope)
        return values * slope, errors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of both outputs to values, unit_slope and unit_error."""
        from_values, from_errors = gradients
        slope, entry, unit, unit_error, met, row = ctx.saved_tensors
        from_values = from_values.contiguous()
        to_values = from_values * slope
        at_row = from_errors[row]
        to_values.view(-1).index_add_(0, entry, at_row * met.sign() * unit_error[unit])
        none = from_values.new_zeros(ctx.units)
        to_slope = none.index_add(0, unit, from_values.view(-1)[entry] * met)
        to_error = none.index_add(0, unit, at_row * met.abs())
        return to_values, None, None, None, to_slope, to_error
