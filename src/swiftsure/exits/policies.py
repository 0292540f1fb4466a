"""When an input leaves: rules on the logits of an exit, with a threshold for each exit but the last.

All is computed in float64 from the logits. Float32 logits differ between batch sizes by about 1e-6; the rule
itself should add nothing to that.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swiftsure.errors import InputError
from swiftsure.suggestion import unknown


def entropy(logits: Tensor) -> Tensor:
    """The softmax entropy of logits (B, classes) in nats: (B,) float64, from 0 to ln(classes)."""
    return torch.special.entr(torch.softmax(logits, 1, dtype=torch.float64)).sum(1)


def confidence(logits: Tensor) -> Tensor:
    """The largest softmax probability of logits (B, classes): (B,) float64."""
    return torch.softmax(logits, 1, dtype=torch.float64).amax(1)


@dataclass(frozen=True)
class Rule:
    """A score of logits, which way it points, and the values that a threshold may have.

    Attributes:
        score: (B, classes) -> (B,) float64.
        sign: 1 where an input leaves below the threshold, -1 where it leaves above.
        highest: the largest threshold that makes sense.
        allowed: the same in words.
    """

    score: Callable[[Tensor], Tensor]
    sign: int
    highest: float
    allowed: str


RULES = {
    "entropy": Rule(entropy, 1, math.inf, "finite numbers >= 0, in nats"),
    "confidence": Rule(confidence, -1, 1.0, "numbers from 0 to 1, probabilities"),
}
"""By name. RDI-Nets' (Hu et al. 2020) is entropy: leave at the first exit whose entropy is below its threshold.
Confidence: leave at the first exit whose largest probability is above it."""


@dataclass(frozen=True)
class Policy:
    """A rule, and a threshold for each exit but the last, which takes whatever is left.

    Comparisons are strict, and NaN never leaves: a threshold of 0 for entropy, or of 1 for confidence, closes an
    exit.

    Args:
        rule: a name of `RULES`.
        thresholds: K - 1 numbers for K exits.

    Raises:
        InputError: an unknown rule, or a threshold that is NaN, infinite or out of range.

    Example:
        >>> net.policy = Policy("entropy", [0.1, 0.5])
    """

    rule: str
    thresholds: Sequence[float]

    def __post_init__(self) -> None:
        rule = known_rule(self.rule)
        values = self.thresholds
        values = values.tolist() if isinstance(values, Tensor | np.ndarray) else values
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise InputError(f"thresholds are {values!r}; allowed: a list, one for each exit but the last")
        values = [value.item() if isinstance(value, np.generic) else value for value in values]
        for place, value in enumerate(values):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not (0 <= value <= min(rule.highest, sys.float_info.max)):
                raise InputError(f"threshold {place} of {self.rule} is {value!r}; allowed: {rule.allowed}")
        object.__setattr__(self, "thresholds", tuple(float(value) for value in values))

    @property
    def exits(self) -> int:
        """For how many exits it is, the last included."""
        return len(self.thresholds) + 1

    def score(self, logits: Tensor) -> Tensor:
        """What is compared with the thresholds, for logits (B, classes): (B,) float64."""
        return RULES[self.rule].score(logits)

    def fires(self, exit: int, logits: Tensor) -> Tensor:
        """Which inputs leave at an exit, counted from 0, that have reached it: (B,) bool.

        Args:
            exit: its number; the last one takes all.
            logits: its logits (B, classes).
        """
        if exit == len(self.thresholds):
            return torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        score, threshold = self.score(logits), self.thresholds[exit]
        return score < threshold if RULES[self.rule].sign > 0 else score > threshold

    def may_answer(self, exit: int) -> bool:
        """Whether anything can leave at an exit, counted from 0: always at the last, elsewhere unless it is closed."""
        if exit == len(self.thresholds):
            return True
        return self.thresholds[exit] > 0 if RULES[self.rule].sign > 0 else self.thresholds[exit] < 1

    def fires_alone(self, exit: int, logits: Tensor) -> bool:
        """`fires` for the logits (1, classes) of one input, at half the cost: no tensor holds the answer."""
        score, threshold = float(self.score(logits)), self.thresholds[exit]
        return score < threshold if RULES[self.rule].sign > 0 else score > threshold

    def exit_of(self, logits: Sequence[Tensor]) -> Tensor:
        """The exit, from 0, by which each input leaves, given the logits of all exits: (B,) int64.

        Raises:
            InputError: logits of another number of exits.
        """
        self.require(len(logits))
        fired = torch.stack([self.fires(exit, z) for exit, z in enumerate(logits)])
        return fired.to(torch.uint8).argmax(0)

    def logits_of(self, logits: Sequence[Tensor]) -> Tensor:
        """The logits of the exit by which each input leaves: (B, classes). Errors as in `exit_of`."""
        exit = self.exit_of(logits)
        return torch.stack(tuple(logits))[exit, torch.arange(len(exit), device=exit.device)]

    def misclassified(self, logits: Sequence[Tensor], y: Tensor) -> Tensor:
        """Whether the deployed network answers anything but y: (B,) bool. A judge of attacks.

        An answer with a NaN is no answer.
        """
        z = self.logits_of(logits)
        return (z.argmax(1) != y) | z.isnan().any(1)

    def require(self, exits: int) -> None:
        """Refuse a network of another number of exits.

        Raises:
            InputError: it has.
        """
        if exits != self.exits:
            raise InputError(
                f"{len(self.thresholds)} thresholds for {exits} exits; allowed: {exits - 1}, "
                "one for each exit but the last"
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        return {"rule": self.rule, "thresholds": list(self.thresholds)}

    @classmethod
    def from_dict(cls, values: Any) -> Policy:
        """A policy from what `as_dict` gave.

        Raises:
            InputError: it is something else.
        """
        if not isinstance(values, Mapping) or values.keys() != {"rule", "thresholds"}:
            raise InputError(f"a policy is {values!r}; allowed: a table with rule and thresholds")
        return cls(values["rule"], values["thresholds"])


def known_rule(name: str) -> Rule:
    """A rule by name.

    Raises:
        InputError: unknown name.
    """
    if not isinstance(name, str) or name not in RULES:
        raise InputError(unknown("rule of exits", str(name), list(RULES)))
    return RULES[name]
