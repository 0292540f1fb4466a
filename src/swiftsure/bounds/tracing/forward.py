"""A network's forward pass as torch.fx sees it: its calls, the shapes of what they return, and its constants."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from swiftsure.errors import InputError
from swiftsure.modes import evaluating

SUPPORTED = (
    "Linear, convolutions, batch norm, pooling, padding, upsampling, ReLU and other activations of one value, "
    "reshapes, slices, cat, sums, products with constants: docs/operations.md"
)
_BATCHES = (3, 2)
"""Of two sizes, so that a value that mixes samples or knows how many there are shows."""
_OF_SHAPES = {"size", "dim", "ndimension", "numel"}
_SHAPE_ATTRIBUTES = {"shape", "ndim", "dtype", "device"}


class Traced:
    """The calls of one forward pass in evaluation mode.

    Args:
        net: any module that torch.fx can trace.
        example: an image or a batch (batch, channels, height, width); its shape and type are used.

    Raises:
        InputError: it cannot be traced, or not run on such images.
    """

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
        probes = [torch.rand((batch, *shape), generator=generator).to(example) for batch in _BATCHES]
        self.probe = probes[0]
        before = set(vars(net))
        with evaluating(net), torch.no_grad(), torch.random.fork_rng(devices=[]):
            try:
                self.expected = net(self.probe.clone())
                module = _traced(net, probes)
                seen = [_record(module, probe) for probe in probes]
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
        self.calls: list[fx.Node] = list(module.graph.nodes)
        self.modules = dict(module.named_modules())
        self._shapes, self._other_shapes = seen
        self._sort()

    def _sort(self) -> None:
        """Which calls return numbers that follow from shapes, and which tensors that depend on the image."""
        self.numbers: dict[fx.Node, Any] = {}
        self.live: set[fx.Node] = set()
        sized: set[fx.Node] = set()
        for node in self.calls:
            if node.op == "placeholder":
                self.live.add(node)
            elif _is_of_shapes(node, sized):
                sized.add(node)
                if self._shapes[node] == self._other_shapes[node]:
                    self.numbers[node] = self._shapes[node]
            elif node.op != "output" and any(source in self.live for source in node.all_input_nodes):
                self.live.add(node)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Shape of what a call returns for one sample.

        Raises:
            InputError: it is no tensor, not of the images' type, or its first axis is not the batch.
        """
        found, other = self._shapes[node], self._other_shapes[node]
        if not isinstance(found, Returned):
            raise self.refusal(node, f"it returns a {type(found).__name__}")
        if found.dtype != self.probe.dtype:
            raise self.refusal(node, f"it returns {found.dtype} for {self.probe.dtype}")
        if (found.shape[:1], other.shape[:1]) != ((_BATCHES[0],), (_BATCHES[1],)) or (
            found.shape[1:] != other.shape[1:]
        ):
            raise InputError(
                f"{self.where(node)} mixes the samples of a batch: for {_BATCHES[0]} images it returns "
                f"{found.shape}; bounds are per sample"
            )
        return found.shape[1:]

    def is_tensor(self, node: fx.Node) -> bool:
        """Whether a call returns a tensor."""
        return isinstance(self._shapes[node], Returned)

    def holds_tensors(self, node: fx.Node) -> bool:
        """Whether a call returns a tensor, or several of them."""
        found = self._shapes[node]
        return self.is_tensor(node) or (
            isinstance(found, tuple | list) and any(isinstance(part, Tensor) for part in found)
        )

    def constant(self, user: fx.Node, value: Any) -> Callable[[], Any]:
        """A reader of an argument of a call that does not depend on the image, as it is at that time.

        Raises:
            InputError: it does depend on it.
        """
        if not isinstance(value, fx.Node):
            nodes: list[fx.Node] = []
            fx.node.map_arg(value, nodes.append)
            readers = {node: self.constant(user, node) for node in nodes}
            if all(node in self.numbers for node in nodes):
                value = fx.node.map_arg(value, self.numbers.__getitem__)
                return lambda: value
            return lambda: fx.node.map_arg(value, lambda node: readers[node]())
        if value in self.numbers:
            number = self.numbers[value]
            return lambda: number
        if value.op == "get_attr":
            return self._attribute(str(value.target))
        if (
            value in self.live
            or not self.is_tensor(value)
            or value.op not in ("call_function", "call_method")
        ):
            raise self.refusal(user, "an argument of it depends on the image or on the number of images")
        arguments, keywords = self.constant(user, value.args), self.constant(user, dict(value.kwargs))
        target: Any = value.target
        if value.op == "call_method":
            return lambda: getattr(arguments()[0], target)(*arguments()[1:], **keywords())
        return lambda: target(*arguments(), **keywords())

    def _attribute(self, target: str) -> Callable[[], Any]:
        if target in self.constants:
            constant = self.constants[target]
            return lambda: constant
        path, _, name = target.rpartition(".")
        # The cache of traces must not keep the network alive.
        owner = weakref.ref(self.net.get_submodule(path))
        return lambda: getattr(owner(), name)

    def where(self, node: fx.Node) -> str:
        """Names the module and the operation, as a user knows them."""
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            return f"module {node.target!r} ({type(module).__name__})"
        stack = node.meta.get("nn_module_stack") or {}
        owner = list(stack)[-1] if stack else ""
        name = getattr(node.target, "__name__", str(node.target))
        inside = f"module {owner!r}" if owner else f"the forward pass of {type(self.net).__name__}"
        return f"operation {name!r} in {inside}"

    def refusal(self, node: fx.Node, reason: str = "") -> InputError:
        """The error for a call without a rule: where it is, why, and what can be done."""
        details = ""
        if node.op == "call_module":
            details = f" as configured here: {' '.join(str(self.modules[str(node.target)]).split())}"
        return InputError(
            f"no bound rule for {self.where(node)}{details}{f' ({reason})' if reason else ''}; replace it by supported "
            f"operations ({SUPPORTED}), or bound the network up to it"
        )


