"""Random crops and flips of a whole batch at once, on the device that holds it."""

from __future__ import annotations

import torch
from torch import Tensor

from swiftsure.errors import InputError


def augment(
    x: Tensor,
    crop: int = 4,
    flip: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Shift each image by up to `crop` pixels either way on a black ground, and mirror it or not.

    The usual augmentation for CIFAR: pad with zeros, cut the old size out at a random place, flip left and
    right with probability 1/2. Every image has its own draw.

    Args:
        x: images, (B, C, H, W), any dtype.
        crop: the padding, 0 to min(H, W) - 1 pixels; 0 shifts nothing.
        flip: whether to flip.
        generator: source of the draws; it may live on another device than x. None: torch's own.

    Returns:
        a new tensor like x.

    Raises:
        InputError: x is not (B, C, H, W), or the crop is out of range.
    """
    if x.dim() != 4:
        raise InputError(f"images have shape {tuple(x.shape)}; allowed: (batch, channels, height, width)")
    count, channels, height, width = x.shape
    if isinstance(crop, bool) or not isinstance(crop, int) or not 0 <= crop < min(height, width):
        raise InputError(
            f"crop is {crop!r}; allowed: an integer from 0 to {min(height, width) - 1} for this size"
        )
    home = generator.device if generator is not None else x.device
    shift = torch.randint(0, 2 * crop + 1, (2, count, 1), generator=generator, device=home).to(x.device)
    row = shift[0] + torch.arange(height, device=x.device)
    column = torch.arange(width, device=x.device).expand(count, width)
    if flip:
        mirrored = torch.randint(0, 2, (count, 1), generator=generator, device=home).to(x.device)
        column = torch.where(mirrored.bool(), width - 1 - column, column)
    column = shift[1] + column
    padded = torch.nn.functional.pad(x, (crop, crop, crop, crop))
    place = row[:, :, None] * padded.shape[3] + column[:, None, :]
    place = place.view(count, 1, height * width).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, place).view_as(x)
