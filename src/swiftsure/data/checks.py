"""What every function that takes images asks of them, said in one place and in one line."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from swiftsure.errors import InputError

# Float32 arithmetic on a valid image (x / 255, a projection, a resize) may leave [0, 1] by a rounding error.
_SLACK = 1e-6


def check_batch(
    x: Tensor,
    y: Tensor | None = None,
    classes: int | None = None,
    shape: Sequence[int] | None = None,
) -> None:
    """Refuse a batch that is not images in [0, 1] with integer labels.

    Args:
        x: images, floating point, (B, C, H, W), every pixel finite and in [0, 1]. B may be 0.
        y: labels, any integer dtype, (B,).
        classes: how many classes there are; labels must lie in 0..classes - 1. None: only >= 0 is asked.
        shape: (C, H, W) that the network takes; None: any.

    Raises:
        InputError: the first rule broken, in one line that says what was found and what is allowed.
    """
    check_pixels(x, shape)
    if not x.is_floating_point():
        raise InputError(
            f"images have dtype {_dtype(x)}; allowed: a floating-point dtype with pixels in [0, 1]"
        )
    if y is not None:
        check_labels(y, len(x), classes)


def check_pixels(x: Tensor, shape: Sequence[int] | None = None) -> None:
    """Refuse images that are neither uint8 nor floats in [0, 1], of shape (B, C, H, W).

    Args:
        x: images, (B, C, H, W).
        shape: (C, H, W) that is wanted; None: any.

    Raises:
        InputError: wrong type, rank, shape or dtype, a pixel that is NaN or infinite, or one outside [0, 1].
    """
    if not isinstance(x, Tensor):
        raise InputError(
            f"images are a {type(x).__name__}; allowed: a torch.Tensor (batch, channels, height, width)"
        )
    if x.dim() != 4:
        raise InputError(f"images have shape {tuple(x.shape)}; allowed: (batch, channels, height, width)")
    if 0 in x.shape[1:]:
        raise InputError(f"images have shape {tuple(x.shape)}; channels, height and width must be at least 1")
    if shape is not None and tuple(x.shape[1:]) != tuple(shape):
        raise InputError(f"images have shape {tuple(x.shape[1:])} each; the network takes {tuple(shape)}")
    if x.dtype == torch.uint8:
        return
    if not x.is_floating_point():
        raise InputError(f"images have dtype {_dtype(x)}; allowed: uint8, or floats with pixels in [0, 1]")
    if x.numel() == 0:
        return
    low, high = (bound.item() for bound in torch.aminmax(x.detach()))
    # A NaN reaches both ends of aminmax, so this one comparison also catches it.
    if low >= -_SLACK and high <= 1 + _SLACK:
        return
    broken = _first(~torch.isfinite(x))
    if broken is not None:
        raise InputError(f"image {broken} has a NaN or infinite pixel; allowed: finite pixels in [0, 1]")
    raise InputError(
        f"pixels range from {low:.6g} to {high:.6g}; allowed: [0, 1] (divide 8-bit values by 255)"
    )


def check_labels(y: Tensor, count: int, classes: int | None = None) -> None:
    """Refuse labels that are not `count` integers in 0..classes - 1.

    Args:
        y: labels, any integer dtype, (count,).
        count: how many images they belong to.
        classes: how many classes there are; None: only >= 0 is asked.

    Raises:
        InputError: wrong type, rank, count or dtype, or a label out of range.
    """
    if not isinstance(y, Tensor):
        raise InputError(f"labels are a {type(y).__name__}; allowed: a torch.Tensor of shape (batch,)")
    if y.dim() != 1:
        raise InputError(f"labels have shape {tuple(y.shape)}; allowed: (batch,), one class number an image")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise InputError(f"labels have dtype {_dtype(y)}; allowed: an integer dtype")
    if len(y) != count:
        raise InputError(f"{count} images but {len(y)} labels; there must be one label an image")
    if count == 0:
        return
    low, high = (bound.item() for bound in torch.aminmax(y))
    if low >= 0 and (classes is None or high < classes):
        return
    broken = _first((y < 0) if classes is None else (y < 0) | (y >= classes))
    allowed = ">= 0" if classes is None else f"0 to {classes - 1}"
    raise InputError(f"label {broken} is {y[broken].item()}; allowed: {allowed}")


def _first(wrong: Tensor) -> int | None:
    """The index of the first row with a true entry."""
    rows = wrong.flatten(1).any(1) if wrong.dim() > 1 else wrong
    return int(rows.to(torch.uint8).argmax()) if bool(rows.any()) else None


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
