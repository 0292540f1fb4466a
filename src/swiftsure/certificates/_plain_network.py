"""A network read for a recheck: its forward pass as a list of ReLUs and affine maps, written out as matrices.

This file and the two that build on it (`_plain_bounds`, `_plain_walk`) share nothing with `swiftsure.bounds`: no
tracing by torch.fx, no rule for any operation. What a call computes is found out by calling it. The network runs once,
and each torch function that it calls on a value that depends on the image is kept with its arguments. A call that is
no ReLU must be affine, f(z) = W z + b: b is what it makes of zeros, the columns of W what it makes of unit vectors.
That it is affine, and that W and b are its own, is checked on random values of many sizes: an affine map that vanishes
at a random point vanishes everywhere. So a max pooling, a sigmoid, or a sum over the batch is noticed, whatever its
name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Array = NDArray[np.float64]

MOST_NONZEROS = 100_000_000
"""Entries of all matrices together, of 12 bytes each: 1.2 GB."""
BATCH = 32
"""Rows of one probe: unit vectors, or random values."""
TOLERANCE = 1e-9
"""Rounding of float64 that a check allows, as a share of the largest values that meet in a sum."""

_RELUS: tuple[Any, ...] = (F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu_)
_LINEAR: tuple[Any, ...] = (F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
_CONVOLUTIONS: tuple[Any, ...] = (torch.conv1d, torch.conv2d, torch.conv3d)
_TRANSPOSED: tuple[Any, ...] = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
_OF_SHAPES = {
    "size", "shape", "dim", "ndim", "ndimension", "numel", "nelement", "stride", "__len__", "dtype", "device",
    "layout", "is_floating_point", "is_complex", "is_contiguous", "is_cuda", "is_sparse", "is_quantized",
    "requires_grad", "get_device", "element_size", "type", "itemsize", "__hash__",
}  # fmt: skip
"""What may be asked of a value without looking at its numbers."""


class Unreadable(Exception):
    """Why a network cannot be read, in words that fit after "because"."""


@dataclass(frozen=True)
class Node:
    """One value of the network, flat: the image, a ReLU of an earlier value, or a sum of affine maps of earlier ones.

    Attributes:
        inputs: the values that it is made of; none for the image.
        matrices: (units, units of the input) for each input of a sum; none for a ReLU.
        constant: (units,), what is added to the sum.
        relu: whether it is a ReLU of its one input.
        linear: whether a linear layer made it, through which differences of classes are taken before they are bounded.
    """

    inputs: tuple[int, ...]
    matrices: tuple[sparse.csr_array, ...]
    constant: Array
    relu: bool = False
    linear: bool = False

    @property
    def size(self) -> int:
        """How many units."""
        return len(self.constant)


@dataclass(frozen=True)
class PlainNetwork:
    """A network of ReLUs and affine maps.

    Attributes:
        nodes: in the order of execution; the first is the image.
        outputs: which nodes are the exits' logits.
        macs: what an image costs that leaves at each exit: the multiply-adds of all linear layers and convolutions
            that have run by then.
    """

    nodes: list[Node]
    outputs: list[int]
    macs: list[int]

    @property
    def relus(self) -> list[int]:
        """The ReLUs that an exit depends on, in the order of execution."""
        used = self.ancestors(self.outputs)
        return [index for index, node in enumerate(self.nodes) if node.relu and index in used]

    def ancestors(self, targets: Sequence[int]) -> set[int]:
        """The nodes that some depend on, themselves included."""
        used = set(targets)
        for index in range(max(used), -1, -1):
            if index in used:
                used.update(self.nodes[index].inputs)
        return used

    def values(self, image: Array) -> list[Array]:
        """The logits (classes,) of every exit for one flat image."""
        known: list[Array] = []
        for node in self.nodes:
            if not node.inputs:
                known.append(image)
            elif node.relu:
                known.append(np.maximum(known[node.inputs[0]], 0.0))
            else:
                parts = (m @ known[i] for m, i in zip(node.matrices, node.inputs, strict=True))
                known.append(node.constant + sum(parts))
        return [known[output] for output in self.outputs]


def read_plainly(net: nn.Module, shape: Sequence[int], *, most_nonzeros: int = MOST_NONZEROS) -> PlainNetwork:
    """A float64 copy of a network, on the CPU and in evaluation mode, as ReLUs and affine maps.

    Args:
        net: returns logits (batch, classes), or a tuple of them; it stays as it is.
        shape: of one image, (channels, height, width).
        most_nonzeros: entries that the matrices may have together.

    Raises:
        Unreadable: an operation is neither affine nor a ReLU, depends on other samples, or does not show as a call of
            a torch function; or the matrices are too large.
    """
    try:
        return _read(copy.deepcopy(net).cpu().double().eval(), shape, most_nonzeros)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        # Whatever a network does that other numbers or another type of them do not suit.
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Unreadable(f"it does not run on random values in float64: {line}") from None


def _read(net: nn.Module, shape: Sequence[int], most_nonzeros: int) -> PlainNetwork:
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.no_grad():
        image = _random((BATCH, *shape), generator)
        calls = _Calls(image)
        with calls:
            returned = net(image)
        logits = [returned] if isinstance(returned, Tensor) else returned
        if not isinstance(logits, tuple | list) or not all(isinstance(z, Tensor) for z in logits):
            raise Unreadable("it does not return logits, or a tuple of them")
        places = [calls.place.get(id(z)) for z in logits]
        if not places or None in places or any(z.dim() != 2 for z in logits):
            raise Unreadable("its logits do not come from calls of torch functions that can be followed")
        outputs = [place for place in places if place is not None]
        reader = _Reader(generator, most_nonzeros)
        nodes = [Node((), (), np.zeros(image[0].numel()))]
        for call in calls.made:
            nodes += reader.nodes(call)
        network = PlainNetwork(nodes, outputs, [calls.macs[output] for output in outputs])
        _require_faithful(network, net, shape, generator)
    return network


@dataclass(frozen=True)
class _Slot:
    """In the arguments of a call: one of the values that depend on the image."""

    number: int


@dataclass(frozen=True)
class _Call:
    """One call on values that depend on the image."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    inputs: tuple[int, ...]
    """Which nodes stand in its slots."""
    shapes: tuple[torch.Size, ...]
    """Of the values in its slots."""

    def __call__(self, *values: Tensor) -> list[Tensor]:
        """The tensors that it returns for other values in its slots, which it may change."""

        def filled(leaf: Any) -> Any:
            return values[leaf.number] if isinstance(leaf, _Slot) else leaf

        return list(
            _tensors(self.function(*_mapped(self.arguments, filled), **_mapped(self.keywords, filled)))
        )

    @property
    def name(self) -> str:
        """As it is known to the user."""
        return getattr(self.function, "__name__", str(self.function))


