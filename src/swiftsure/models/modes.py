"""Kept for imports of an earlier place; `swiftsure.modes` has it."""

from swiftsure.modes import evaluating

__all__ = ["evaluating"]
