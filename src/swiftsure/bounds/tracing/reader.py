"""A network read into a graph of operations, once for all images of one shape."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, fx, nn

from swiftsure.bounds import operations as ops
from swiftsure.bounds.graph import Graph, Node
from swiftsure.bounds.tracing.calls import Call, Translation
from swiftsure.bounds.tracing.folding import folded
from swiftsure.bounds.tracing.forward import Traced
from swiftsure.bounds.tracing.spellings import FUNCTIONS, METHODS, MODULES
from swiftsure.errors import InputError

_TRACES: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Graph]] = weakref.WeakKeyDictionary()


def trace(net: nn.Module, example: Tensor) -> Graph:
    """The operations of a network. Parameters are not copied: the graph follows them through training.

    Args:
        net: any module that torch.fx can trace and that holds only supported operations (docs/operations.md).
        example: an image or a batch (batch, channels, height, width); its shape and type are used.

    Raises:
        InputError: an operation without a rule (named, with what can be done), a network that fx cannot trace, or
            one whose traced operations do not compute what it computes.
    """
    key = (tuple(example.shape[1:]), example.dtype, example.device, _fingerprint(net))
    known = _TRACES.get(net)
    if known is not None and known[0] == key:
        return known[1]
    graph = _read(Traced(net, example))
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
                (attribute, _mark(value))
                for attribute, value in vars(module).items()
                if attribute != "training" and isinstance(value, int | float | str | tuple | list | Tensor)
            ),
        )
        for name, module in net.named_modules()
    )


def _mark(value: Any) -> Any:
    """Equal for what is surely the same, and never a look at a tensor's values."""
    if isinstance(value, tuple | list):
        return tuple(_mark(part) for part in value)
    return value if value is None or isinstance(value, int | float | str) else id(value)


def _read(traced: Traced) -> Graph:
    """Translate all calls, find the outputs, and make sure that the result computes what the network does."""
    done = Translation()
    for node in traced.calls:
        if node.op == "placeholder":
            if done.nodes:
                raise InputError(
                    "the network takes several inputs; bounds are for networks of one image batch"
                )
            done.nodes.append(Node(ops.Input(), (), traced.shape(node)))
            done.index[node] = 0
        elif node.op == "output":
            returned: Any = node.args[0]
            single = isinstance(returned, fx.Node)
            outputs = [returned] if single else list(returned) if isinstance(returned, tuple | list) else []
            if not outputs or not all(isinstance(out, fx.Node) and out in done.index for out in outputs):
                raise InputError("the network must return logits (batch, classes), or a tuple of them")
            graph = folded(Graph(done.nodes, [done.index[out] for out in outputs], single))
            _require_faithful(graph, traced)
            return graph
        elif node in traced.live and traced.holds_tensors(node):
            _translate(Call(traced, done, node))
    raise InputError("the network returns nothing")


def _translate(call: Call) -> None:
    rule = None
    node = call.node
    if node.op == "call_module":
        rule = MODULES.get(type(call.module))
        if call.module._forward_pre_hooks:
            raise call.refusal("a hook changes it before each pass, as old weight norms do")
    elif node.op == "call_function":
        rule = FUNCTIONS.get(node.target)
    elif node.op == "call_method":
        rule = METHODS.get(str(node.target))
    if rule is None:
        raise call.refusal()
    call.done.index[node] = rule(call)
    call.finish()


def _require_faithful(graph: Graph, traced: Traced) -> None:
    """Forward hooks and in-place operations on shared values leave no mark in a trace: compare with the network."""
    for output in graph.outputs:
        if len(graph.nodes[output].shape) != 1:
            shape = ("batch", *graph.nodes[output].shape)
            raise InputError(
                f"the network returns {shape}; bounds need logits (batch, classes), or a tuple of them"
            )
    with torch.no_grad():
        found = graph.values(traced.probe)
    expected = [traced.expected] if graph.single else list(traced.expected)
    for ours, theirs in zip(found, expected, strict=True):
        # A network whose weights hold NaN is still the network it is: certificates refuse it in their own way.
        scale = float(theirs.nan_to_num(0.0, 0.0, 0.0).abs().max())
        if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * scale, equal_nan=True):
            raise InputError(
                "the traced operations do not compute what the network computes; remove forward hooks, in-place "
                "operations on values that are used again, and randomness in evaluation mode"
            )
