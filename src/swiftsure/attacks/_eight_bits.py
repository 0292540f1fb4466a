"""Images as files hold them: every pixel a multiple of 1/255."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from swiftsure.ball import Ball

_ON_GRID = 5e-5
"""How far from a multiple of 1/255, in such units, a bound may lie and count as one: float32 has no exact k / 255."""


def eight_bits(x_adv: Tensor, x: Tensor, ball: Ball) -> tuple[Tensor, Tensor]:
    """The nearest image of 8-bit pixels, inside the ball where one can be had by rounding.

    L-inf: each pixel goes to the nearest multiple of 1/255 within its own range, which exists wherever x itself has
    8 bits. L2 and L1: to the nearest multiple; where that leaves the ball, to the next one on the way to x.

    Args:
        x_adv: images in the ball, (B, C, H, W).
        x: the images around which it lies.
        ball: the threat model.

    Returns:
        The rounded images, and (B,) bool: which of them lie in the ball and in the pixel range.
    """
    value, clean = x_adv * 255, x * 255
    low, high = math.ceil(ball.low * 255 - _ON_GRID), math.floor(ball.high * 255 + _ON_GRID)
    if ball.norm == "inf":
        radius = ball.radius * 255
        least, most = (clean - radius - _ON_GRID).ceil(), (clean + radius + _ON_GRID).floor()
        # Where no multiple lies in a pixel's range, the nearest one is outside, and `contains` says so.
        rounded = torch.where(least <= most, value.round().clamp(least, most), value.round())
        image = _pixels(rounded, low, high, x_adv)
        return image, ball.contains(image, x)
    image = _pixels(value.round(), low, high, x_adv)
    outside = ~ball.contains(image, x)
    if bool(outside.any()):
        towards = torch.where(value > clean, (value + _ON_GRID).floor(), (value - _ON_GRID).ceil())
        image[outside] = _pixels(towards, low, high, x_adv)[outside]
    return image, ball.contains(image, x)


def _pixels(multiples: Tensor, low: float, high: float, like: Tensor) -> Tensor:
    # Divided in the images' own type, as whoever reads a file divides.
    return multiples.clamp(low, high).to(like.dtype) / 255
