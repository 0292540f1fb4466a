"""A labelled set of images in memory, and the four parts that one data set is divided into."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from swiftsure.data.checks import check_labels, check_pixels
from swiftsure.errors import InputError

Index = Tensor | slice | Sequence[int] | NDArray[np.integer]


@dataclass(frozen=True, eq=False, repr=False)
class ImageSet(Dataset[tuple[Tensor, Tensor]]):
    """Images with their labels, whole in memory; float only a batch at a time. A torch ``Dataset``.

    Args:
        name: of the data set.
        images: (N, C, H, W), uint8 (0 to 255) or float32 in [0, 1].
        labels: int64, (N,), each in 0..len(classes) - 1.
        classes: the name of each class.
        subset: what part of the official set this is, where it is not all of it; results carry this line.

    Raises:
        InputError: images and labels that break one of these rules.
    """

    name: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    subset: str | None = None

    def __post_init__(self) -> None:
        check_pixels(self.images)
        check_labels(self.labels, len(self.images), len(self.classes))

    @classmethod
    def from_tensors(
        cls,
        x: Tensor,
        y: Tensor,
        classes: int | Sequence[str] | None = None,
        name: str = "tensors",
    ) -> ImageSet:
        """A set from a user's own tensors, which it shares where their types allow.

        Args:
            x: images, (N, C, H, W), uint8 (0 to 255) or any float type in [0, 1] (kept as float32).
            y: labels, any integer type, (N,).
            classes: how many classes, or their names; None: as many as the largest label asks for.
            name: what results call the set.

        Raises:
            InputError: wrong type, rank, shape or range, NaN, no image, or a label outside the classes.
        """
        check_pixels(x)
        if len(x) == 0:
            raise InputError("the set holds no image; at least one is needed")
        if classes is None:
            check_labels(y, len(x))
            classes = int(y.max()) + 1
        names = tuple(map(str, range(classes))) if isinstance(classes, int) else tuple(classes)
        check_labels(y, len(x), len(names))
        images = x.detach()
        if images.dtype != torch.uint8:
            # The rounding error that the check forgives must not reach code that relies on [0, 1].
            images = images.to(torch.float32).clamp(0, 1)
        return cls(name, images, y.detach().to(torch.int64), names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One image, float32 (C, H, W) in [0, 1], and its label, int64 ()."""
        return _as_float(self.images[index]), self.labels[index].clone()

    def __repr__(self) -> str:
        size = "x".join(map(str, self.shape))
        part = f", subset: {self.subset}" if self.subset else ""
        return f"ImageSet({self.name}: {len(self):,} images of {size}, {len(self.classes)} classes{part})"

    def batch(self, index: Index, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """Some of the images, ready for a network.

        The bytes travel to the device and become float there, a quarter of the traffic of the other order.

        Args:
            index: which ones: a tensor or array of numbers, a list, a boolean mask of length N or a slice.
            device: where to; None: where the set lies.

        Returns:
            x, float32 (B, C, H, W) in [0, 1], and y, int64 (B,). Both are copies.
        """
        index = self._here(index)
        x, y = self.images[index], self.labels[index]
        return _as_float(x.to(device)), y.to(device, copy=True)

    def select(self, index: Index) -> ImageSet:
        """The set of some of the images, in the order of the index (see ``batch`` for what it may be)."""
        index = self._here(index)
        return ImageSet(self.name, self.images[index], self.labels[index], self.classes, self.subset)

    def _here(self, index: Index) -> Tensor | slice:
        """An index that these tensors can be asked by, wherever it was made."""
        if isinstance(index, slice):
            return index
        if not isinstance(index, Tensor):
            index = torch.as_tensor(index, dtype=None if len(index) else torch.int64)
        return index.to(self.images.device)

    def sha256(self) -> str:
        """A digest of shape, type, pixels and labels in their order: equal sets, equal digests."""
        digest = hashlib.sha256(f"{tuple(self.images.shape)} {self.images.dtype}".encode())
        for tensor in (self.images, self.labels):
            digest.update(np.ascontiguousarray(tensor.cpu().numpy()).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Splits:
    """A data set divided: see ``swiftsure.data.load`` for what each part is for."""

    train: ImageSet
    val: ImageSet
    calibration: ImageSet
    test: ImageSet


def _as_float(images: Tensor) -> Tensor:
    """A float32 copy in [0, 1]."""
    if images.dtype == torch.uint8:
        return images.to(torch.float32).div_(255)
    return images.to(torch.float32, copy=True)
