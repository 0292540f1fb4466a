"""How a data set's official parts become train, val, calibration and test."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from swiftsure.data.image_set import ImageSet, Splits
from swiftsure.errors import InputError

HELD_OUT = 5_000
SMALL = 20_000
FEWEST = 20


@dataclass(frozen=True)
class OfficialParts:
    """A data set as its authors divide it: images uint8 (N, C, H, W), labels integer (N,)."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]
    classes: tuple[str, ...]
    subset: str | None = None


def split(name: str, parts: OfficialParts, seed: int = 0) -> Splits:
    """Draw val and calibration out of the training images; the test images are taken as they are.

    5,000 training images are held out (a tenth of a set of fewer than 20,000), half for each. Each half has
    the same number of every class, or one more of some; a class gives at most half of its images.
    Each part keeps the official order. Equal seeds give equal parts, on every machine.

    Raises:
        InputError: fewer than 20 training images, or a seed that is not an integer >= 0.
    """
    count = len(parts.train_labels)
    if count < FEWEST:
        raise InputError(f"{name} has {count} training images; at least {FEWEST} are needed to hold some out")
    half = (HELD_OUT if count >= SMALL else count // 10) // 2
    val, calibration, train = balanced_draw(parts.train_labels, (half, half), len(parts.classes), seed)

    def part(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> ImageSet:
        return ImageSet(
            name,
            torch.from_numpy(images),
            torch.from_numpy(labels.astype(np.int64)),
            parts.classes,
            parts.subset,
        )

    def drawn(index: NDArray[np.int64]) -> ImageSet:
        return part(parts.train_images[index], parts.train_labels[index])

    # A copy: what a file was read into may be read-only or mapped, which a tensor must not be.
    test = part(np.array(parts.test_images), parts.test_labels)
    return Splits(drawn(train), drawn(val), drawn(calibration), test)


def balanced_draw(
    labels: NDArray[np.int64], sizes: tuple[int, ...], classes: int, seed: int
) -> list[NDArray[np.int64]]:
    """Draw disjoint parts, each with the same number of every class to within one, and what is left over.

    Args:
        labels: (N,), in 0..classes - 1.
        sizes: how many images each part is to have.
        classes: how many there are.
        seed: of the draw, an integer >= 0.

    Returns:
        one ascending index array a part, then the rest. A part is smaller than asked where a class runs
        short: all the parts together take at most half of a class.

    Raises:
        InputError: a seed that is not an integer >= 0.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise InputError(f"seed is {seed!r}; allowed: an integer >= 0")
    # Raw output of the bit generator: numpy promises that stream for ever, but not that of its permutations.
    order = np.argsort(np.random.PCG64(int(seed)).random_raw(len(labels)), kind="stable")
    by_class = [order[labels[order] == c] for c in range(classes)]
    spare = [len(members) // 2 for members in by_class]
    drawn: list[list[NDArray[np.int64]]] = [[] for _ in sizes]
    taken = np.zeros(classes, dtype=np.int64)
    first = 0
    for part, size in zip(drawn, sizes, strict=True):
        share, more = divmod(size, classes)
        for step in range(classes):
            # The odd ones of this part fall to the classes after those of the part before it.
            c = (first + step) % classes
            wanted = min(share + (step < more), spare[c] - taken[c])
            part.append(by_class[c][taken[c] : taken[c] + wanted])
            taken[c] += wanted
        first = (first + more) % classes
    parts = [np.sort(np.concatenate(pieces)) for pieces in drawn]
    left = np.ones(len(labels), dtype=bool)
    left[np.concatenate(parts)] = False
    return [*parts, np.flatnonzero(left)]
