"""The linear functions of the logits that bounds are asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from swiftsure.bounds.graph import Graph
from swiftsure.bounds.region import Region
from swiftsure.errors import InputError


def require_spec(spec: Tensor | None, graph: Graph, region: Region) -> None:
    """Refuse a spec that is not one for all outputs of a network and all images of a region.

    Raises:
        InputError: another shape than (batch, functions, classes), no function, or another type or device than the
            images'.
    """
    if spec is None:
        return
    x = region.x
    for classes in sorted({graph.nodes[output].shape[0] for output in graph.outputs}):
        if spec.dim() != 3 or (len(spec), spec.shape[2]) != (len(x), classes) or spec.shape[1] == 0:
            raise InputError(
                f"spec has shape {tuple(spec.shape)}; allowed: (batch, functions, classes), here ({len(x)}, 1 or more, "
                f"{classes})"
            )
    if (spec.dtype, spec.device) != (x.dtype, x.device):
        raise InputError(
            f"spec is {spec.dtype} on {spec.device}; allowed: that of the images, {x.dtype} on {x.device}"
        )


def spec_or_logits(logits: Tensor, spec: Tensor | None) -> Tensor:
    """The functions asked for: (batch, functions, classes); each logit alone where none are given."""
    if spec is not None:
        return spec
    identity = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
    return identity.expand(len(logits), -1, -1)
