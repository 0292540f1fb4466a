"""The set of inputs that bounds are taken over: a ball around each image, cut by the pixel range."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from swiftsure.ball import Ball
from swiftsure.bounds.rows import Rows


class Region:
    """A ball around each image of a batch, intersected with the pixel range.

    The box is clipped to the range of the ball, never to the values that happen to be in the batch: the bound of an
    image must not depend on its neighbours.

    Args:
        x: images (batch, channels, height, width).
        ball: the threat model.
    """

    def __init__(self, x: Tensor, ball: Ball) -> None:
        self.x, self.ball = x, ball
        self.lower, self.upper = ball.box(x)
        self.box_center = (self.lower + self.upper) / 2
        """Centre of the clipped box, like x."""
        self.box_radius = (self.upper - self.lower) / 2
        """Half-widths of the clipped box, like x."""

    def stretch(self, start: int, stop: int) -> Region:
        """The same around some of the images, which follow one another."""
        some = copy.copy(self)
        some.x, some.lower, some.upper, some.box_center, some.box_radius = (
            field[start:stop] for field in (self.x, self.lower, self.upper, self.box_center, self.box_radius)
        )
        return some

    @property
    def center(self) -> Tensor:
        """The point that `reach` measures from: the box's centre for L-inf, the image itself for L2 and L1."""
        return self.box_center if self.ball.norm == "inf" else self.x

    @property
    def symmetric(self) -> bool:
        """Whether the region reaches equally far below and above `center` along every row."""
        return self.ball.norm == "inf"

    def reach(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """How far each row's function falls below and rises above its value at `center`: two of (rows,).

        L-inf: sum |a| e over the clipped box. L2: eps ||a||_2, L1: eps max |a|; each side no more than over the
        enclosing clipped box.
        """
        if self.ball.norm == "inf":
            reach = rows.weigh(self.box_radius)
            return reach, reach
        rows = rows.inside().spread()
        flat = rows.values.flatten(1)
        length = flat.norm(dim=1) if self.ball.norm == "2" else flat.abs().amax(1)
        rise, fall = rows.gather(self.upper - self.x), rows.gather(self.x - self.lower)
        positive, negative = rows.values.clamp_min(0), rows.values.clamp_max(0)
        above = (positive * rise - negative * fall).flatten(1).sum(1)
        below = (positive * fall - negative * rise).flatten(1).sum(1)
        ball = self.ball.radius * length
        return torch.minimum(below, ball), torch.minimum(above, ball)
