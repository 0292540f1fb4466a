"""Operations that write to their argument: a trace says who returned a value, not who has written to it since."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from swiftsure.errors import InputError


def without_writes(module: fx.GraphModule, probe: Tensor) -> None:
    """Let every call that reads a value after it was written to read what the last writer returned.

    Then a call in place means what it means out of place, also one whose own result is dropped (``h.clamp_(0, 6)``).

    Args:
        module: the calls of a forward pass, in their order; changed in place itself.
        probe: images to run it on, which may be written to.

    Raises:
        InputError: a value is written to that is also known in another shape, or as a parameter, and read again.
    """
    watch = _Watch(module)
    with torch.inference_mode(False), torch.no_grad():
        watch.run(probe.clone())
    order = {node: place for place, node in enumerate(module.graph.nodes)}
    for writer, value, replaced in watch.writes:
        readers = [user for user in value.users if order[user] > order[writer]]
        if value.op == "get_attr":
            readers += writer.users
        if readers and not replaced:
            raise InputError(
                f"operation {_name(module, writer)} writes to a value that {_name(module, readers[0])} reads after "
                "it in another shape or as a parameter; bounds need the operation out of place (inplace=False)"
            )
        for reader in readers:
            reader.replace_input_with(value, writer)


class _Watch(fx.Interpreter):
    """Runs all calls and notes, for each that wrote to its arguments, which earlier values that has changed.

    Attributes:
        writes: (writer, value, whether what the writer returned is that value as it is now).
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.writes: list[tuple[fx.Node, fx.Node, bool]] = []

    def run_node(self, n: fx.Node) -> Any:
        """As the base class does, and keep a note."""
        arguments = [tensor for node in n.all_input_nodes for tensor in _tensors(self.env[node])]
        versions = [tensor._version for tensor in arguments]
        result = super().run_node(n)
        written = [t for t, before in zip(arguments, versions, strict=True) if t._version != before]
        if isinstance(result, Tensor) and any(_memory(result) == _memory(tensor) for tensor in written):
            # Views share their counts; what an operation writes to is what it returns.
            written = [result]
        for node, value in self.env.items() if written else ():
            if any(_overlap(one, other) for one in written for other in _tensors(value)):
                same = (
                    isinstance(value, Tensor)
                    and isinstance(result, Tensor)
                    and _place(value) == _place(result)
                )
                self.writes.append((n, node, same and node.op != "get_attr"))
        return result


def _tensors(value: Any) -> list[Tensor]:
    """A tensor, or those of several; not such as were made in inference mode, which count no writes."""
    values = value if isinstance(value, tuple | list) else [value]
    return [part for part in values if isinstance(part, Tensor) and not part.is_inference()]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return _memory(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have an element in common."""
    if _memory(a) != _memory(b) or not a.numel() or not b.numel():
        return False
    if a.dtype != b.dtype:
        return True
    touched = torch.zeros(a.untyped_storage().nbytes() // a.element_size(), dtype=torch.bool)
    touched.as_strided(a.shape, a.stride(), a.storage_offset()).fill_(True)
    return bool(touched.as_strided(b.shape, b.stride(), b.storage_offset()).any())


def _name(module: fx.GraphModule, node: fx.Node) -> str:
    if node.op == "call_module":
        return f"{node.target!r} ({type(module.get_submodule(str(node.target))).__name__})"
    return repr(getattr(node.target, "__name__", str(node.target)))
