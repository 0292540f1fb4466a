"""Image files to one uint8 array."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from swiftsure.data.progress import progress
from swiftsure.errors import InputError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

_EIGHT_BIT_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"}
_CHUNK = 256


def decode(paths: Sequence[str], size: tuple[int, int], channels: int, label: str) -> NDArray[np.uint8]:
    """Decode image files, on every core.

    Args:
        paths: the files.
        size: (height, width) that each must have.
        channels: 1 (grey) or 3 (RGB); an image of another kind is converted.
        label: what the progress bar calls them.

    Returns:
        uint8, (N, channels, height, width), in the order of the paths.

    Raises:
        InputError: a file that is not an image, is damaged or has another size or more than 8 bits a channel.
    """
    out = np.empty((len(paths), channels, *size), np.uint8)

    def decode_chunk(start: int) -> int:
        chunk = paths[start : start + _CHUNK]
        for i, path in enumerate(chunk, start):
            out[i] = _decode_one(path, size, channels)
        return len(chunk)

    # Threads suffice: the decoders of Pillow let go of the interpreter's lock.
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None)
    try:
        with progress(label, len(paths)) as advance:
            for done in pool.map(decode_chunk, range(0, len(paths), _CHUNK)):
                advance(done)
    finally:
        pool.shutdown(cancel_futures=True)
    return out


def inspect(path: str) -> tuple[tuple[int, int], int]:
    """Read an image file's header: (height, width) and 1 channel for a grey image, 3 for any other.

    Raises:
        InputError: a file that is not an image.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return (image.height, image.width), 1 if image.mode in ("1", "L") else 3
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from None


def _decode_one(path: str, size: tuple[int, int], channels: int) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            if (image.height, image.width) != size:
                found, wanted = f"{image.width}x{image.height}", f"{size[1]}x{size[0]}"
                raise InputError(f"{path} is {found} pixels wide and high; the other images are {wanted}")
            if image.mode not in _EIGHT_BIT_MODES:
                raise InputError(f"{path} has pixels of mode {image.mode}; allowed: 8 bits a channel")
            pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from None
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _unreadable(path: str, error: BaseException) -> InputError:
    reason = "not an image file" if "cannot identify" in str(error) else error
    return InputError(f"{Path(path)} cannot be read as an image: {reason}")
