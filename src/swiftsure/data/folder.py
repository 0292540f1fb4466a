"""A user's own images: one directory a class, under train/ and test/."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from swiftsure.data.decoding import SUFFIXES, decode, inspect
from swiftsure.data.splits import OfficialParts
from swiftsure.errors import InputError

PARTS = ("train", "test")


def missing(folder: Path) -> list[str]:
    """Which of train/ and test/ are not there."""
    return [part for part in PARTS if not (folder / part).is_dir()]


def read(folder: Path) -> OfficialParts:
    """Read train/<class>/* and test/<class>/*, both with the same classes, sorted by name.

    All images must have one size. They are grey if every one of them is, else RGB; transparency is dropped
    and an orientation tag is not followed. Hidden files and files with a foreign suffix are passed over.
    """
    listings = {part: _list(folder / part) for part in PARTS}
    classes = tuple(listings["train"])
    odd = sorted(set(listings["train"]) ^ set(listings["test"]))
    if odd:
        raise InputError(
            f"{folder} has class {odd[0]!r} in only one of train/ and test/; both must have the same"
        )
    paths = {part: [path for files in listings[part].values() for path in files] for part in PARTS}
    labels = {
        part: np.repeat(np.arange(len(classes)), [len(files) for files in listings[part].values()])
        for part in PARTS
    }
    size, _ = inspect(paths["train"][0])
    channels = 1 if all(inspect(path)[1] == 1 for part in PARTS for path in paths[part]) else 3
    train, test = (decode(paths[part], size, channels, f"reading {part}") for part in PARTS)
    return OfficialParts(train, labels["train"], test, labels["test"], classes)


def _list(part: Path) -> dict[str, list[str]]:
    """The image files of each class, classes and files sorted by name."""
    try:
        folders = sorted(path for path in part.iterdir() if path.is_dir() and not path.name.startswith("."))
        listing = {folder.name: _images(folder) for folder in folders}
    except OSError as error:
        raise InputError(f"{part} cannot be read: {error.strerror}") from None
    if not listing:
        raise InputError(f"{part} holds no folder; there must be one for each class")
    return listing


def _images(folder: Path) -> list[str]:
    files = sorted(
        str(path)
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if not files:
        raise InputError(f"{folder} holds no image; allowed: {', '.join(SUFFIXES)}")
    return files
