"""Dynamic mixed training: controllers that move the weight of the proven term from epoch to epoch.

A controller has one method, ``weight(epoch, clean, verified)``: the weight for that epoch, given the last epoch's clean
and verified accuracy on the validation split (None before the first).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from swiftsure.recipe import Mixing, Schedule


class Controller(Protocol):
    """Chooses the weight of the proven term."""

    state: dict[str, float]
    """All it remembers, as plain numbers: saved and restored for resume."""

    def weight(self, epoch: int, clean: float | None, verified: float | None) -> float:
        """The weight for an epoch (from 1)."""


@dataclass
class Constant:
    """The same weight throughout."""

    mixing: Mixing
    state: dict[str, float] = field(default_factory=dict)

    def weight(self, epoch: int, clean: float | None, verified: float | None) -> float:
        """first."""
        return self.mixing.first


@dataclass
class Ramp:
    """From first to last along the eps ramp, then last (as interval training mixes, Gowal et al. 2018)."""

    mixing: Mixing
    schedule: Schedule
    state: dict[str, float] = field(default_factory=dict)

    def weight(self, epoch: int, clean: float | None, verified: float | None) -> float:
        """Linear in the epoch."""
        share = 1.0
        if self.schedule.ramp:
            share = min(1.0, max(0.0, (epoch - 1 - self.schedule.warmup) / self.schedule.ramp))
        return self.mixing.first + share * (self.mixing.last - self.mixing.first)


@dataclass
class Geometric:
    """min(first * factor ** (epochs since the ramp // every), last).

    The schedule of HYDRA's released trainer (Sehwag et al. 2020; .1, 2.5, 5 epochs, 50), the only public code of
    MixTrain's dynamic mixing.
    """

    mixing: Mixing
    schedule: Schedule
    state: dict[str, float] = field(default_factory=dict)

    def weight(self, epoch: int, clean: float | None, verified: float | None) -> float:
        """Grows with the epoch alone, whatever the accuracies."""
        since = max(epoch - 1 - self.schedule.warmup - self.schedule.ramp, 0)
        return min(self.mixing.first * self.mixing.factor ** (since // self.mixing.every), self.mixing.last)


@dataclass
class Balanced:
    """Raise the weight while clean accuracy holds, lower it when it does not: multiplicative, within bounds.

    Clean accuracy holds while it is at least `clean_target`, or, without a target, within `tolerance` of the best
    seen. While the radius still grows the weight stays where it starts: clean accuracy is low there for another
    reason. Ours: the paper's formula is not public.
    """

    mixing: Mixing
    schedule: Schedule
    state: dict[str, float] = field(default_factory=dict)

    def weight(self, epoch: int, clean: float | None, verified: float | None) -> float:
        """One multiplicative step from the last epoch's weight."""
        mixing = self.mixing
        current = self.state.get("weight", mixing.first)
        if clean is not None and epoch - 1 > self.schedule.warmup + self.schedule.ramp:
            best = max(clean, self.state.get("best_clean", 0.0))
            target = best - mixing.tolerance if mixing.clean_target is None else mixing.clean_target
            current = current * mixing.factor if clean >= target else current / mixing.factor
            self.state["best_clean"] = best
        self.state["weight"] = min(max(current, mixing.least), mixing.last)
        return self.state["weight"]


def controller(mixing: Mixing, schedule: Schedule) -> Controller:
    """The controller that a recipe names."""
    match mixing.controller:
        case "constant":
            return Constant(mixing)
        case "ramp":
            return Ramp(mixing, schedule)
        case "geometric":
            return Geometric(mixing, schedule)
        case "balanced":
            return Balanced(mixing, schedule)
