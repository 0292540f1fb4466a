"""A network read through torch.fx into a short list of operations."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from swiftsure.bounds import operations as ops
from swiftsure.errors import InputError
from swiftsure.models.modes import evaluating

SUPPORTED = (
    "Linear, Conv2d, BatchNorm1d/2d, ReLU, Dropout, Identity, Flatten and the same as functions or methods; "
    "view and reshape per sample; sums and differences; sums, differences, products and quotients with constants"
)


@dataclass(frozen=True)
class Node:
    """One operation: where its inputs stand in the list, and the shape of one sample's values."""

    operation: ops.Operation
    inputs: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Graph:
    """Operations in the order of evaluation; the first is the image. ``outputs`` indexes the exits' logits."""

    nodes: list[Node]
    outputs: list[int]
    single: bool
    """Whether the network returns one tensor rather than a tuple."""

    def values(self, x: Tensor) -> list[Tensor]:
        """The outputs at some images (batch, channels, height, width), as the network computes them."""
        known: list[Tensor] = []
        for node in self.nodes:
            inputs = [known[i] for i in node.inputs]
            match node.operation:
                case ops.Input():
                    known.append(x)
                case ops.Relu():
                    known.append(inputs[0].relu())
                case affine:
                    known.append(affine.value(*inputs))
        return [known[output] for output in self.outputs]

    def ancestors(self, target: int) -> list[int]:
        """The nodes that ``target`` depends on, itself included, from last to first."""
        needed = {target}
        order = []
        for index in range(target, -1, -1):
            if index in needed:
                order.append(index)
                needed.update(self.nodes[index].inputs)
        return order


_TRACES: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Graph]] = weakref.WeakKeyDictionary()


def trace(net: nn.Module, example: Tensor) -> Graph:
    """The operations of a network. Parameters are not copied: the graph follows them through training.

    Args:
        net: any module that torch.fx can trace and that holds only supported operations.
        example: an image or a batch (batch, channels, height, width); its shape and type are used.

    Raises:
        InputError: an operation without a rule (named, with what can be done), a network that fx cannot trace, or
            one whose traced operations do not compute what it computes.
    """
    key = (tuple(example.shape[1:]), example.dtype, example.device, _fingerprint(net))
    known = _TRACES.get(net)
    if known is not None and known[0] == key:
        return known[1]
    graph = _Reader(net, example).read()
    _TRACES[net] = (key, graph)
    return graph


def _fingerprint(net: nn.Module) -> tuple[Any, ...]:
    """What a trace depends on beside the values of parameters and buffers, which it follows.

    Modules put in another's place, hooks, and plain attributes that a forward pass may read (numbers, tensors).
    """
    return tuple(
        (
            name,
            id(module),
            len(module._forward_hooks) + len(module._forward_pre_hooks),
            tuple(
                (attribute, id(value) if isinstance(value, Tensor) else value)
                for attribute, value in vars(module).items()
                if attribute != "training" and isinstance(value, int | float | str | tuple | Tensor)
            ),
        )
        for name, module in net.named_modules()
    )


_MODULES: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv2d: "conv2d",
    nn.BatchNorm1d: "batch_norm",
    nn.BatchNorm2d: "batch_norm",
    nn.ReLU: "relu",
    nn.Flatten: "same",
    nn.Identity: "same",
    nn.Dropout: "same",
    nn.Dropout1d: "same",
    nn.Dropout2d: "same",
}
_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.dropout: "same",
    F.dropout2d: "same",
    torch.flatten: "same",
    torch.reshape: "same",
    operator.add: "add",
    operator.iadd: "add",
    torch.add: "add",
    operator.sub: "sub",
    operator.isub: "sub",
    torch.sub: "sub",
    operator.mul: "mul",
    operator.imul: "mul",
    torch.mul: "mul",
    operator.truediv: "div",
    torch.div: "div",
}
_METHODS: dict[str, str] = {
    "relu": "relu",
    "relu_": "relu",
    "flatten": "same",
    "view": "same",
    "reshape": "same",
    "contiguous": "same",
    "add": "add",
    "add_": "add",
    "sub": "sub",
    "mul": "mul",
    "div": "div",
}
_PROBE_BATCH = 3
"""An unusual batch size, so that a shape that mixes samples shows."""


