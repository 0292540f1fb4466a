"""One call of a traced forward pass, with its arguments by name, as the rules in `rules` see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from swiftsure.bounds import operations as ops
from swiftsure.bounds.graph import Node
from swiftsure.bounds.tracing.forward import Traced, differentiable
from swiftsure.errors import InputError

Rule = Callable[["Call"], int]
"""Appends the operations of a call, and returns where the last of them stands."""


class Translation:
    """The operations so far, and where the value of each call stands among them."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.index: dict[fx.Node, int] = {}
        self.parts: dict[fx.Node, Callable[[Tensor], Any]] = {}
        """Calls that return several tensors (chunk, split), as functions of their first argument's value."""


class Call:
    """A call of a module, a function or a method.

    Args:
        traced: the forward pass it belongs to.
        done: the operations before it.
        node: the call.
    """

    def __init__(self, traced: Traced, done: Translation, node: fx.Node) -> None:
        self.traced, self.done, self.node = traced, done, node
        self.module: Any = traced.modules[str(node.target)] if node.op == "call_module" else None
        self._known: set[int | str] = {0, "input", "inplace"}

    # What the call says

    def argument(self, name: str, position: int | None, default: Any = None) -> Any:
        """A number, a word or a tuple of such: an attribute of a module, or an argument.

        Raises:
            InputError: it depends on the image or on the number of images.
        """
        if self.module is not None:
            return getattr(self.module, name, default)
        value = self._raw(name, position, default)
        read = self.traced.constant(self.node, value)
        value = read()
        if isinstance(value, Tensor):
            raise self.refusal(f"{name} is a tensor")
        return value

    def number(self, name: str, position: int | None, default: float | None = None) -> float:
        """A number, as `argument`."""
        value = self.argument(name, position, default)
        if not isinstance(value, int | float):
            raise self.refusal(f"{name} is {value!r}, not a number")
        return value

    def tensor(self, name: str, position: int) -> Callable[[], Tensor | None]:
        """A reader of a parameter, or of None."""
        if self.module is not None:
            module: nn.Module = self.module
            return lambda: differentiable(getattr(module, name))
        return self.traced.constant(self.node, self._raw(name, position, None))

    def _raw(self, name: str, position: int | None, default: Any) -> Any:
        self._known.add(name)
        if name in self.node.kwargs:
            return self.node.kwargs[name]
        if position is None:
            return default
        self._known.add(position)
        return self.node.args[position] if len(self.node.args) > position else default

    def operand(self, name: str, position: int) -> int | Callable[[], Any]:
        """Where a value that depends on the image stands, or a reader of a constant."""
        value = self._raw(name, position, None)
        if isinstance(value, fx.Node) and value in self.done.index:
            return self.done.index[value]
        return self.traced.constant(self.node, value)

    @property
    def source(self) -> int:
        """Where the first argument stands.

        Raises:
            InputError: it does not depend on the image.
        """
        node = self.node.args[0] if self.node.args else self.node.kwargs.get("input")
        if not isinstance(node, fx.Node) or node not in self.done.index:
            raise self.refusal()
        return self.done.index[node]

    def parts(self, name: str, position: int) -> list[int]:
        """Where the values of a list stand.

        Raises:
            InputError: one of them does not depend on the image.
        """
        nodes = self._raw(name, position, ())
        if isinstance(nodes, fx.Node) and nodes in self.done.parts:
            whole, source = self.done.parts[nodes], self.done.index[nodes]
            with torch.no_grad():
                found = whole(self.traced.probe.new_zeros(2, *self.shape(source)))
            return [self.map(_part(whole, i), tuple(part.shape[1:]), source) for i, part in enumerate(found)]
        if not isinstance(nodes, list | tuple) or not all(
            isinstance(node, fx.Node) and node in self.done.index for node in nodes
        ):
            raise self.refusal("a part of it is constant, or not given in a list")
        return [self.done.index[node] for node in nodes]

    def shape(self, index: int | None = None) -> tuple[int, ...]:
        """Shape of a value for one sample; by default the source's."""
        return self.done.nodes[self.source if index is None else index].shape

    @property
    def result(self) -> tuple[int, ...]:
        """Shape of what the call returns for one sample."""
        return self.traced.shape(self.node)

    def function(self) -> Callable[[Tensor], Any]:
        """The call itself as a function of its first argument, the others being constants."""
        if self.module is not None:
            # Without hooks: what those do is found out by comparing with the network.
            return self.module.forward
        node = self.node
        in_front = bool(node.args)
        rest = self.traced.constant(node, node.args[1:])
        keywords = self.traced.constant(
            node, {key: value for key, value in node.kwargs.items() if key != "input"}
        )
        self.accept_arguments()
        target: Any = node.target
        if node.op == "call_method":
            return lambda z: getattr(z, target)(*rest(), **keywords())
        if in_front:
            return lambda z: target(z, *rest(), **keywords())
        return lambda z: target(input=z, **keywords())

    # What the call becomes

    def append(self, operation: ops.Operation, shape: tuple[int, ...] | None = None, *sources: int) -> int:
        """Append an operation; by default on the source, and with the shape that the call returns."""
        nodes = self.done.nodes
        nodes.append(Node(operation, sources or (self.source,), self.result if shape is None else shape))
        return len(nodes) - 1

    def reshape(self, shape: tuple[int, ...], source: int) -> int:
        """Append a change of shape, where it is one."""
        before = self.shape(source)
        return source if before == shape else self.append(ops.Reshape(before, shape), shape, source)

    def map(
        self,
        function: Callable[[Tensor], Tensor],
        shape: tuple[int, ...] | None = None,
        source: int | None = None,
        shifted: Callable[[Tensor], Tensor] | None = None,
    ) -> int:
        """Append a linear map with coefficients >= 0; arguments as in `ops.NonnegativeMap`.

        Raises:
            InputError: it mixes samples, or the function has a constant.
        """
        source = self.source if source is None else source
        before, after = self.shape(source), self.result if shape is None else shape
        z = torch.rand(2, *before, generator=torch.Generator().manual_seed(0)).to(self.traced.probe)
        with torch.no_grad():
            together, alone, none = function(z), function(z[1:]), function(torch.zeros_like(z))
        if together.shape[1:] != after or not torch.allclose(together[1:], alone, rtol=1e-3, atol=1e-5):
            raise self.mixing()
        if none.any():
            raise self.refusal("it adds a constant")
        return self.append(ops.NonnegativeMap(function, before, shifted), after, source)

    def accept_arguments(self) -> None:
        """Say that all arguments are understood: the shape of the result, or torch itself, accounts for them."""
        self._known.update(range(len(self.node.args)), self.node.kwargs)

    def finish(self) -> None:
        """Make sure that no argument was left unread.

        Raises:
            InputError: one was.
        """
        known = {0} if self.module is not None else self._known
        unread = [f"argument {i}" for i in range(len(self.node.args)) if i not in known]
        unread += [f"argument {key!r}" for key in self.node.kwargs if key not in self._known]
        if unread:
            raise self.refusal(f"with its {', '.join(unread)}")

    def mixing(self) -> InputError:
        """The error for a call whose result for an image depends on what else is in the batch."""
        return InputError(
            f"{self.traced.where(self.node)} mixes the samples of a batch; bounds are per sample"
        )

    def refusal(self, reason: str = "") -> InputError:
        """The error for a call without a rule."""
        return self.traced.refusal(self.node, reason)


def _part(function: Callable[[Tensor], Any], index: int) -> Callable[[Tensor], Tensor]:
    return lambda z: function(z)[index]


def axes(value: Any, dims: int) -> tuple[int, ...]:
    """A number for each of so many axes, from one for all or from several."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def pair(value: tuple[int, ...]) -> tuple[int, int]:
    """Two numbers, told to be two."""
    return value[0], value[1]
