"""Where batches come from: an `ImageSet`, a pair of tensors, any torch Dataset, or a DataLoader."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from swiftsure.data import ImageSet, check_batch
from swiftsure.data.checks import check_labels
from swiftsure.errors import InputError


class Source(Protocol):
    """Batches for one epoch."""

    steps: int
    """How many batches an epoch has."""
    shape: tuple[int, int, int] | None
    """(channels, height, width) where it is known before the first batch."""

    def epoch(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """(x, y) batches: float32 (batch, channels, height, width) in [0, 1] and int64 (batch,), on the device."""


class _InMemory:
    def __init__(self, images: ImageSet, batch: int, device: torch.device) -> None:
        self.images, self.batch, self.device = images, min(batch, len(images)), device
        self.steps = len(images) // self.batch
        self.shape: tuple[int, int, int] | None = images.shape

    def epoch(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in _order(len(self.images), self.steps, self.batch, generator):
            x, y = self.images.batch(chosen, self.device)
            yield x, y


class _Loader:
    """A user's DataLoader: its order, its workers and its transforms are the user's."""

    def __init__(self, loader: DataLoader[Any], device: torch.device, classes: int | None) -> None:
        self.loader, self.device, self.classes = loader, device, classes
        self.steps = len(loader)
        self.shape: tuple[int, int, int] | None = None
        if not self.steps:
            raise InputError("the DataLoader has no batch; check its data set, batch_size and drop_last")

    def epoch(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        for item in self.loader:
            x, y = _pair(item)
            check_batch(x, y, classes=self.classes)
            x, y = x.to(self.device), y.to(self.device, torch.int64)
            yield x, y


class _Items:
    """A user's Dataset, item by item in our order, so that its own random transforms act anew each time."""

    def __init__(
        self,
        items: Dataset[Any],
        batch: int,
        device: torch.device,
        classes: int | None,
    ) -> None:
        self.items, self.device, self.classes = items, device, classes
        self.count = len(items)  # type: ignore[arg-type]
        if not self.count:
            raise InputError("the Dataset is empty")
        self.batch = min(batch, self.count)
        self.steps = self.count // self.batch
        self.shape: tuple[int, int, int] | None = None

    def epoch(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in _order(self.count, self.steps, self.batch, generator):
            x, y = _collate(self.items, chosen.tolist())
            check_batch(x, y, classes=self.classes)
            x, y = x.to(self.device), y.to(self.device)
            yield x, y


def _order(count: int, steps: int, batch: int, generator: torch.Generator) -> Tensor:
    """Numbers of the images of each batch, in random order: (steps, batch). A last, smaller batch is left out:
    another order next epoch leaves out other images."""
    return torch.randperm(count, generator=generator)[: steps * batch].view(steps, batch)


def source(data: Any, batch: int, device: torch.device, classes: int | None = None) -> Source:
    """Training batches from whatever the user has.

    Args:
        data: an ImageSet, a pair of tensors (x, y), a torch Dataset of (image, label), or a DataLoader (which brings
            its own batch size and order).
        batch: images a step.
        device: where the batches go.
        classes: of the network: a label beyond them is refused, at once where all labels are at hand.

    Raises:
        InputError: data of another kind, or images and labels that break the rules of `check_batch`.
    """
    _require_length(data)
    if isinstance(data, DataLoader):
        return _Loader(data, device, classes)
    if isinstance(data, Dataset) and not isinstance(data, ImageSet):
        return _Items(data, batch, device, classes)
    images = as_set(data)
    if classes is not None:
        check_labels(images.labels, len(images), classes)
    return _InMemory(images, batch, device)


def as_set(data: Any) -> ImageSet:
    """The whole of a user's data in memory, for validation.

    Args:
        data: as in `source`.

    Raises:
        InputError: as in `source`.
    """
    if isinstance(data, ImageSet):
        return data
    if _is_pair(data):
        return ImageSet.from_tensors(*data)
    if isinstance(data, DataLoader):
        pairs = [_pair(item) for item in data]
        if not pairs:
            raise InputError("the DataLoader has no batch; check its data set, batch_size and drop_last")
        return ImageSet.from_tensors(torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs]))
    if isinstance(data, Dataset):
        _require_length(data)
        if not len(data):  # type: ignore[arg-type]
            raise InputError("the Dataset is empty")
        return ImageSet.from_tensors(*_collate(data, range(len(data))))  # type: ignore[arg-type]
    raise InputError(
        f"data of type {type(data).__name__} cannot be used; allowed: (images, labels) tensors, a Dataset of "
        "(image, label), or a DataLoader"
    )


def _require_length(data: Any) -> None:
    """An epoch needs an end: streams have none that is known."""
    items = data.dataset if isinstance(data, DataLoader) else data
    if isinstance(items, IterableDataset) and not hasattr(items, "__len__"):
        raise InputError(f"{type(items).__name__} is a stream of unknown length; allowed: data with a len()")


def _is_pair(data: Any) -> bool:
    return (
        isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)
    )


def _pair(item: Any) -> tuple[Tensor, Tensor]:
    if not _is_pair(item):
        raise InputError(
            "a batch must be a pair of tensors: images (batch, channels, height, width) and labels (batch,)"
        )
    return item[0], item[1]


def _collate(items: Any, chosen: Any) -> tuple[Tensor, Tensor]:
    images, labels = zip(*[items[i] for i in chosen], strict=True)
    try:
        x = torch.stack([torch.as_tensor(image) for image in images])
        y = torch.as_tensor([int(label) for label in labels])
    except (TypeError, ValueError, RuntimeError) as error:
        line = str(error).splitlines()[0]
        raise InputError(
            f"the Dataset's items are not (image tensor, integer label) pairs of one shape: {line}"
        ) from None
    check_batch(x, y)
    return x, y
