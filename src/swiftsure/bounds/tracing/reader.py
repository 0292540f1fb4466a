"""A network read into a graph of operations, once for all images of one shape."""

from __future__ import annotations

import weakref
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as _modules
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

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
    net = _bare(net)
    everywhere = (*_modules._global_forward_hooks, *_modules._global_forward_pre_hooks)
    key = (tuple(example.shape[1:]), example.dtype, example.device, everywhere, _fingerprint(net))
    known = _TRACES.get(net)
    if known is not None and known[0] == key:
        return known[1]
    graph = _read(Traced(net, example))
    _TRACES[net] = (key, graph)
    return graph


def _bare(net: nn.Module) -> nn.Module:
    """The network inside what torch.compile and data parallelism put around it."""
    if isinstance(net, torch.jit.ScriptModule):
        raise InputError("the network is TorchScript; bounds need the nn.Module that it was made from")
    around = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    inner = net.module if isinstance(net, around) else getattr(net, "_orig_mod", net)
    return net if inner is net else _bare(inner)


_OWN = frozenset(vars(nn.Module()))
"""Attributes of every module."""


def _fingerprint(net: nn.Module) -> tuple[Any, ...]:
    """What a trace depends on beside the values of parameters and buffers, which it follows.

    Modules put in another's place, hooks, types and shapes of parameters, and attributes that a forward pass may read:
    numbers, tensors, functions, containers and plain objects of these.
    """
    return tuple(
        (
            name,
            id(module),
            type(module),
            (*module._forward_hooks, *module._forward_pre_hooks),
            [_kind(parameter) for parameter in module._parameters.values()],
            [
                (attribute, value if type(value) in _PLAIN else _mark(value, _DEPTH))
                for attribute, value in vars(module).items()
                if attribute not in _OWN
            ],
        )
        for name, module in net.named_modules()
    )


def _kind(parameter: nn.Parameter | None) -> Any:
    if parameter is None or is_lazy(parameter):
        return None
    return parameter.shape, parameter.dtype, parameter.device


_PLAIN = frozenset({type(None), bool, int, float, str})


def _mark(value: Any, depth: int) -> Any:
    """Equal for what is surely the same, and never a look at a tensor's values.

    Args:
        depth: so many containers and objects inside one another are looked into, if they are not vast.
    """
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Tensor | nn.Module | type | FunctionType) or not depth:
        return id(value)
    if isinstance(value, tuple | list | set | frozenset | dict):
        if len(value) > _VAST:
            return id(value), len(value)
        parts = value.items() if isinstance(value, dict) else value
        return [_mark(part, depth - 1) for part in parts]
    return id(value), _mark(getattr(value, "__dict__", None), depth)


_DEPTH, _VAST = 5, 1000


def _read(traced: Traced) -> Graph:
    """Translate all calls, find the outputs, and make sure that the result computes what the network does."""
    done = Translation()
    for node in traced.calls:
        if node.op == "placeholder":
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
        if is_parametrized(call.module):
            raise call.refusal(
                "its weight is computed anew at each pass; torch.nn.utils.parametrize.remove_parametrizations keeps "
                "the one that it has"
            )
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
    """Randomness, and what rules may get wrong, leave no mark in a trace: compare with the network."""
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
                "the traced operations do not compute what the network computes; remove randomness in evaluation mode, "
                "sums in place (a += b) of a value that is read elsewhere, and whatever else makes a second pass give "
                "another answer"
            )
