"""Cutting a backbone at named modules into stages that really need not run; its weights stay where they are."""

from __future__ import annotations

import copy
import operator
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from swiftsure.errors import InputError
from swiftsure.exits.tracing import Shape, Trace, batch_first, in_mode
from swiftsure.suggestion import unknown

Function = Callable[..., Any]


class Stage(nn.Module):
    """Part of a backbone's forward pass. The backbone is held by the network that the stage belongs to, not here.

    Args:
        backbone: whose modules the part calls.
        functions: the part in evaluation and in training mode; they take self and the state.
        constants: tensors that the parts refer to by these names.
    """

    backbone: nn.Module

    def __init__(
        self, backbone: nn.Module, functions: tuple[Function, Function], constants: dict[str, Tensor]
    ) -> None:
        super().__init__()
        # Past nn.Module's own bookkeeping: K stages would list the same weights K times.
        self.__dict__["backbone"] = backbone
        self._functions = functions
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, *state: Tensor) -> Any:
        """The next state: a tensor, or a tuple of tensors that begins with the one that the head reads."""
        return self._functions[self.backbone.training](self, *state)


def cut(backbone: nn.Module, names: Sequence[str], example: Tensor) -> tuple[list[str], list[Stage]]:
    """Stages that end behind the named modules, and one for the rest.

    Args:
        backbone: images -> logits (B, classes).
        names: of modules, as in ``named_modules``, in any order.
        example: an image or a batch (B, C, H, W), of the backbone's type and device.

    Returns:
        The names in the order in which their modules run, and one more stage than names.

    Raises:
        InputError: an unknown name, a module that does not run exactly once or returns no tensor with the batch first,
            two names for one place, a value that cannot be carried over a cut, or a backbone that cannot be traced.
    """
    modules = {name: _module(backbone, name) for name in names}
    opened = {backbone.get_submodule(path) for name in names for path in _ancestors(name)}
    traces = []
    for training in (False, True):
        with in_mode(backbone, training):
            traces.append(Trace(backbone, opened))
    evaluated, trained = traces
    order, functions = _pieces(evaluated, backbone, modules, example, training=False)
    constants = evaluated.constants
    if trained.same_as(evaluated):
        return order, [Stage(backbone, (function, function), constants) for function in functions]
    # Functional dropout, say: torch.fx writes down the mode it finds.
    trained.rename_constants("_training")
    # A pass in training mode changes the statistics of batch norms: it is tried on a copy.
    order, others = _pieces(trained, copy.deepcopy(backbone), modules, example, training=True)
    pairs = zip(functions, others, strict=True)
    return order, [Stage(backbone, pair, {**constants, **trained.constants}) for pair in pairs]


def _module(backbone: nn.Module, name: str) -> nn.Module:
    known = {path: module for path, module in backbone.named_modules(remove_duplicate=False) if path}
    if name not in known:
        near = unknown("module", str(name), list(known))
        if "did you mean" not in near:
            near = unknown("module", str(name), [path for path, _ in backbone.named_children()])
        raise InputError(f"{type(backbone).__name__}: {near}")
    return known[name]