class _Reader:
    """Walks an fx graph once, translating each node."""

    def __init__(self, net: nn.Module, example: Tensor) -> None:
        self.net = net
        shape = tuple(example.shape[1:])
        weights = next(iter(net.parameters()), example)
        if (weights.dtype, weights.device) != (example.dtype, example.device):
            raise InputError(
                f"images are {example.dtype} on {example.device}, the network is {weights.dtype} on {weights.device}; "
                "they must be alike"
            )
        generator = torch.Generator().manual_seed(0)
        self.probe = torch.rand((_PROBE_BATCH, *shape), generator=generator).to(example)
        before = set(vars(net))
        with evaluating(net), torch.no_grad(), torch.random.fork_rng(devices=[]):
            try:
                self.expected = net(self.probe)
                tracer = fx.Tracer()
                tracer.proxy_buffer_attributes = True  # or buffers would be frozen at today's values
                traced = tracer.trace(net)
                self.module = fx.GraphModule(net, traced)
                self.module.graph.eliminate_dead_code()
                self.module.recompile()
                ShapeProp(self.module).propagate(self.probe.clone())
            except Exception as error:
                # fx and the network's own forward raise whatever they like; the user needs the one line.
                line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise InputError(
                    f"the network cannot be traced on images of shape {shape}: {line}; bounds need a forward pass "
                    "without branches on data, and images of the shape the network was built for"
                ) from None
            finally:
                # fx leaves tensors that are neither parameters nor buffers as new attributes on the user's network.
                self.constants = {name: vars(net)[name] for name in set(vars(net)) - before}
                for name in self.constants:
                    delattr(net, name)
        self.modules = dict(self.module.named_modules())
        self.nodes: list[Node] = []
        self.index: dict[fx.Node, int] = {}

    def read(self) -> Graph:
        """Translate all nodes, find the outputs, and make sure that the result computes what the network does."""
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                if self.nodes:
                    raise InputError(
                        "the network takes several inputs; bounds are for networks of one image batch"
                    )
                self._append(node, ops.Input(), ())
            elif node.op == "output":
                returned: Any = node.args[0]
                single = isinstance(returned, fx.Node)
                outputs = (
                    [returned] if single else list(returned) if isinstance(returned, tuple | list) else []
                )
                if not outputs or not all(isinstance(out, fx.Node) and out in self.index for out in outputs):
                    raise InputError("the network must return logits (batch, classes), or a tuple of them")
                graph = Graph(self.nodes, [self.index[out] for out in outputs], single)
                self._require_faithful(graph)
                return graph
            elif self._is_live(node):
                self._translate(node)
        raise InputError("the network returns nothing")

    def _require_faithful(self, graph: Graph) -> None:
        """Forward hooks and in-place operations on shared values leave no mark in a trace: compare with the network."""
        for output in graph.outputs:
            if len(graph.nodes[output].shape) != 1:
                shape = ("batch", *graph.nodes[output].shape)
                raise InputError(
                    f"the network returns {shape}; bounds need logits (batch, classes), or a tuple of them"
                )
        with torch.no_grad():
            found = graph.values(self.probe)
        expected = [self.expected] if graph.single else list(self.expected)
        for ours, theirs in zip(found, expected, strict=True):
            # A network whose weights hold NaN is still the network it is: certificates refuse it in their own way.
            scale = float(theirs.nan_to_num(0.0, 0.0, 0.0).abs().max())
            if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * scale, equal_nan=True):
                raise InputError(
                    "the traced operations do not compute what the network computes; remove forward hooks, in-place "
                    "operations on values that are used again, and randomness in evaluation mode"
                )

    def _is_live(self, node: fx.Node) -> bool:
        """Whether a node's value is a tensor that depends on the image (sizes and constants do not count)."""
        return "tensor_meta" in node.meta and any(source in self.index for source in node.all_input_nodes)

    def _append(self, node: fx.Node, operation: ops.Operation, inputs: tuple[fx.Node, ...]) -> None:
        meta = node.meta["tensor_meta"]
        shape = tuple(meta.shape)
        if shape[:1] != (_PROBE_BATCH,):
            raise InputError(
                f"{self._where(node)} mixes the samples of a batch (shape {shape}); bounds are per sample"
            )
        self.index[node] = len(self.nodes)
        self.nodes.append(Node(operation, tuple(self.index[source] for source in inputs), shape[1:]))

    def _translate(self, node: fx.Node) -> None:
        kind = None
        if node.op == "call_module":
            kind = _MODULES.get(type(self.modules[str(node.target)]))
        elif node.op == "call_function":
            kind = _FUNCTIONS.get(node.target)
        elif node.op == "call_method":
            kind = _METHODS.get(str(node.target))
        if kind is None:
            raise self._unsupported(node)
        if kind in ("add", "sub", "mul", "div"):
            self._arithmetic(node, kind)
            return
        source = node.args[0] if node.args else node.kwargs.get("input")
        if not isinstance(source, fx.Node) or source not in self.index:
            raise self._unsupported(node)
        self._append(node, self._unary(node, kind, self.nodes[self.index[source]].shape), (source,))

    def _unary(self, node: fx.Node, kind: str, shape: tuple[int, ...]) -> ops.Operation:
        module: Any = self.modules.get(str(node.target)) if node.op == "call_module" else None
        if kind == "relu":
            return ops.Relu()
        if kind == "same":
            return ops.Reshape(shape, tuple(node.meta["tensor_meta"].shape[1:]))
        if kind == "linear" and len(shape) == 1:
            return ops.Linear(module)
        if kind == "conv2d" and module.padding_mode == "zeros":
            padding = ops.same_padding(module)
            if padding is not None:
                return ops.Conv2d(module, padding, shape)
        if kind == "batch_norm" and module.running_mean is not None:
            return ops.batch_norm(module, len(shape))
        raise self._unsupported(node)

    def _arithmetic(self, node: fx.Node, kind: str) -> None:
        left: Any
        right: Any
        left, right = node.args[:2] if len(node.args) >= 2 else (node.args[0], node.kwargs["other"])
        if set(node.kwargs) - {"other", "inplace"}:
            raise self._unsupported(node)
        live = [isinstance(side, fx.Node) and side in self.index for side in (left, right)]
        if all(live):
            if kind in ("mul", "div") or left.meta["tensor_meta"].shape != right.meta["tensor_meta"].shape:
                raise self._unsupported(node)
            self._append(node, ops.Add(-1.0 if kind == "sub" else 1.0), (left, right))
            return
        source, other = (left, right) if live[0] else (right, left)
        if kind == "div" and not live[0]:
            raise self._unsupported(node)
        dims = len(self.nodes[self.index[source]].shape)
        if tuple(node.meta["tensor_meta"].shape) != tuple(source.meta["tensor_meta"].shape):
            raise self._unsupported(node)
        self._append(
            node, _with_constant(kind, self._constant(node, other), dims, swapped=not live[0]), (source,)
        )

    def _constant(self, node: fx.Node, other: Any) -> Callable[[], Tensor | float]:
        """A reader of a value that does not depend on the image: a number, a buffer, or a small sum of such."""
        if isinstance(other, (int, float)):
            return lambda: other
        if not isinstance(other, fx.Node):
            raise self._unsupported(node)
        if other.op == "get_attr":
            path, _, name = str(other.target).rpartition(".")
            if other.target in self.constants:
                constant = self.constants[str(other.target)]
                return lambda: constant
            # The cache of traces must not keep the network alive.
            owner = weakref.ref(self.net.get_submodule(path))
            return lambda: getattr(owner(), name)
        if other.op in ("call_function", "call_method") and "tensor_meta" in other.meta:
            arguments = [
                self._constant(node, a) if isinstance(a, fx.Node) else (lambda a=a: a) for a in other.args
            ]
            keywords, target = dict(other.kwargs), other.target
            if any(isinstance(value, fx.Node) for value in keywords.values()):
                raise self._unsupported(node)
            if other.op == "call_method":
                return lambda: getattr(arguments[0](), str(target))(*[a() for a in arguments[1:]], **keywords)
            assert callable(target)
            return lambda: target(*[a() for a in arguments], **keywords)
        raise self._unsupported(node)

    def _where(self, node: fx.Node) -> str:
        """Names the module and the operation, as a user knows them."""
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            return f"module {node.target!r} ({type(module).__name__})"
        stack = node.meta.get("nn_module_stack") or {}
        owner = list(stack)[-1] if stack else ""
        name = getattr(node.target, "__name__", str(node.target))
        inside = f"module {owner!r}" if owner else f"the forward pass of {type(self.net).__name__}"
        return f"operation {name!r} in {inside}"

    def _unsupported(self, node: fx.Node) -> InputError:
        details = ""
        if node.op == "call_module":
            details = f" as configured here: {self.modules[str(node.target)]}"
        return InputError(
            f"no bound rule for {self._where(node)}{details}; replace it by supported operations ({SUPPORTED}), "
            "or bound the network up to it"
        )


def _with_constant(kind: str, read: Callable[[], Tensor | float], dims: int, *, swapped: bool) -> ops.Scale:
    """z + c, z - c, c - z, z * c or z / c as an element-wise scale and shift."""

    def constant() -> Tensor:
        value = read()
        if not isinstance(value, Tensor):
            # In double precision; as a scalar it takes on the type of what it meets.
            return torch.tensor(value, dtype=torch.float64)
        # A constant written for batches, such as (1, C, 1, 1), loses its batch axis.
        return value[0] if value.dim() == dims + 1 else value

    def scale_and_shift() -> tuple[Tensor | None, Tensor | None]:
        c = constant()
        if kind == "add":
            return None, c
        if kind == "sub":
            return (-torch.ones_like(c), c) if swapped else (None, -c)
        return (c if kind == "mul" else 1 / c), None

    return ops.Scale(scale_and_shift)
