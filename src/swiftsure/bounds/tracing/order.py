"""Rules for calls that give values back as they are, in another order or weighted: shapes, slices, padding, joining."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, fx, nn

from swiftsure.bounds import operations as ops
from swiftsure.bounds.tracing.calls import Call

PADDINGS: dict[type[nn.Module], str] = {
    kind: mode
    for mode, kinds in {
        "constant": (
            nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d
        ),
        "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
        "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
        "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
    }.items()
    for kind in kinds
}  # fmt: skip


def same(call: Call) -> int:
    """The same values in the same order, in whatever shape; its arguments may hold the number of images."""
    call.accept_arguments()
    return call.reshape(call.result, call.source)


def dropout(call: Call) -> int:
    """Off in evaluation mode."""
    if call.module is None and call.argument("training", 2, call.node.target is not F.alpha_dropout):
        raise call.refusal("it stays on in evaluation mode; pass training=self.training")
    call.argument("p", 1)
    return call.source


def arrange(call: Call) -> int:
    """A linear map with coefficients >= 0, as torch computes it."""
    return call.map(call.function())


def expand(call: Call) -> int:
    """Its arguments may hold the number of images, and are not read."""
    call.accept_arguments()
    return call.map(expanded(call.result))


def expanded(shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """Repeats values along axes of length 1."""
    return lambda z: z.expand(-1, *shape)


def split(call: Call) -> int:
    """Several tensors, each fetched by an index later."""
    call.done.parts[call.node] = call.function()
    call.done.index[call.node] = call.source
    return call.source


def getitem(call: Call) -> int:
    """A slice of a tensor; one or some of the tensors of a split."""
    whole, place = call.node.args[0], call.node.args[1]
    assert isinstance(whole, fx.Node)
    if whole in call.done.parts:
        parts, read = call.done.parts[whole], call.traced.constant(call.node, place)
        call.accept_arguments()
        if not call.traced.is_tensor(call.node):
            call.done.parts[call.node] = lambda z: parts(z)[read()]
            return call.source
        return call.map(lambda z: parts(z)[read()])
    first = place[0] if isinstance(place, tuple) else place
    if first is not Ellipsis and first != slice(None):
        raise call.mixing()
    return call.map(call.function())


def cat(call: Call) -> int:
    """Joined along an axis other than the batch."""
    sources = call.parts("tensors", 0)
    axis = _axis(call, call.argument("dim", 1, 0), len(call.result) + 1)
    return call.append(ops.Cat(axis, tuple(call.shape(i) for i in sources)), None, *sources)


def stack(call: Call) -> int:
    """Joined along a new axis."""
    sources, shape = call.parts("tensors", 0), call.result
    axis = _axis(call, call.argument("dim", 1, 0), len(shape) + 1)
    single = (*shape[:axis], 1, *shape[axis + 1 :])
    sources = [call.reshape(single, i) for i in sources]
    return call.append(ops.Cat(axis, (single,) * len(sources)), None, *sources)


def _axis(call: Call, dim: int, dims: int) -> int:
    """An axis of one sample, from an axis of a batch with so many."""
    if dim % dims == 0:
        raise call.refusal("it joins along the batch")
    return dim % dims - 1


def pad(call: Call) -> int:
    """Around a map: a constant, or values of the map."""
    if call.module is not None:
        widths, mode = call.argument("padding", None), PADDINGS[type(call.module)]
    else:
        widths, mode = call.argument("pad", 1), call.argument("mode", 2, "constant")
    value = call.argument("value", 3)
    return call.map(
        lambda z: F.pad(z, widths, mode),
        shifted=(lambda z: F.pad(z, widths, mode, value)) if value else None,
    )


def upsample(call: Call) -> int:
    """Every mode whose weights are >= 0."""
    mode = call.argument("mode", 3, "nearest")
    if mode == "bicubic":
        raise call.refusal("bicubic weights have both signs")
    return arrange(call)
