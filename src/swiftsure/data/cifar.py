"""CIFAR-10 from its official binary version. The python version is pickle, and reading pickle runs code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from swiftsure.data.splits import OfficialParts
from swiftsure.errors import InputError

ARCHIVE = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST_FILE = "test_batch.bin"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_RECORDS = 10_000
_SHAPE = (3, 32, 32)
_RECORD_BYTES = 1 + 3 * 32 * 32


def missing(folder: Path) -> list[str]:
    """Which of the six files are not there."""
    return [name for name in (*TRAIN_FILES, TEST_FILE) if not (folder / name).is_file()]


def refusal(root: Path) -> str | None:
    """Why a root that holds only the python version cannot be used."""
    for folder in (root / "cifar-10-batches-py", root):
        if (folder / "data_batch_1").is_file():
            return (
                f"{folder} is CIFAR-10's python version: pickle, which can run any code when it is read; "
                f"get the binary version with `swiftsure data fetch cifar10` or from {ARCHIVE}"
            )
    return None


def read(folder: Path) -> OfficialParts:
    """50,000 training and 10,000 test images of 3x32x32, in the official order."""
    train = np.empty((len(TRAIN_FILES) * _RECORDS, _RECORD_BYTES), np.uint8)
    for i, name in enumerate(TRAIN_FILES):
        _read_into(train[i * _RECORDS : (i + 1) * _RECORDS], folder / name)
    test = np.empty((_RECORDS, _RECORD_BYTES), np.uint8)
    _read_into(test, folder / TEST_FILE)
    return OfficialParts(*_divide(train), *_divide(test), CLASSES)


def _read_into(records: NDArray[np.uint8], path: Path) -> None:
    try:
        size = path.stat().st_size
        if size != records.nbytes:
            raise InputError(f"{path} has {size} bytes; a whole batch has {records.nbytes}")
        with path.open("rb") as file:
            if file.readinto(records.data) != records.nbytes:
                raise InputError(f"{path} ended early; a whole batch has {records.nbytes} bytes")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if records[:, 0].max() >= len(CLASSES):
        raise InputError(f"{path} holds a label {records[:, 0].max()}; allowed: 0 to {len(CLASSES) - 1}")


def _divide(records: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """A record is one byte of label, then the red, green and blue planes."""
    return records[:, 1:].reshape(-1, *_SHAPE), records[:, 0].astype(np.int64)
