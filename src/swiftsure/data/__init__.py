"""Data sets as tensors in memory: bytes at rest, float on the device a batch at a time."""

from swiftsure.data.augmentation import augment
from swiftsure.data.catalogue import data_root, found, load, names, path
from swiftsure.data.checks import check_batch
from swiftsure.data.download import fetch
from swiftsure.data.image_set import ImageSet, Splits

__all__ = [
    "ImageSet",
    "Splits",
    "augment",
    "check_batch",
    "data_root",
    "fetch",
    "found",
    "load",
    "names",
    "path",
]
