"""The line for a name that is not known, with the nearest one that is. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches


def unknown(what: str, given: str, known: Sequence[str], cutoff: float = 0.5) -> str:
    """For example: unknown key 'loss.kk'; did you mean 'loss.k'?

    Args:
        what: what kind of name it is.
        given: the name.
        known: the names that are allowed; all are listed where none is near.
        cutoff: how near is near, 0 to 1, as `difflib` measures it.
    """
    near = get_close_matches(given, known, n=1, cutoff=cutoff)
    hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(known)}"
    return f"unknown {what} {given!r}; {hint}"