class _Calls(TorchFunctionMode):
    """The calls of a forward pass."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.made: list[_Call] = []
        self.place = {id(image): 0}
        """Which node a tensor is now; one that is changed in place becomes another."""
        self.macs = [0]
        """For each node, multiply-adds of one image until it is there."""
        # Tensors that live on cannot share an id with later ones.
        self._kept = [image]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs: list[Tensor] = []

        def slot(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or id(leaf) not in self.place:
                return leaf
            inputs.append(leaf)
            return _Slot(len(inputs) - 1)

        arguments, keywords = _mapped(args, slot), _mapped(kwargs, slot)
        places = tuple(self.place[id(tensor)] for tensor in inputs)
        call = _Call(func, arguments, keywords, places, tuple(tensor.shape for tensor in inputs))
        result = func(*args, **kwargs)
        if not inputs:
            return result
        found = list(_tensors(result))
        if not found:
            getter = getattr(getattr(func, "__self__", None), "__name__", "")
            if call.name not in _OF_SHAPES and getter not in _OF_SHAPES:
                raise Unreadable(f"{call.name!r} takes numbers that depend on the image out of a tensor")
            return result
        self.made.append(call)
        cost = self.macs[-1] + _macs(call, found[0])
        for tensor in found:
            if tensor.dtype != torch.float64 or tensor.shape[:1] != (BATCH,):
                raise Unreadable(f"{call.name!r} returns {tensor.dtype} of shape {tuple(tensor.shape)}")
            self.place[id(tensor)] = len(self.macs)
            self.macs.append(cost)
            self._kept.append(tensor)
        return result


class _Reader:
    """Turns calls into nodes.

    Args:
        generator: of random values for the checks.
        most: entries that all matrices may have together.
    """

    def __init__(self, generator: torch.Generator, most: int) -> None:
        self._generator, self._left = generator, most

    def nodes(self, call: _Call) -> list[Node]:
        """One for each tensor that the call returns."""
        if call.function in _RELUS and len(call.inputs) == 1:
            return [Node(call.inputs, (), np.zeros(call.shapes[0][1:].numel()), relu=True)]
        zeros = [torch.zeros(shape, dtype=torch.float64) for shape in call.shapes]
        constants = [_flat(z) for z in call(*_copies(zeros))]
        probe = [_random(shape, self._generator) for shape in call.shapes]
        found = [_flat(z) for z in call(*_copies(probe))]
        matrices = [self._matrices(call, slot, zeros, constants) for slot in range(len(call.inputs))]
        nodes = []
        for output, constant in enumerate(constants):
            own = [of_slot[output] for of_slot in matrices]
            parts = [(matrix @ _flat(z).T).T for matrix, z in zip(own, probe, strict=True)]
            sizes = [(abs(matrix) @ abs(_flat(z)).T).T for matrix, z in zip(own, probe, strict=True)]
            _require_affine(call, found[output], constant[0] + sum(parts), abs(constant) + sum(sizes))
            linear = call.function in _LINEAR and len(call.inputs) == 1
            nodes.append(Node(call.inputs, tuple(own), constant[0], linear=linear))
        return nodes

    def _matrices(
        self, call: _Call, slot: int, zeros: list[Tensor], constants: list[Array]
    ) -> list[sparse.csr_array]:
        """What each returned tensor takes from one slot; zeros stand in the others."""
        size = call.shapes[slot][1:].numel()

        def at(values: Array) -> list[Array]:
            filled = _copies(zeros)
            filled[slot] = torch.from_numpy(values).reshape(call.shapes[slot])
            return [_flat(z) - c for z, c in zip(call(*filled), constants, strict=True)]

        # Most calls only scale each unit, and a random point tells whether this one does.
        scales = at(np.ones((BATCH, size)))
        if all(scale.shape[1] == size for scale in scales):
            probe = _flat(_random((BATCH, size), self._generator))
            if all(
                _close(z, scale * probe, abs(scale * probe))
                for z, scale in zip(at(probe.copy()), scales, strict=True)
            ):
                return [self._counted(sparse.diags_array(scale[0]).tocsr()) for scale in scales]
        columns: list[list[sparse.csr_array]] = [[] for _ in constants]
        for start in range(0, size, BATCH):
            units = np.arange(start, min(start + BATCH, size))
            values = np.zeros((BATCH, size))
            values[np.arange(len(units)), units] = 1.0
            for known, z in zip(columns, at(values), strict=True):
                known.append(self._counted(sparse.csr_array(z[: len(units)])))
        return [sparse.vstack(known, format="csr").T.tocsr() for known in columns]

    def _counted(self, matrix: sparse.csr_array) -> sparse.csr_array:
        self._left -= matrix.nnz
        if self._left < 0:
            raise Unreadable("its matrices have too many entries")
        return matrix


def _require_affine(call: _Call, found: Array, expected: Array, scale: Array) -> None:
    if not _close(found, expected, scale):
        raise Unreadable(f"{call.name!r} is neither affine nor a ReLU of each sample alone")


def _require_faithful(
    network: PlainNetwork, net: nn.Module, shape: Sequence[int], generator: torch.Generator
) -> None:
    """Values that are changed in place under another name leave no mark in the calls: compare with the network."""
    for image in torch.rand((8, *shape), generator=generator, dtype=torch.float64):
        returned = net(image[None].clone())
        logits = [returned] if isinstance(returned, Tensor) else returned
        for ours, theirs in zip(network.values(image.flatten().numpy()), logits, strict=True):
            expected = theirs[0].numpy()
            if not np.allclose(ours, expected, rtol=1e-7, atol=1e-7 * abs(expected).max()):
                raise Unreadable("its calls do not compute what it computes")


def _random(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Rows of random values of both signs, from 1e-3 to 1e12."""
    size = 10.0 ** torch.linspace(-3, 12, shape[0], dtype=torch.float64)
    values = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    return values * size.view(-1, *[1] * (len(shape) - 1))