def _ancestors(name: str) -> list[str]:
    """The paths of the modules around one, the backbone's own "" first."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts))]


def _pieces(
    trace: Trace, backbone: nn.Module, modules: dict[str, nn.Module], example: Tensor, *, training: bool
) -> tuple[list[str], list[Function]]:
    """Names in the order of their modules, and a function for each stage, in one mode."""
    with in_mode(backbone, training):
        flow = Flow(trace.graph, trace.record(backbone, example))
    _require_logits(flow, training)
    places = {name: _place(trace, flow, name, module) for name, module in modules.items()}
    order = sorted(places, key=lambda name: flow.position[places[name]])
    if order and places[order[-1]] is flow.output.args[0]:
        raise InputError(
            f"module {order[-1]!r} is the end of the backbone, where the last exit is; cut before it"
        )
    for first, second in pairwise(order):
        if places[first] is places[second]:
            raise InputError(f"modules {first!r} and {second!r} end at the same place; name one of them")
    return order, [_compiled(graph) for graph in flow.split([places[name] for name in order])]


def _require_logits(flow: Flow, training: bool) -> None:
    returned = flow.output.args[0]
    if not isinstance(returned, fx.Node) or not batch_first(flow.seen[returned]):
        mode = " in training mode" if training else ""
        kind = type(flow.seen[returned][0] if isinstance(returned, fx.Node) else returned).__name__
        raise InputError(f"the backbone returns a {kind}{mode}; allowed: logits (batch, classes)")
    shape = flow.seen[returned][0]
    if len(shape) != 2:
        raise InputError(f"the backbone returns {('batch', *shape[1:])}; allowed: logits (batch, classes)")


def _place(trace: Trace, flow: Flow, name: str, module: nn.Module) -> fx.Node:
    """The value behind a module, where it can be tapped."""
    calls = trace.returned.get(module, [])
    if len(calls) != 1:
        times = "is not called" if not calls else f"is called {len(calls)} times"
        raise InputError(f"module {name!r} {times} in the forward pass; allowed: modules that run once")
    node = calls[0]
    if node is None or not batch_first(flow.seen[node]):
        raise InputError(
            f"module {name!r} returns no tensor with the batch as its first axis; allowed: modules that do"
        )
    return node


class Flow:
    """Which values of a graph are alive where.

    Args:
        graph: of one input and one output.
        seen: what each node returns for two batch sizes.
    """

    def __init__(self, graph: fx.Graph, seen: dict[fx.Node, list[Any]]) -> None:
        self.nodes = list(graph.nodes)
        self.seen = seen
        self.output = self.nodes[-1]
        self.position = {node: place for place, node in enumerate(self.nodes)}
        self.image = next(node for node in self.nodes if node.op == "placeholder")
        live = {self.image}
        for node in self.nodes:
            if any(source in live for source in node.all_input_nodes):
                live.add(node)
        # Numbers and what does not depend on the image are computed again in each stage that needs them: the number
        # of images in a batch is another one once some have left.
        self.again = {
            node
            for node in self.nodes
            if node not in (self.image, self.output) and (node not in live or _is_plain(seen[node][0]))
        }
        for node in self.nodes:
            # A part of a tuple is taken out where the tuple is made, so that tensors cross a cut, not tuples.
            source = node.args[0] if node.args else None
            if node.target is operator.getitem and isinstance(source, fx.Node) and source not in self.again:
                whole = isinstance(seen[source][0], Shape)
                self.position[node] = self.position[node if whole else source]

    def needed(self, sources: Sequence[fx.Node]) -> set[fx.Node]:
        """The tensors behind some values: they themselves, or what they are computed again from."""
        found: set[fx.Node] = set()
        for source in sources:
            found |= self.needed(source.all_input_nodes) if source in self.again else {source}
        return found

    def crossing(self, place: int) -> set[fx.Node]:
        """The tensors made up to a position that are used behind it."""
        behind = [node for node in self.nodes if self.position[node] > place and node not in self.again]
        used = {source for node in behind for source in self.needed(node.all_input_nodes)}
        return {node for node in used if self.position[node] <= place}

    def split(self, cuts: Sequence[fx.Node]) -> list[fx.Graph]:
        """A graph for each stage; each ends with a cut's value and whatever else later stages use.

        Raises:
            InputError: something crosses a cut whose first axis is not the batch.
        """
        ends = [self.position[node] for node in cuts]
        stage_of = {node: bisect_left(ends, self.position[node]) for node in self.nodes}
        state = [self.image]
        graphs = []
        for number in range(len(cuts) + 1):
            graph = fx.Graph()
            known: dict[fx.Node, fx.Node] = {}
            for node in state:
                known[node] = graph.placeholder(node.name)
            inside = [
                node
                for node in self.nodes
                if stage_of[node] == number
                and node not in self.again
                and node.op not in ("placeholder", "output")
            ]
            for node in sorted(inside, key=self.nodes.index):
                self._copy(graph, node, known)
            if number < len(cuts):
                rest = self.crossing(ends[number]) - {cuts[number]}
                state = [cuts[number], *sorted(rest, key=self.nodes.index)]
                for node in state:
                    self._require_batch(node, cuts[number])
                values = tuple(known[node] for node in state)
                graph.output(values if len(values) > 1 else values[0])
            else:
                graph.output(known[self.output.args[0]])
            graphs.append(graph)
        return graphs

    def _copy(self, graph: fx.Graph, node: fx.Node, known: dict[fx.Node, fx.Node]) -> None:
        for source in node.all_input_nodes:
            if source not in known:
                assert source in self.again
                self._copy(graph, source, known)
        known[node] = graph.node_copy(node, known.__getitem__)

    def _require_batch(self, node: fx.Node, cut_at: fx.Node) -> None:
        if not batch_first(self.seen[node]):
            found = self.seen[node][0]
            kind = f"shape {tuple(found)}" if isinstance(found, Shape) else f"a {type(found).__name__}"
            raise InputError(
                f"the cut behind {cut_at.name!r} would part {node.name!r} ({kind}) from its use, and its first axis is "
                "not the batch; cut elsewhere"
            )


def _is_plain(value: Any) -> bool:
    """Whether a value is made of numbers and the like, so that making it again costs and changes nothing."""
    if isinstance(value, Shape):
        return False
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, int | float | str | slice | range | torch.dtype | torch.device)


def _compiled(graph: fx.Graph) -> Function:
    """The Python function of a graph; it takes the holder of the backbone as self."""
    graph.lint()
    code = graph.python_code("self")
    names = dict(code.globals)
    exec(compile(code.src, "<stage>", "exec"), names)
    function: Function = names["forward"]
    return function
