"""Certificates computed again, and compared verdict by verdict with those on disk."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from swiftsure import files
from swiftsure.certificates._certify import UNPROVEN, Certificate, _techniques, certify_by
from swiftsure.certificates._storage import NAME, read
from swiftsure.data import ImageSet
from swiftsure.errors import InputError, SoundnessError
from swiftsure.models.storage import WEIGHTS, read_weights

CHUNK = 500
"""Images that are float at once."""

NEEDED = 0.5
"""The share of delta that a recomputed margin must exceed. Other batch sizes and machines round otherwise; delta is
many times the rounding that was measured, and half of it is kept for this."""

TOLERANCE = 1e-3
"""How far a recomputed margin m may lie from the stated one, in units of 1 + |m|."""
CLIMBING = 0.05
"""The same where an ascent found the margin, which ends at another height in other batches."""


@dataclass(frozen=True)
class Recheck:
    """What a recheck that found nothing wrong has compared.

    Attributes:
        n: samples.
        certified: of these, certified, and proven again.
        largest_difference: the largest difference of a margin from the stated one.
        seconds: wall time.
    """

    n: int
    certified: int
    largest_difference: float
    seconds: float


def recheck(
    net: nn.Module,
    folder: str | Path,
    images: ImageSet,
    *,
    limit: int | None = None,
    batch: int | None = None,
    tolerance: float = TOLERANCE,
) -> Recheck:
    """Prove again what ``folder/certificates.jsonl`` claims, with the ball and the slack that it states.

    Each sample is bounded by the method that its line names, an unproven one by the method that was asked for.

    Args:
        net: the network of ``folder/model.safetensors``, as `swiftsure.load` returns it.
        folder: holds certificates.jsonl and model.safetensors.
        images: the set that was certified: the same images and labels in the same order.
        limit: only the first so many samples; None: all.
        batch: as in `certify`; it need not be what the file was made with.
        tolerance: margins may differ by this times 1 + |margin|; those of alpha-crown by `CLIMBING`.

    Raises:
        InputError: the file cannot be trusted, weights or data are not those it was made with, or what it says of
            a sample is not what comes out, without promising too much.
        SoundnessError: a certified sample cannot be proven again, or costs more than the file promises.
    """
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise InputError(f"limit is {limit!r}; allowed: an integer >= 1, or None for all samples")
    start = time.perf_counter()
    folder = Path(folder)
    stated = read(folder)
    _check_weights(net, folder, stated.weights_sha256)
    if images.sha256() != stated.data_sha256:
        raise InputError(
            f"these {len(images)} images are not the {len(stated.certificate)} that {folder / NAME} is about; "
            "pass the same images and labels in the same order"
        )
    claimed = stated.certificate
    count = len(images) if limit is None else min(limit, len(images))
    largest = 0.0
    for index in torch.arange(count).split(CHUNK):
        x, _ = images.batch(index)
        # By method, so that a margin near delta is never compared with one of another technique.
        for name in sorted({claimed.method[i] for i in index.tolist()}):
            here = torch.tensor([claimed.method[i] == name for i in index.tolist()])
            chosen = index[here]
            # What a proof rests on is all that had been tried by then: its own technique and the cheaper ones.
            names = _techniques(claimed.asked)
            fresh = certify_by(
                names if name == UNPROVEN else names[: names.index(name) + 1],
                net,
                x[here],
                claimed.label[chosen],
                claimed.ball,
                claimed.policy,
                asked=claimed.asked,
                delta=NEEDED * claimed.delta,
                batch=batch,
                frugal=name == UNPROVEN and claimed.asked == "auto",
            )
            largest = max(largest, _compare(claimed, fresh, chosen, tolerance))
    return Recheck(count, int(claimed.certified[:count].sum()), largest, time.perf_counter() - start)


def _check_weights(net: nn.Module, folder: Path, stated: str) -> None:
    path = folder / WEIGHTS
    if not path.is_file():
        raise InputError(
            f"{folder} has no {WEIGHTS}; the certificates are about weights that must stand beside them"
        )
    if files.sha256(path) != stated:
        raise InputError(f"{path} has changed since {NAME} was written; certify the new weights")
    stored, own = read_weights(path), net.state_dict()
    # Bytes, not values: NaN equals itself here, and 0.0 is not -0.0.
    if stored.keys() != own.keys() or not all(_same(stored[name], own[name]) for name in stored):
        raise InputError(f"the network does not hold the weights of {path}; load it with swiftsure.load")


def _same(first: Tensor, second: Tensor) -> bool:
    second = second.detach().to(first.device).contiguous()
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(first.contiguous().view(-1).view(torch.uint8), second.view(-1).view(torch.uint8))


def _compare(claimed: Certificate, fresh: Certificate, index: Tensor, tolerance: float) -> float:
    """The largest difference of a margin, once every verdict holds. ``index``: which samples of the file."""
    columns = (fresh.certified, fresh.margin, fresh.max_exit, fresh.max_macs)
    largest = 0.0
    for i, proven, margin, max_exit, max_macs in zip(
        index.tolist(), *(column.tolist() for column in columns), strict=True
    ):
        sample = f"{NAME}: sample {i} (label {int(claimed.label[i])})"
        stated = float(claimed.margin[i])
        if claimed.certified[i] and not proven:
            raise SoundnessError(
                f"{sample} is certified by {claimed.method[i]} with margin {stated:.6g}, but cannot be proven again: "
                f"its margin is {margin:.6g}; needed: more than {NEEDED * claimed.delta:.3g}"
            )
        for what, promise, cost in (
            ("exit", int(claimed.max_exit[i]), max_exit),
            ("MACs", int(claimed.max_macs[i]), max_macs),
        ):
            if promise != cost:
                line = f"{sample} states the largest {what} as {promise}, but it is {cost}"
                raise SoundnessError(line) if promise < cost else InputError(line)
        if math.isfinite(stated) and math.isfinite(margin):
            difference = abs(margin - stated)
            # An ascent ends at another height in other batches.
            technique = claimed.asked if claimed.method[i] == UNPROVEN else claimed.method[i]
            allowed = max(tolerance, CLIMBING) if technique in ("auto", "alpha-crown") else tolerance
            if difference > allowed * (1 + abs(margin)):
                raise InputError(f"{sample} has margin {stated:.6g} in the file, but it is {margin:.6g}")
            largest = max(largest, difference)
    return largest
