"""Certificates computed again, and compared verdict by verdict with those on disk."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from swiftsure import files
from swiftsure.certificates._certify import Certificate, _techniques
from swiftsure.certificates._plain_bounds import Box
from swiftsure.certificates._plain_network import Unreadable, read_plainly
from swiftsure.certificates._plain_walk import Walked, answer_plainly, exit_plainly, walk_plainly
from swiftsure.certificates._proof import UNPROVEN
from swiftsure.certificates._provers import DoubleProver, PlainProver, Prover, SampleBounds
from swiftsure.certificates._storage import NAME, CertificateFile, image_sha256, policy_sha256, read
from swiftsure.data import ImageSet
from swiftsure.data.progress import progress
from swiftsure.errors import InputError, SoundnessError
from swiftsure.exits import Policy
from swiftsure.models.storage import WEIGHTS, read_weights

NEEDED = 0.5
"""The share of delta that a recomputed margin must exceed, and by which boxes are widened again. Certificates are made
in float32; delta is many times the rounding that was measured, and half of it is kept for this."""

TOLERANCE = 1e-3
"""How far a recomputed margin m may lie from the stated one, in units of 1 + |m|."""
CLIMBING = 0.05
"""The same where an ascent found the margin and has to find it again."""


@dataclass(frozen=True)
class Recheck:
    """What a recheck that found nothing wrong has compared.

    Attributes:
        n: samples.
        certified: of these, certified, and proven again.
        by_reference: of these, bounded by the plain reference; all or none.
        reason: why the network could not be read by the reference; None where it could.
        largest_difference: the largest difference of a certified sample's margin from the stated one.
        seconds: wall time.
    """

    n: int
    certified: int
    by_reference: int
    reason: str | None
    largest_difference: float
    seconds: float


def recheck(
    net: nn.Module,
    folder: str | Path,
    images: ImageSet,
    *,
    limit: int | None = None,
    tolerance: float = TOLERANCE,
) -> Recheck:
    """Prove again what ``folder/certificates.jsonl`` claims, with the ball, the policy and the slack that it states.

    All is computed in float64, one sample at a time: by reference code that shares nothing with the bounds that made
    the file (`_plain_network` says how) and takes slopes as they are stored, or, for a network with other operations
    than affine ones and ReLU or with larger matrices than `MOST_NONZEROS`, by those bounds themselves. Techniques are
    intersected as they were, up to the one that a sample's line names, or until they give what it claims; the margin
    of an unproven sample is not compared if only an ascent could reach it, since nothing rests on it.

    Args:
        net: the network of ``folder/model.safetensors``, as `swiftsure.load` returns it.
        folder: holds certificates.jsonl and model.safetensors.
        images: the set that was certified: the same images and labels in the same order.
        limit: only the first so many samples; None: all.
        tolerance: margins may differ by this times 1 + |margin|.

    Raises:
        InputError: the file cannot be trusted, weights, data or thresholds are not those it was made with, or what it
            says of a sample is not what comes out, without promising too much.
        SoundnessError: a certified sample cannot be proven again, or costs more than the file promises.
    """
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise InputError(f"limit is {limit!r}; allowed: an integer >= 1, or None for all samples")
    start = time.perf_counter()
    folder = Path(folder)
    stated = read(folder)
    _check_weights(net, folder, stated.weights_sha256)
    _check_policy(net, folder, stated)
    if images.sha256() != stated.data_sha256:
        raise InputError(
            f"these {len(images)} images are not the {len(stated.certificate)} that {folder / NAME} is about; "
            "pass the same images and labels in the same order"
        )
    count = len(images) if limit is None else min(limit, len(images))
    prover, reason = _prover(net, tuple(images.batch(slice(0, 1))[0].shape[1:]))
    largest = 0.0
    with progress("recheck", count) as advance:
        for index in range(count):
            if image_sha256(images, index) != stated.image_sha256[index]:
                raise InputError(f"{NAME}: sample {index} is about another image")
            bounds = prover.sample(images.batch(slice(index, index + 1))[0][0], stated.certificate.ball)
            again = _Again(stated.certificate, index, bounds, prover, tolerance)
            largest = max(largest, again.compare())
            advance(1)
    return Recheck(
        n=count,
        certified=int(stated.certificate.certified[:count].sum()),
        by_reference=count if reason is None else 0,
        reason=reason,
        largest_difference=largest,
        seconds=time.perf_counter() - start,
    )


def _prover(net: nn.Module, shape: tuple[int, ...]) -> tuple[Prover, str | None]:
    """The reference if it can read the network, else the ordinary bounds, and why."""
    try:
        return PlainProver(read_plainly(net, shape)), None
    except Unreadable as why:
        return DoubleProver(net, shape), str(why)


class _Again:
    """One sample, bounded again.

    Args:
        claimed: what the file says.
        index: which sample.
        bounds: over the ball around its image.
        prover: where they come from.
        tolerance: of margins.
    """

    def __init__(
        self, claimed: Certificate, index: int, bounds: SampleBounds, prover: Prover, tolerance: float
    ) -> None:
        self.claimed, self.index, self.bounds, self.prover = claimed, index, bounds, prover
        self.certified = bool(claimed.certified[index])
        self.margin = float(claimed.margin[index])
        self.method, self.label = claimed.method[index], int(claimed.label[index])
        self.exits = [int(exit) for exit in claimed.required[index].nonzero()]
        self.max_exit, self.max_macs = int(claimed.max_exit[index]), int(claimed.max_macs[index])
        self.slopes = claimed.slopes[index]
        # What is misclassified as it is has no margin, and is bounded for its cost about what the network answers.
        right = self.certified or math.isfinite(self.margin)
        self.about = self.label if right else answer_plainly(bounds.logits, claimed.policy)
        self.tried, self.climbed = 0, False
        self.tolerance = tolerance

    def compare(self) -> float:
        """The difference of a proof's margin, once what the file says lies between what is proven and what may be.

        Raises:
            SoundnessError, InputError: as `recheck`.
        """
        for boxes in self._ladder():
            found, margin = self._walk(boxes, NEEDED), self._best_margin(boxes)
            fault = self._fault(found)
            if fault is None and not self._falls_short(margin):
                break
        if fault is None and self._falls_short(margin) and not self._needs_ascent:
            fault = self._other_margin(margin)
        fault = fault or self._slighted(self._walk(boxes, 2 - NEEDED), margin)
        if fault is not None:
            raise fault
        difference = abs(margin - self.margin)
        # What is not proven is bounded until it comes near, and no further.
        return difference if self.certified and difference <= self._allowed else 0.0

    def _best_margin(self, boxes: list[Box]) -> float:
        """The margin that comes nearest to the stated one from above, or the largest.

        With several exits it depends on which rivals the second look is asked about, and so, by leaps, on rounding.
        """
        shares = (1.0,) if len(boxes) == 1 else (1.0, NEEDED, 2 - NEEDED)
        best = -math.inf
        for share in shares:
            best = max(best, self._walk(boxes, share).margin)
            if not self._falls_short(best):
                break
        return best

    def _ladder(self) -> Iterator[list[Box]]:
        """Boxes that are narrowed by one technique after the other, from the one on that the line names.

        A dearer technique narrows one exit at a time, and no further where an exit fails, as `_certify` does; then all
        of them, which proves no less.
        """
        names = list(_techniques(self.claimed.asked))
        whole = np.full(len(self.bounds.logits[0]), np.inf)
        boxes = [(-whole, whole)] * len(self.bounds.logits)
        most = boxes
        named = 0 if self.method == UNPROVEN else names.index(self.method)
        if self.method == UNPROVEN:
            yield boxes
        for number, name in enumerate(names):
            narrower = self.bounds.differences(name, self.about, self.slopes)
            most = [_meet(box, found) for box, found in zip(most, narrower, strict=True)]
            self.tried = number + 1
            self.climbed = name == "alpha-crown" and not self.prover.reads_slopes
            if number == 0:
                boxes = most
            elif len(boxes) > 1:
                order = self._order(name)
                for place, exit in enumerate(order):
                    found = self._walk(boxes, 1.0)
                    if exit in found.open and not set(found.failing) & set(order[:place]):
                        boxes = [*boxes[:exit], _meet(boxes[exit], narrower[exit]), *boxes[exit + 1 :]]
                        if number >= named:
                            yield boxes
            if number >= named:
                yield most

    def _order(self, name: str) -> list[int]:
        """In which order exits are asked about: up to where the image leaves, the last one first; then the others."""
        last = len(self.bounds.logits) - 1
        leaves = last if name == "alpha-crown" else exit_plainly(self.bounds.logits, self.claimed.policy)
        return [*range(leaves, -1, -1), *range(last, leaves, -1)]

    def _walk(self, boxes: list[Box], share: float) -> Walked:
        return walk_plainly(
            boxes, self.about, self.claimed.policy, share * self.claimed.delta, self.bounds.logits
        )

    @property
    def _what(self) -> str:
        return f"{NAME}: sample {self.index} (label {self.label})"

    @property
    def _allowed(self) -> float:
        """How far a margin may lie from the stated one."""
        share = max(self.tolerance, CLIMBING) if self.climbed else self.tolerance
        return share * (1 + abs(self.margin)) if math.isfinite(self.margin) else 0.0

    def _fault(self, found: Walked) -> Exception | None:
        """What the file promises too much, given the best that is proven."""
        needed = NEEDED * self.claimed.delta
        if self.certified and not found.margin > needed:
            return SoundnessError(
                f"{self._what} is certified by {self.method} with margin {self.margin:.6g}, but cannot be proven "
                f"again: its margin is {found.margin:.6g}; needed: more than {needed:.3g}"
            )
        if found.max_exit > self.max_exit:
            return SoundnessError(
                f"{self._what} states the largest exit as {self.max_exit}, but it is {found.max_exit}"
            )
        if not set(found.required) <= set(self.exits):
            return SoundnessError(
                f"{self._what} states that images leave by exits {self.exits}, but they may by {found.required}"
            )
        macs = self.prover.macs[self.max_exit]
        if self.max_macs != macs:
            line = f"{self._what} states the largest MACs as {self.max_macs}, but exit {self.max_exit} costs {macs}"
            return SoundnessError(line) if self.max_macs < macs else InputError(line)
        return None

    def _falls_short(self, margin: float) -> bool:
        """Whether a margin is less than the stated one; -inf states nothing."""
        return margin < self.margin - self._allowed

    @property
    def _needs_ascent(self) -> bool:
        """Whether an ascent whose slopes were not kept may have found the margin of a sample that is not proven."""
        return not self.certified and self.slopes is None and "alpha-crown" in _techniques(self.claimed.asked)

    def _slighted(self, found: Walked, margin: float) -> InputError | None:
        """What the file states as worse than the least that is proven: no danger, but not what was computed."""
        if not self.tried or self.climbed:
            return None
        if found.max_exit < self.max_exit or not set(self.exits) <= set(found.required):
            return InputError(
                f"{self._what} states exits {self.exits} and the last as {self.max_exit}, but they are "
                f"{found.required} and {found.max_exit}"
            )
        # With several exits a dearer technique may leave a smaller margin: it asks about other rivals.
        alone = len(self.bounds.logits) == 1
        if alone and math.isfinite(self.margin) and margin > self.margin + self._allowed:
            return self._other_margin(margin)
        return None

    def _other_margin(self, margin: float) -> InputError:
        return InputError(f"{self._what} has margin {self.margin:.6g} in the file, but it is {margin:.6g}")


def _meet(first: Box, second: Box) -> Box:
    """The box that two boxes have in common."""
    return np.fmax(first[0], second[0]), np.fmin(first[1], second[1])


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


def _check_policy(net: nn.Module, folder: Path, stated: CertificateFile) -> None:
    policy = getattr(net, "policy", None)
    own = policy if isinstance(policy, Policy) and policy.exits > 1 else None
    if policy_sha256(own) != stated.policy_sha256:
        now, then = (
            "none" if one is None else f"{one.rule} {list(one.thresholds)}"
            for one in (own, stated.certificate.policy)
        )
        raise InputError(
            f"the network's thresholds are {now}, those that {folder / NAME} is about {then}; certify the new ones"
        )
