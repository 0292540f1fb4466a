"""Tiny ImageNet (ImageNet-200) from its official folders, decoded once."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from glob import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from swiftsure.data.decoding import decode
from swiftsure.data.splits import OfficialParts
from swiftsure.errors import InputError

ENTRIES = ("wnids.txt", "train", "val/images", "val/val_annotations.txt")
SUBSET_MARK = "SUBSET.txt"

_SIZE = (64, 64)


def missing(folder: Path) -> list[str]:
    """Which parts of the official folder are not there."""
    return [entry for entry in ENTRIES if not (folder / entry).exists()]


def read(folder: Path) -> OfficialParts:
    """The training images, and as test part the official validation images (the official test has no labels).

    Classes are the wnids in sorted order, named by the first word of words.txt. Training images come class by
    class, sorted by file name; test images in the order of val_annotations.txt. A SUBSET.txt in the folder
    says what part of the official training set is there.

    The decoded images are kept beside the folder as ``<folder>.<digest>.npy``. The digest is of the names,
    sizes and times of all image files, so that a changed folder is decoded again; where nothing can be
    written, the images are decoded every time.
    """
    wnids = sorted(_lines(folder / "wnids.txt"))
    if not wnids or len(set(wnids)) != len(wnids):
        raise InputError(f"{folder / 'wnids.txt'} must name every class once")
    number = {wnid: i for i, wnid in enumerate(wnids)}
    train = {wnid: _files(folder / "train" / wnid / "images") for wnid in wnids}
    train_labels = np.repeat(np.arange(len(wnids)), [len(files) for files in train.values()])
    annotated = _annotations(folder / "val" / "val_annotations.txt", number)
    val = _files(folder / "val" / "images")
    absent = sorted(set(annotated) - set(val))
    if absent:
        raise InputError(f"{folder / 'val' / 'images'} has no {absent[0]}, which val_annotations.txt names")
    listed = [entry for files in train.values() for entry in files.values()]
    listed += [val[name] for name in annotated]
    images = _decoded(folder, listed)
    return OfficialParts(
        images[: len(train_labels)],
        train_labels,
        images[len(train_labels) :],
        np.array(list(annotated.values()), dtype=np.int64),
        _class_names(folder / "words.txt", wnids),
        _subset(folder / SUBSET_MARK),
    )


def _decoded(folder: Path, files: list[os.DirEntry[str]]) -> NDArray[np.uint8]:
    """The images of the files, (N, 3, 64, 64): mapped from the cache, or decoded and then cached."""
    digest = hashlib.sha256()
    for file in files:
        status = file.stat()
        # Relative, so that a moved folder keeps its cache.
        name = os.path.relpath(file.path, folder)
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    # Absolute first: a root given as "." has no name to put the cache beside.
    folder = folder.absolute()
    cache = folder.with_name(f"{folder.name}.{digest.hexdigest()[:16]}.npy")
    shape = (len(files), 3, *_SIZE)
    with suppress(OSError, ValueError, EOFError):
        images = np.load(cache, mmap_mode="r", allow_pickle=False)
        if images.shape == shape and images.dtype == np.uint8:
            return images
    images = decode([file.path for file in files], _SIZE, 3, f"decoding {folder.name}")
    _keep(images, cache)
    return images


def _keep(images: NDArray[np.uint8], cache: Path) -> None:
    """Write the cache as a whole or not at all, and drop those of earlier states of the folder."""
    part = cache.with_suffix(f".{os.getpid()}.part")
    name = cache.name.removesuffix(".npy").rpartition(".")[0]
    try:
        with part.open("xb") as file:
            np.save(file, images, allow_pickle=False)
        part.replace(cache)
        for old in cache.parent.glob(f"{escape(name)}.{'[0-9a-f]' * 16}.npy"):
            if old != cache:
                old.unlink()
    except OSError:
        # A read-only or full disk costs time at the next run, nothing else.
        return
    finally:
        with suppress(OSError):
            part.unlink()


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def _files(folder: Path) -> dict[str, os.DirEntry[str]]:
    """The JPEG files of a folder by name, sorted."""
    try:
        with os.scandir(folder) as entries:
            found = {e.name: e for e in entries if e.name.lower().endswith((".jpeg", ".jpg"))}
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from None
    if not found:
        raise InputError(f"{folder} holds no JPEG image")
    return dict(sorted(found.items()))


def _annotations(path: Path, number: dict[str, int]) -> dict[str, int]:
    """The class number of each validation image, by file name, in the order of the file."""
    labels: dict[str, int] = {}
    for line in _lines(path):
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in number or name in labels:
            raise InputError(
                f"{path} has a line {line!r}; each must name a new image and a class of wnids.txt"
            )
        labels[name] = number[wnid]
    if not labels:
        raise InputError(f"{path} names no image")
    return labels


def _class_names(path: Path, wnids: list[str]) -> tuple[str, ...]:
    """The first word of each class; the wnids if words.txt is missing or two classes would share a name."""
    if not path.exists():
        return tuple(wnids)
    words = dict(line.split("\t", 1) for line in _lines(path) if "\t" in line)
    names = tuple(words.get(wnid, wnid).split(",")[0].strip() for wnid in wnids)
    return names if len(set(names)) == len(names) else tuple(wnids)


def _subset(path: Path) -> str | None:
    if not path.exists():
        return None
    lines = _lines(path)
    return lines[0] if lines else "part of the official training set"
