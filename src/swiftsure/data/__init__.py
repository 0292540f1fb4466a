"""Data sets as tensors in memory."""

from swiftsure.data.checks import check_batch

__all__ = ["check_batch"]
