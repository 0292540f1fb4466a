"""The data sets by name: where each may lie, and how to read it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from swiftsure.data import cifar, digits, folder, idx, tiny_imagenet
from swiftsure.data.image_set import Splits
from swiftsure.data.splits import OfficialParts, split
from swiftsure.errors import InputError

ENVIRONMENT = "SWIFTSURE_DATA"


@dataclass(frozen=True)
class Layout:
    """How one set lies under the data root.

    Args:
        places: folders to look in, relative to the root (or absolute), in this order; "." is the root itself.
            The first is where a download goes.
        missing: what a folder lacks of the set; nothing means that the set is there.
        read: reads that folder.
        how_to_get: the end of the line that reports a missing set.
        refusal: why what lies under the root is not usable, if there is something to say.
    """

    places: tuple[str, ...]
    missing: Callable[[Path], list[str]]
    read: Callable[[Path], OfficialParts]
    how_to_get: str
    refusal: Callable[[Path], str | None] = lambda root: None


def _fetch(name: str) -> str:
    return f"get it with `swiftsure data fetch {name}`"


LAYOUTS = {
    "digits": Layout((digits.place(),), digits.missing, digits.read, "it comes with scikit-learn"),
    "mnist": Layout(("MNIST/raw", "mnist", "MNIST", "."), idx.missing, idx.read_mnist, _fetch("mnist")),
    "fashion_mnist": Layout(
        ("FashionMNIST/raw", "fashion_mnist", "FashionMNIST", "."),
        idx.missing,
        idx.read_fashion_mnist,
        _fetch("fashion_mnist"),
    ),
    "cifar10": Layout(
        ("cifar-10-batches-bin", "."), cifar.missing, cifar.read, _fetch("cifar10"), cifar.refusal
    ),
    "tiny_imagenet": Layout(
        ("tiny-imagenet-200", "."), tiny_imagenet.missing, tiny_imagenet.read, _fetch("tiny_imagenet")
    ),
    "folder": Layout(
        (".",), folder.missing, folder.read, "it is your own data, as train/<class>/* and test/<class>/*"
    ),
}


def names() -> tuple[str, ...]:
    """The names that ``load`` knows."""
    return tuple(LAYOUTS)


def data_root(root: str | os.PathLike[str] | None = None) -> Path:
    """Where data sets are looked for: the argument, else $SWIFTSURE_DATA, else ~/.cache/swiftsure."""
    return Path(root or os.environ.get(ENVIRONMENT) or "~/.cache/swiftsure").expanduser()


def path(name: str, root: str | os.PathLike[str] | None = None) -> Path:
    """The folder that holds a set.

    Args:
        name: one of ``names()``.
        root: the data root (see ``data_root``); it may also be the set's own folder.

    Raises:
        InputError: an unknown name, or no such set: the line says where it was looked for and how to get it.
    """
    layout = _layout(name)
    base = data_root(root)
    for place in layout.places:
        if not layout.missing(base / place):
            return base / place
    refusal = layout.refusal(base)
    if refusal is not None:
        raise InputError(refusal)
    begun = next((base / p for p in layout.places if p != "." and (base / p).is_dir()), None)
    lacks = f" ({begun} lacks {', '.join(layout.missing(begun))})" if begun is not None else ""
    raise InputError(
        f"data set {name} not found in {base}, looked for in {', '.join(layout.places)}{lacks}; "
        f"{layout.how_to_get}, or name the folder that holds it with --data or ${ENVIRONMENT}"
    )


def found(root: str | os.PathLike[str] | None = None) -> dict[str, Path]:
    """The sets that are there, with their folders."""
    there = {}
    for name in LAYOUTS:
        try:
            there[name] = path(name, root)
        except InputError:
            continue
    return there


def load(name: str, root: str | os.PathLike[str] | None = None, seed: int = 0) -> Splits:
    """Read a data set into memory and divide it.

    ============= ========================================================================================
    train         to learn from: the training images that the two next parts leave
    val           for the mixing controller and the choice of the checkpoint
    calibration   for thresholds of exits, and nothing else
    test          only ever reported: the official test images (Tiny ImageNet: its val; digits: 360 fixed)
    ============= ========================================================================================

    val and calibration are class-balanced draws of 2,500 training images each (of a set of fewer than 20,000:
    a twentieth each). Equal seeds give equal draws; the test part does not depend on the seed.

    Args:
        name: one of ``names()``.
        root: the data root (see ``data_root``); it may also be the set's own folder.
        seed: of the draw, an integer >= 0.

    Raises:
        InputError: an unknown or missing set, a damaged file, or a seed that is not an integer >= 0.
    """
    place = path(name, root)
    return split(name, _layout(name).read(place), seed)


def _layout(name: str) -> Layout:
    try:
        return LAYOUTS[name]
    except (KeyError, TypeError):
        raise InputError(f"data set is {name!r}; allowed: {', '.join(LAYOUTS)}") from None
