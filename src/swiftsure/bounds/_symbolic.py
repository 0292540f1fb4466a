"""MixTrain's symbolic linear relaxation (Wang et al. 2018, arXiv 1811.02625), by backward substitution.

The relaxation carries, for each value z, an affine function of the input and of one error symbol per unstable unit:
z = c + sum_p a_p (x_p - x0_p) + sum_k b_k eta_k, with eta in [-1, 1]. At a ReLU with pre-activation bounds
l < 0 < u the slope is s = u / (u - l): c becomes s c + mu, all coefficients are scaled by s, and a fresh symbol of
size mu = -s l / 2 appears. Stable units pass or vanish. The bounds of z are c plus or minus what the ball lets
sum a_p (x_p - x0_p) reach, plus or minus sum |b_k|.

The paper pushes all a and b forward through the layers, a dense tensor of inputs by neurons. With the same slopes and
the same l, u, the coefficients of one function of one layer are also its gradient taken backward through the affine
maps, with each ReLU replaced by its slope. So here centres go forward once, like a plain forward pass, and only the
functions whose range is wanted are taken back: units that intervals leave unstable, and the margins. The values are
the same; on mnist_small the work is a fraction of the dense form's.
"""

from __future__ import annotations

from torch import Tensor

from swiftsure.bounds._substitution import substitution
from swiftsure.bounds.graph import Graph
from swiftsure.bounds.region import Region

_bound = substitution("parallel", refine=True)


def symbolic(
    graph: Graph, region: Region, spec: Tensor | None = None, *, upper: bool = True
) -> list[tuple[Tensor, Tensor]]:
    """Bounds of each output, or of linear functions of it, by MixTrain's relaxation.

    The l, u of a hidden unit are the tighter, side by side, of the relaxation's own and of plain intervals; so units
    that intervals prove stable need no rows. Outputs are the relaxation's own: neither technique is tighter everywhere.

    Args:
        graph: the traced network.
        region: the inputs to bound over.
        spec: (batch, functions, classes), or None for the logits themselves.
        upper: whether upper bounds are wanted (here they cost nothing).

    Returns:
        For each output (lower, upper): (batch, functions) or (batch, classes) each.
    """
    return _bound(graph, region, spec, upper)
