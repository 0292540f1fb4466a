"""A backbone's forward pass as torch.fx sees it: only as deep as cuts need, with a line of source where it fails."""

from __future__ import annotations

import os
import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from swiftsure.errors import InputError

_BATCHES = (3, 2)
"""Of two sizes, so that a value whose first axis is not the batch shows."""


class Root(nn.Module):
    """Calls the backbone with images alone, so that its other arguments have their defaults."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Any:
        """What the backbone returns."""
        return self.backbone(x)


class Trace:
    """The calls of one forward pass, in the mode that the backbone is in.

    Attributes:
        graph: of a `Root` around the backbone.
        returned: for each module that was called, the nodes of what its calls returned; None for no single tensor.
        constants: tensors that the forward pass made of numbers alone, by the name that the graph gives them.

    Args:
        backbone: any module that torch.fx can trace.
        opened: the modules whose own forward pass is traced, the backbone among them; all others stay whole. None: all
            but torch's own, and those that torch.fx cannot follow.

    Raises:
        InputError: it cannot be traced; the line names file, line and code.
    """

    def __init__(self, backbone: nn.Module, opened: Collection[nn.Module] | None = None) -> None:
        root = Root(backbone)
        whole: set[nn.Module] = set()
        while True:
            tracer = _Tracer(root, opened, whole)
            before = set(vars(root))
            try:
                self.graph = tracer.trace(root)
                break
            except Exception as error:
                # A module that fx cannot follow may stay whole, as long as nothing is to be cut inside.
                if opened is not None or len(tracer.stack) < 2:
                    raise _refusal(error, backbone) from None
                whole.add(tracer.stack[-1])
        self.returned = tracer.returned
        self.constants: dict[str, Tensor] = {
            name: value for name, value in vars(root).items() if name not in before
        }

    def same_as(self, other: Trace) -> bool:
        """Whether two traces do the same."""
        codes = [trace.graph.python_code("self").src for trace in (self, other)]
        return codes[0] == codes[1] and all(
            torch.equal(value, other.constants[name]) for name, value in self.constants.items()
        )

    def rename_constants(self, suffix: str) -> None:
        """Add a suffix to the names of constants."""
        for node in self.graph.nodes:
            if node.op == "get_attr" and node.target in self.constants:
                node.target += suffix
        self.constants = {name + suffix: value for name, value in self.constants.items()}

    def record(self, backbone: nn.Module, example: Tensor) -> dict[fx.Node, list[Any]]:
        """What each call returns, for two batch sizes: tensors as their shapes, all else as it is.

        Args:
            backbone: the one that was traced or a copy, in the mode in which it was traced.
            example: an image or a batch (B, C, H, W); its shape and type are used.

        Raises:
            InputError: what was traced does not run on such images.
        """
        root = Root(backbone)
        vars(root).update(self.constants)
        generator = torch.Generator().manual_seed(0)
        seen = []
        for batch in _BATCHES:
            probe = torch.rand((batch, *example.shape[1:]), generator=generator).to(example)
            recorder = _Recorder(root, self.graph)
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                try:
                    recorder.run(probe)
                except Exception as error:
                    # The backbone's own code raises whatever it likes; the user needs the one line.
                    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
                    raise InputError(
                        f"{type(backbone).__name__} fails as torch.fx traced it, on images of shape "
                        f"{tuple(example.shape[1:])}: {line}"
                    ) from None
            seen.append(recorder.seen)
        return {node: [shapes[node] for shapes in seen] for node in seen[0]}


class Shape(tuple[int, ...]):
    """The shape of a tensor that a call returned."""


def batch_first(shapes: Sequence[Any]) -> bool:
    """Whether what a call returned for the two batch sizes is a tensor with the batch as its first axis."""
    return all(
        isinstance(shape, Shape) and shape[:1] == (batch,)
        for shape, batch in zip(shapes, _BATCHES, strict=True)
    ) and (shapes[0][1:] == shapes[1][1:])


@contextmanager
def in_mode(net: nn.Module, training: bool) -> Iterator[None]:
    """Every module in training or in evaluation mode; on leaving, each as it was."""
    found = [(module, module.training) for module in net.modules()]
    try:
        for module, _ in found:
            module.training = training
        yield
    finally:
        for module, mode in found:
            module.training = mode


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # or buffers would be frozen at today's values

    def __init__(
        self, root: Root, opened: Collection[nn.Module] | None, whole: Collection[nn.Module]
    ) -> None:
        super().__init__()
        self._opened, self._whole, self._own = opened, whole, root.backbone
        self.stack: list[nn.Module] = []
        self.returned: dict[nn.Module, list[fx.Node | None]] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if self._opened is not None:
            return m not in self._opened
        return m in self._whole or (m is not self._own and super().is_leaf_module(m, module_qualified_name))

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        self.stack.append(m)
        value = super().call_module(m, forward, args, kwargs)
        self.stack.pop()  # not in a finally: after an error the innermost module is wanted
        self.returned.setdefault(m, []).append(value.node if isinstance(value, fx.Proxy) else None)
        return value


class _Recorder(fx.Interpreter):
    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, graph=graph)
        self.seen: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.seen[n] = Shape(value.shape) if isinstance(value, Tensor) else value
        return value


def _refusal(error: Exception, backbone: nn.Module) -> InputError:
    """One line with the place in the user's source where tracing stopped."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    torch_home, ours = os.path.dirname(torch.__file__), os.path.dirname(__file__)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((torch_home, ours, "<"))
    ]
    where = ""
    if frames:
        last = frames[-1]
        where = f" at line {last.lineno} of {Path(last.filename).name}, `{last.line}`"
    return InputError(
        f"the backbone {type(backbone).__name__} cannot be traced by torch.fx{where}: {reason}; the forward passes "
        "around a cut must not branch on data, but may inside modules that are not cut"
    )
