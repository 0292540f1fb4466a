"""A network's forward pass as torch.fx sees it: its calls, the shapes of what they return, and its constants."""

from __future__ import annotations

import os
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from swiftsure.bounds.tracing.tracer import is_of_shapes, traced
from swiftsure.errors import InputError
from swiftsure.modes import evaluating

SUPPORTED = (
    "Linear, convolutions, batch norm, pooling, padding, upsampling, ReLU and other activations of one value, "
    "reshapes, slices, cat, sums, products with constants: docs/operations.md"
)
_BATCHES = (3, 2)
"""Of two sizes, so that a value that mixes samples or knows how many there are shows."""


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
                module = traced(net, probes)
                seen = [_record(module, probe) for probe in probes]
            except InputError:
                raise
            except Exception as error:
                # fx and the network's own forward raise whatever they like; the user needs the one line.
                raise InputError(
                    f"the network cannot be traced on images of shape {shape}{_where(error)}: {_reason(error)}; bounds "
                    "need a forward pass without branches on data, and images of the shape the network was built for"
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
            elif is_of_shapes(node, sized):
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
        return lambda: differentiable(getattr(owner(), name))

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


def differentiable(value: Any) -> Any:
    """A weight as it is, or a copy if it was made in inference mode: rows go back by way of gradients."""
    # torch.compile does not know that question.
    if torch.compiler.is_compiling() or not isinstance(value, Tensor) or not value.is_inference():
        return value
    with torch.inference_mode(False):
        return value.clone()


def _reason(error: Exception) -> str:
    """The first line of an error, or what it comes to."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "does not support item assignment" in line:
        return "assignment to a part of a tensor cannot be traced, torch.cat of its parts can"
    return line


def _where(error: Exception) -> str:
    """The last line of the user's own code that led to an error."""
    strangers = (os.path.dirname(torch.__file__), os.path.dirname(__file__), "<")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(strangers)]
    return f", at line {frames[-1].lineno} of {Path(frames[-1].filename).name}" if frames else ""


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
