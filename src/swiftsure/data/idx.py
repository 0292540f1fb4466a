"""MNIST and the sets that copy its four idx files."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from swiftsure.data.splits import OfficialParts
from swiftsure.errors import InputError

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
DIGITS = tuple("0123456789")
GARMENTS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

_UNSIGNED_BYTE = 8
_SIDE = 28


def missing(folder: Path) -> list[str]:
    """Which of the four files are there neither plain nor gzipped."""
    return [name for name in FILES if _file(folder, name) is None]


def reader(
    classes: tuple[str, ...], foreign_start: bytes, foreign_name: str
) -> Callable[[Path], OfficialParts]:
    """A reader of one set of the family.

    Args:
        classes: the names of its ten classes.
        foreign_start: the first test labels of the set whose files have the same names.
        foreign_name: that other set.
    """

    def read(folder: Path) -> OfficialParts:
        train, train_labels, test, test_labels = (_read(folder, name) for name in FILES)
        for images, labels, part in ((train, train_labels, "training"), (test, test_labels, "test")):
            if len(images) != len(labels):
                raise InputError(f"{folder} holds {len(images)} {part} images but {len(labels)} labels")
            if len(labels) and labels.max() >= len(classes):
                raise InputError(
                    f"{folder} holds a {part} label {labels.max()}; allowed: 0 to {len(classes) - 1}"
                )
        if test_labels[: len(foreign_start)].tobytes() == foreign_start:
            raise InputError(
                f"{folder} holds {foreign_name}: the file names are the same, the labels are not"
            )
        return OfficialParts(
            train[:, None],
            train_labels.astype(np.int64),
            test[:, None],
            test_labels.astype(np.int64),
            classes,
        )

    return read


# The first sixteen test labels tell the two official sets apart.
_MNIST_START = bytes([7, 2, 1, 0, 4, 1, 4, 9, 5, 9, 0, 6, 9, 0, 1, 5])
_FASHION_START = bytes([9, 2, 1, 1, 6, 1, 4, 6, 5, 7, 4, 5, 7, 3, 4, 1])

read_mnist = reader(DIGITS, _FASHION_START, "fashion_mnist")
read_fashion_mnist = reader(GARMENTS, _MNIST_START, "mnist")


def _file(folder: Path, name: str) -> Path | None:
    # Plain first: where both are there, it is the quicker one.
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read(folder: Path, name: str) -> NDArray[np.uint8]:
    """One idx file as (N,) labels or (N, 28, 28) images, read-only."""
    path = _file(folder, name)
    if path is None:
        raise InputError(f"{folder} holds no {name}, plain or .gz")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    rank = 3 if "idx3" in name else 1
    header = 4 + 4 * rank
    if data[:4] != bytes([0, 0, _UNSIGNED_BYTE, rank]) or len(data) < header:
        raise InputError(
            f"{path} is not an idx file of {rank}-dimensional bytes: it starts with {data[:4].hex()}"
        )
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", rank, offset=4))
    if rank == 3 and shape[1:] != (_SIDE, _SIDE):
        raise InputError(f"{path} holds images of {shape[1]}x{shape[2]}; allowed: {_SIDE}x{_SIDE}")
    announced = header + shape[0] * (_SIDE * _SIDE if rank == 3 else 1)
    if len(data) != announced:
        raise InputError(f"{path} has {len(data)} bytes; its header announces {announced}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
