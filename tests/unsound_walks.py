"""Walks over exits that promise too much, each by one plausible mistake: what tests of certificates must notice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from swiftsure.certificates._walk import Walk, rival_boxes, walk
from swiftsure.exits import Policy


def only_the_last_exit(boxes: Any, y: Tensor, policy: Policy, delta: float, logits: Any) -> Walk:
    """A verdict that ignores which exit fires."""
    found = walk(boxes, y, policy, delta, logits)
    return replace(found, margin=walk(boxes[-1:], y, Policy("entropy", []), delta, logits[-1:]).margin)


def without_widening(boxes: Any, y: Tensor, policy: Policy, delta: float, logits: Any) -> Walk:
    return walk(boxes, y, policy, 0.0, logits)


def where_the_image_leaves(boxes: Any, y: Tensor, policy: Policy, delta: float, logits: Any) -> Walk:
    """A cost that is that of the image itself."""
    return replace(walk(boxes, y, policy, delta, logits), max_exit=policy.exit_of(logits))


def up_to_where_the_image_leaves(boxes: Any, y: Tensor, policy: Policy, delta: float, logits: Any) -> Walk:
    found = walk(boxes, y, policy, delta, logits)
    before = torch.arange(len(boxes)) <= policy.exit_of(logits)[:, None]
    return replace(found, required=found.required & before)


WRONG_WALKS = (only_the_last_exit, without_widening, where_the_image_leaves, up_to_where_the_image_leaves)


def rival_at_its_lowest(low: Tensor, high: Tensor, rival: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The second look, with all others held below the *lower* end of the rival."""
    low, high, _ = rival_boxes(low, high, rival)
    high = torch.minimum(high, low.gather(1, rival[:, None])).scatter(
        1, rival[:, None], high.gather(1, rival[:, None])
    )
    return low, high, (low > high).any(1)


def rival_without_the_label(low: Tensor, high: Tensor, rival: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The second look, with the label's own entry, 0, forgotten when others are held below the rival."""
    low, high, empty = rival_boxes(low, high, rival)
    return low.clamp_min(0), high.clamp_min(0), empty


def rival_ahead_of_all(low: Tensor, high: Tensor, rival: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The second look at a box in which the rival is left out where another class may exceed it."""
    narrow_low, narrow_high, empty = rival_boxes(low, high, rival)
    return narrow_low, narrow_high, empty | (high.amax(1) > high.gather(1, rival[:, None])[:, 0])


WRONG_SECOND_LOOKS = (rival_at_its_lowest, rival_without_the_label, rival_ahead_of_all)