class _Undecided(Exception):
    """A branch on shapes was met whose way is not known yet."""

    def __init__(self, condition: fx.Node) -> None:
        super().__init__("a branch on shapes")
        self.condition = condition


class _Tracer(fx.Tracer):
    """Traces through branches that depend on shapes alone, where their ways are known.

    Args:
        ways: of the branches, in the order of their being met.
    """

    proxy_buffer_attributes = True  # or buffers would be frozen at today's values

    def __init__(self, ways: list[bool]) -> None:
        super().__init__()
        self.ways = iter(ways)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Images alone, where the forward pass can be called so: its other arguments then have their defaults."""
        function = root_fn
        if is_module and concrete_args is None and _takes_images_alone(root_fn):

            def function(self: nn.Module, x: Tensor) -> Any:
                return root_fn(self, x)

        return super().create_args_for_root(function, is_module, concrete_args)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """A known way; branches on data are the base class's, which refuses them."""
        sized: set[fx.Node] = set()
        for node in self.graph.nodes:
            if _is_of_shapes(node, sized):
                sized.add(node)
        if obj.node not in sized:
            return super().to_bool(obj)
        for way in self.ways:
            return way
        raise _Undecided(obj.node)


def _takes_images_alone(forward: Callable[..., Any]) -> bool:
    """Whether all arguments behind self and the images may be left out, and there are such."""
    more = list(inspect.signature(forward).parameters.values())[2:]
    varying = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return bool(more) and all(one.kind in varying or one.default is not one.empty for one in more)


def _traced(net: nn.Module, probes: list[Tensor]) -> fx.GraphModule:
    """The calls of a forward pass. Where it branches on shapes, it is traced again with the way that the probes take:
    while fx traces, no module can be run."""
    ways: list[bool] = []
    while True:
        tracer = _Tracer(ways)
        try:
            module = fx.GraphModule(net, tracer.trace(net))
        except _Undecided as branch:
            ways.append(_way(net, tracer.graph, branch.condition, probes))
        else:
            return _pruned(module)


def _way(net: nn.Module, graph: fx.Graph, condition: fx.Node, probes: list[Tensor]) -> bool:
    """What a condition is for the probes, which must agree."""
    before, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    before.graph_copy(graph, copies)
    before.output(copies[condition])
    until = _pruned(fx.GraphModule(net, before))
    first, *others = (bool(until(probe.clone())) for probe in probes)
    if any(other != first for other in others):
        raise InputError("the forward pass branches on the number of images")
    return first


def _pruned(module: fx.GraphModule) -> fx.GraphModule:
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


class Returned:
    """Shape and type of a tensor that a call returned."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype


def _record(module: fx.GraphModule, probe: Tensor) -> dict[fx.Node, Any]:
    """What each call returns on a batch: tensors as `Returned`, all else as it is."""
    recorder = _Recorder(module)
    recorder.run(probe.clone())
    return recorder.seen


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """As the base class does, and keep a note."""
        result = super().run_node(n)
        self.seen[n] = Returned(result) if isinstance(result, Tensor) else result
        return result


def _is_of_shapes(node: fx.Node, sized: set[fx.Node]) -> bool:
    """Whether a call returns what follows from shapes alone."""
    if node.op == "call_method":
        return node.target in _OF_SHAPES
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in _SHAPE_ATTRIBUTES
    plain = getattr(node.target, "__module__", None) in ("_operator", "math", "builtins")
    return plain and bool(node.all_input_nodes) and all(source in sized for source in node.all_input_nodes)
