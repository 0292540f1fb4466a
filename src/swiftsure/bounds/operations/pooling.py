"""Max pooling: each output is the largest of a window of inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


@dataclass(frozen=True)
class MaxPool2d:
    """Max pooling of any kernel, stride, padding and dilation; padding counts as minus infinity.

    Its relaxation rests on one input z of the window. With *floor*, the highest lower bound of the window, and
    *ceiling*, the highest upper bound of the others,

        max(z, floor)  <=  output  <=  max(z, ceiling),

    as the output is at least z and at least any lower bound, and it is z or one of the others. Both sides are ReLUs of
    z moved along the diagonal, with lines around them as around ReLUs. Any z is sound; `choose` takes the best.

    Args:
        kernel, stride, padding, dilation: pairs, as in F.max_pool2d.
        input_shape: (channels, height, width).
        output_shape: (channels, height', width').
    """

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]

    def value(self, z: Tensor) -> Tensor:
        """The largest of each window: (batch, *input_shape) to (batch, *output_shape)."""
        least = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(
                self.input_shape[1:], self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        ]
        ceil = tuple(least) != self.output_shape[1:]
        return F.max_pool2d(z, self.kernel, self.stride, self.padding, self.dilation, ceil)

    def range(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """The pooled lower and the pooled upper bounds: exact over a box."""
        return self.value(lower), self.value(upper)

    def windows(self, z: Tensor, outside: float) -> Tensor:
        """The inputs of each output: (batch, channels, places of a window, outputs of a channel).

        Padding, and what a last window reaches beyond it (ceil mode), reads ``outside``.
        """
        index, inside = self._places(z.device)
        picked = z.flatten(2)[:, :, index.flatten()].view(*z.shape[:2], *index.shape)
        return picked.masked_fill(~inside, outside)

    @property
    def sees_padding_alone(self) -> bool:
        """Whether some window lies on padding alone, where torch returns minus infinity."""
        return not bool(self._places(torch.device("cpu"))[1].any(0).all())

    def _places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Flat index into a channel of each window's places, and which of them lie on the map: (places, outputs)."""
        (rows, in_rows), (columns, in_columns) = (self._axis(axis, device) for axis in (0, 1))
        inside = in_rows[:, None, :, None] & in_columns[None, :, None]
        height, width = self.input_shape[1:]
        index = (
            rows.clamp(0, height - 1)[:, None, :, None] * width + columns.clamp(0, width - 1)[None, :, None]
        )
        places, outputs = len(rows) * len(columns), rows.shape[1] * columns.shape[1]
        return index.reshape(places, outputs), inside.reshape(places, outputs)

    def _axis(self, axis: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The rows or columns of each window, and which of them lie on the map: (places, outputs) each."""
        start = torch.arange(self.output_shape[1 + axis], device=device) * self.stride[axis]
        step = torch.arange(self.kernel[axis], device=device) * self.dilation[axis]
        place = start + step[:, None] - self.padding[axis]
        return place, (place >= 0) & (place < self.input_shape[1 + axis])

    def contenders(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Which inputs may be the largest of a window that has several such: bool (batch, *input_shape)."""
        low, high = self.windows(lower, -torch.inf), self.windows(upper, -torch.inf)
        # Written so that NaN contends.
        reaches = ~(high < low.amax(2, keepdim=True))
        index, inside = self._places(lower.device)
        reaches &= inside
        reaches &= reaches.sum(2, keepdim=True) > 1
        counts = torch.zeros(*lower.shape[:2], self.input_shape[1] * self.input_shape[2], device=lower.device)
        flat = index.flatten().expand(*lower.shape[:2], -1)
        return counts.scatter_add_(2, flat, reaches.flatten(2).to(counts)).view(lower.shape) > 0

    def choose(self, lower: Tensor, upper: Tensor, *, parallel: bool) -> tuple[Tensor, ...]:
        """The input that each output rests on: the one around which the lines leave the least area.

        For parallel lines that is the input with the highest upper bound: any other has ceiling >= z, so both of its
        lines are flat, at floor and ceiling, which lines around the highest one can be too. For two slopes the same,
        or the one with the highest centre: all but the highest have a flat line above them, at one height, and of
        lines below them the highest at mid-interval is the highest centre (or floor, which is no more).

        Args:
            lower, upper: of the inputs, (batch, *input_shape).
            parallel: whether both lines have one slope.

        Returns:
            Five of (batch, *output_shape): the chosen input z as a flat index into its channel; its lower and upper
            bound; floor; ceiling. Where ceiling is no more than z's lower bound, the output is z.
        """
        low, high = self.windows(lower, -torch.inf), self.windows(upper, -torch.inf)
        floor = low.amax(2, keepdim=True)
        highest, place = high.max(2, keepdim=True)
        ceiling = high.scatter(2, place, -torch.inf).amax(2, keepdim=True)
        if not parallel:
            middle = (low + high) / 2
            center, central = middle.max(2, keepdim=True)
            # Heights at mid-interval; a chord has the mean of its ends'.
            above = (highest + ceiling.maximum(low.gather(2, place))) / 2
            better = highest - center < above - floor.maximum(middle.gather(2, place))
            place, ceiling = torch.where(better, central, place), torch.where(better, highest, ceiling)
        index, _ = self._places(lower.device)
        chosen = index.expand(*low.shape).gather(2, place)
        found = (chosen, low.gather(2, place), high.gather(2, place), floor, ceiling)
        return tuple(part.view(len(lower), *self.output_shape) for part in found)


@dataclass(frozen=True)
class AdaptiveMaxPool2d(MaxPool2d):
    """Windows that start at floor(i * n / m) and end before ceil((i + 1) * n / m): n places, m outputs.

    The other arguments hold the largest window.
    """

    def value(self, z: Tensor) -> Tensor:
        """As `MaxPool2d.value`."""
        return F.adaptive_max_pool2d(z, list(self.output_shape[1:]))

    def _axis(self, axis: int, device: torch.device) -> tuple[Tensor, Tensor]:
        count, outputs = self.input_shape[1 + axis], self.output_shape[1 + axis]
        output = torch.arange(outputs, device=device)
        start, end = output * count // outputs, ((output + 1) * count + outputs - 1) // outputs
        place = start + torch.arange(self.kernel[axis], device=device)[:, None]
        return place, place < end


def max_pool(
    kernel: int | Pair,
    stride: int | Pair | None,
    padding: int | Pair,
    dilation: int | Pair,
    input_shape: tuple[int, ...],
    output_shape: tuple[int, ...],
) -> MaxPool2d:
    """From arguments as F.max_pool2d takes them: single numbers stand for both axes, no stride for the kernel."""

    def pair(value: int | Pair | list[int]) -> Pair:
        return (value, value) if isinstance(value, int) else (value[0], value[-1])

    kernel = pair(kernel)
    return MaxPool2d(
        kernel, pair(stride) if stride else kernel, pair(padding), pair(dilation), input_shape, output_shape
    )


def adaptive_max_pool(input_shape: tuple[int, ...], output_shape: tuple[int, ...]) -> AdaptiveMaxPool2d:
    """Adaptive max pooling of any size."""
    height, width = (
        max(-(-(i + 1) * n // m) - i * n // m for i in range(m))
        for n, m in zip(input_shape[1:], output_shape[1:], strict=True)
    )
    kernel = (height, width)
    return AdaptiveMaxPool2d(kernel, kernel, (0, 0), (1, 1), input_shape, output_shape)
