"""CROWN and CROWN-IBP: backward substitution with an adaptive line below each activation.

CROWN (Zhang et al. 2018, arXiv 1811.00866) puts the chord above an unstable ReLU and, below it, z itself where
u > -l and 0 elsewhere. CROWN-IBP (Zhang et al. 2020, arXiv 1906.06316) takes l, u of hidden units from intervals, so
only the margins go back through the network: the price of one backward pass for each of them.
"""

from __future__ import annotations

from torch import Tensor

from swiftsure.bounds._substitution import substitution
from swiftsure.bounds.graph import Graph
from swiftsure.bounds.region import Region

_crown_ibp = substitution("tight", refine=False)
_crown = substitution("tight", refine=True)


def crown_ibp(
    graph: Graph, region: Region, spec: Tensor | None = None, *, upper: bool = True
) -> list[tuple[Tensor, Tensor]]:
    """Bounds of each output, or of linear functions of it, with hidden l, u from intervals.

    Args:
        graph: the traced network.
        region: the inputs to bound over.
        spec: (batch, functions, classes), or None for the logits themselves.
        upper: whether upper bounds are wanted: they cost as much again; +inf where not.

    Returns:
        For each output (lower, upper): (batch, functions) or (batch, classes) each.
    """
    return _crown_ibp(graph, region, spec, upper)


def crown(
    graph: Graph, region: Region, spec: Tensor | None = None, *, upper: bool = True
) -> list[tuple[Tensor, Tensor]]:
    """Bounds with hidden l, u by the same substitution, or by intervals where these are tighter (side by side).

    Args and result as of `crown_ibp`.
    """
    return _crown(graph, region, spec, upper)