def _close(found: Array, expected: Array, scale: Array) -> bool:
    """Whether rows agree up to rounding of sums of that size. NaN never does."""
    error = abs(found - expected).max(axis=1, initial=0.0)
    return bool((error <= TOLERANCE * (scale.max(axis=1, initial=0.0) + 1e-30)).all())


def _flat(z: Tensor) -> Array:
    return z.detach().reshape(len(z), -1).numpy()


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    """Calls may change their arguments."""
    return [tensor.clone() for tensor in tensors]


def _macs(call: _Call, result: Tensor) -> int:
    """Multiply-adds of one image: of linear layers and convolutions; all else counts nothing."""
    if call.function in _CONVOLUTIONS or call.function in _TRANSPOSED:
        weight = call.arguments[1] if len(call.arguments) > 1 else call.keywords["weight"]
        places = call.shapes[0] if call.function in _TRANSPOSED else result.shape
        return int(weight.numel()) * int(places[2:].numel())
    if call.function in _LINEAR:
        return int(result[0].numel()) * int(call.shapes[0][-1])
    return 0


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """A value with each leaf of its tuples, lists and tables replaced."""
    if isinstance(value, tuple) and not isinstance(value, torch.Size):
        return tuple(_mapped(part, function) for part in value)
    if isinstance(value, list):
        return [_mapped(part, function) for part in value]
    if isinstance(value, dict):
        return {key: _mapped(part, function) for key, part in value.items()}
    return function(value)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
