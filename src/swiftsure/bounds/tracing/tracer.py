"""torch.fx on a user's network: the calls of its forward pass, through branches and loops over shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, fx, nn

from swiftsure.bounds.tracing.in_place import without_writes
from swiftsure.errors import InputError

_OF_SHAPES = {"size", "dim", "ndimension", "numel"}
_SHAPE_ATTRIBUTES = {"shape", "ndim", "dtype", "device"}


def traced(net: nn.Module, probes: list[Tensor]) -> fx.GraphModule:
    """The calls of a forward pass that lead to what it returns, none of which writes to what another one reads.

    Where it branches or loops over shapes, it is traced again with the way that the probes take: while fx traces, no
    module can be run.

    Args:
        net: any module that torch.fx can trace, in evaluation mode.
        probes: batches of images (batch, channels, height, width) of several sizes.

    Raises:
        InputError: it depends on the number of images, or writes to a value that is read again in another shape.
    """
    known: list[int] = []
    while True:
        tracer = _Tracer(known)
        try:
            module = fx.GraphModule(net, tracer.trace(net))
        except _Undecided as asked:
            known.append(_found(net, tracer.graph, asked, probes))
        else:
            without_writes(module, probes[0].clone())
            return _pruned(module)


def is_of_shapes(node: fx.Node, sized: set[fx.Node]) -> bool:
    """Whether a call returns what follows from shapes alone, as those in ``sized`` do."""
    if node.op == "call_method":
        return node.target in _OF_SHAPES
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in _SHAPE_ATTRIBUTES
    plain = getattr(node.target, "__module__", None) in ("_operator", "math", "builtins")
    return plain and bool(node.all_input_nodes) and all(source in sized for source in node.all_input_nodes)


class _Undecided(Exception):
    """A number is asked for, of branches or loops over shapes, that is not known yet.

    Args:
        value: what it is a number of.
        read: how to take it, from what the call returns.
        otherwise: what to tell where it depends on the number of images.
    """

    def __init__(self, value: fx.Node, read: Callable[[Any], int], otherwise: str) -> None:
        super().__init__(otherwise)
        self.value, self.read = value, read


class _Value(fx.Proxy):
    """A value in tracing, whose length may be asked for."""

    def __len__(self) -> int:
        tracer: Any = self.tracer
        return tracer.length(self)

    def __getattr__(self, k: str) -> fx.proxy.Attribute:
        return _Attribute(self, k)


class _Attribute(fx.proxy.Attribute, _Value):
    """The same for an attribute of one, such as its shape."""


class _Tracer(fx.Tracer):
    """Traces through branches and loops over what depends on shapes alone, where their ways are known.

    Args:
        known: which branch was taken (0 or 1) and how long things are, in the order of their being asked for.
    """

    proxy_buffer_attributes = True  # or buffers would be frozen at today's values

    def __init__(self, known: list[int]) -> None:
        super().__init__()
        self.known = iter(known)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """The images alone: all other arguments of the forward pass have their defaults."""
        return root_fn, [self.root, self.create_proxy("placeholder", "images", (), {})]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """torch's own modules; but not where a hook may replace what they return."""
        return super().is_leaf_module(m, module_qualified_name) and not m._forward_hooks

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """As the base class's, with a length."""
        return _Value(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """A known way; branches on data are the base class's, which refuses them."""
        sized: set[fx.Node] = set()
        for node in self.graph.nodes:
            if is_of_shapes(node, sized):
                sized.add(node)
        if obj.node not in sized:
            return super().to_bool(obj)
        return bool(
            self._number(obj, bool, "branches on the number of images; bounds need one that does not")
        )

    def length(self, obj: fx.Proxy) -> int:
        """Of a shape, or of what chunk and split return."""
        return self._number(
            obj, len, "asks len(x) for the number of images; bounds need x.shape[0] in its place"
        )

    def iter(self, obj: Any) -> Iterator[Any]:
        """Its parts."""
        count = self._number(obj, len, "loops over the images; bounds need one that does not")
        return iter([obj[i] for i in range(count)])

    def _number(self, obj: fx.Proxy, read: Callable[[Any], int], otherwise: str) -> int:
        for number in self.known:
            return number
        raise _Undecided(obj.node, read, f"the forward pass {otherwise}")


def _found(net: nn.Module, graph: fx.Graph, asked: _Undecided, probes: list[Tensor]) -> int:
    """A number that is asked for, as the probes have it, who must agree."""
    before, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    before.graph_copy(graph, copies)
    before.output(copies[asked.value])
    until = _pruned(fx.GraphModule(net, before))
    first, *others = (asked.read(until(probe.clone())) for probe in probes)
    if any(other != first for other in others):
        raise InputError(str(asked))
    return first


def _pruned(module: fx.GraphModule) -> fx.GraphModule:
    module.graph.eliminate_dead_code()
    module.recompile()
    return module
