"""Side exits for any backbone that torch.fx can trace."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from swiftsure.errors import InputError
from swiftsure.exits.counting import as_state
from swiftsure.exits.cutting import cut
from swiftsure.exits.heads import Description, build_head, described
from swiftsure.exits.multi_exit import MultiExit
from swiftsure.exits.placement import placed
from swiftsure.exits.policies import Policy
from swiftsure.exits.tracing import in_mode

Head = nn.Module | str | Mapping[str, Any]


def attach(
    backbone: nn.Module,
    exits: Mapping[str, Head] | int,
    example: Tensor | None = None,
    *,
    policy: Policy | None = None,
) -> MultiExit:
    """Cut a backbone behind some of its modules, and give each cut a head of its own.

    The weights of the trunk are the backbone's own, nothing is copied: training one trains the other. The last exit is
    the backbone itself. Its forward pass is traced by torch.fx, only as deep as the cuts lie.

    Args:
        backbone: one batch of images (B, C, H, W) -> logits (B, classes); any module that torch.fx can trace, with
            its own weights, mode and place, which it keeps.
        exits: module names (as in ``backbone.named_modules()``) and their heads, in any order; a head is a module
            (tensor -> logits), the name of a registered one ("linear", "pooled", "conv"), or a table of its kind and
            options ({"kind": "conv", "width": 8}). Or a number K: K - 1 side exits at equal shares of the cost, whose
            heads together cost about a tenth of the backbone, and the backbone's own.
        example: an image or a batch of those the network will see; None: zeros of ``backbone.config``'s shape.
        policy: when to leave; None until thresholds are known.

    Returns:
        A `MultiExit` with ``.backbone``, ``.stages`` and ``.heads``, exits in the order in which their modules run.
        Its config rebuilds all heads that were given by name.

    Raises:
        InputError: an unknown module name, one that cannot be cut at, a head of other classes or one that does not take
            what the module returns, a backbone that cannot be traced, or a policy of another number of exits.

    Example:
        >>> net = attach(backbone, {"layer1": "linear", "layer2": my_head}, example=x)
        >>> net = attach(backbone, exits=6, example=x)
    """
    if isinstance(backbone, torch.jit.ScriptModule):
        raise InputError(
            "the backbone is a ScriptModule, which torch.fx cannot trace; allowed: the module it was made of"
        )
    if isinstance(backbone, MultiExit) and backbone.exits > 1:
        raise InputError(f"the backbone has {backbone.exits} exits already; allowed: a network of one output")
    under = getattr(backbone, "backbone", None)
    if isinstance(backbone, MultiExit) and isinstance(under, nn.Module):
        # One exit, attached: the backbone under it is the same network, and the one that a config can name.
        backbone = under
    config = getattr(backbone, "config", None)
    config = dict(config) if isinstance(config, dict) else {}
    example = _example(backbone, config, example)
    probe = _probe(example)
    expected = _answer(backbone, probe)
    classes = expected.shape[1]
    if not isinstance(exits, Mapping):
        exits = placed(backbone, exits, example, classes)
    names, stages = cut(backbone, list(exits), example)
    # Until the heads are known, those of the side exits pass on what the stage returns.
    net = MultiExit(stages, [nn.Identity() for _ in stages])
    net.backbone = backbone
    taps = _taps(net, probe)
    descriptions: dict[str, Description | None] = {}
    for place, (name, tap) in enumerate(zip(names, taps, strict=False)):
        head = exits[name]
        descriptions[name] = None
        if not isinstance(head, nn.Module):
            description = descriptions[name] = described(head, tap.shape[1:])
            head = build_head(description, tap.shape[1:], classes).to(tap.device, tap.dtype)
            head.train(backbone.training)
        _require_classes(head, name, tap, classes)
        net.heads[place] = head
    net.copies = _touched(net, probe)
    with in_mode(net, False), torch.no_grad():
        found = net(probe.clone())
    last = found if isinstance(found, Tensor) else found[-1]
    if not torch.equal(last, expected):
        raise InputError(
            f"cut into stages, {type(backbone).__name__} computes something else; randomness in evaluation mode, and "
            "what a forward pass notes for the next one, cannot be followed"
        )
    _require_independence(net, names, probe)
    net.policy = policy
    for module in (net, net.stages, *net.stages, net.heads):
        module.training = backbone.training
    shape = list(example.shape[1:])
    net.config = {**config, "input_shape": shape, "classes": classes, "exits": descriptions}  # type: ignore[assignment]
    return net


def attach_again(backbone: nn.Module, exits: Any, input_shape: Any) -> MultiExit:
    """The network of a stored config: what `attach` described, with fresh heads.

    Args:
        backbone: as it was.
        exits: ``config["exits"]``.
        input_shape: (C, H, W).

    Raises:
        InputError: a head was a module of the user's own, which no config describes, or the config is damaged.
    """
    if not isinstance(exits, dict) or not isinstance(input_shape, list):
        raise InputError("the stored exits are damaged; allowed: a table of module names and heads")
    own = [name for name, head in exits.items() if head is None]
    if own:
        raise InputError(
            f"the head behind {own[0]!r} was a module of your own; pass the whole network again, as `attach` made it"
        )
    weights = next(iter(backbone.parameters()), torch.empty(0))
    try:
        example = torch.zeros(1, *input_shape, device=weights.device, dtype=weights.dtype)
    except (RuntimeError, TypeError) as error:
        line = str(error).splitlines()[0]
        raise InputError(f"the stored input_shape is damaged: {reprlib.repr(input_shape)}: {line}") from None
    return attach(backbone, exits, example)


def _example(backbone: nn.Module, config: Mapping[str, Any], example: Tensor | None) -> Tensor:
    weights = next(iter(backbone.parameters()), torch.empty(0))
    if example is None:
        if "input_shape" not in config:
            raise InputError("the backbone does not say what images it takes; pass example=x, (B, C, H, W)")
        return torch.zeros(1, *config["input_shape"], device=weights.device, dtype=weights.dtype)
    if not isinstance(example, Tensor) or example.dim() not in (3, 4):
        found = tuple(example.shape) if isinstance(example, Tensor) else type(example).__name__
        raise InputError(f"the example is {found}; allowed: an image (C, H, W) or a batch (B, C, H, W)")
    example = example.detach()[None] if example.dim() == 3 else example.detach()
    if (weights.dtype, weights.device) != (example.dtype, example.device):
        raise InputError(
            f"the example is {example.dtype} on {example.device}, the backbone is {weights.dtype} on {weights.device}; "
            "they must be alike"
        )
    return example


def _probe(example: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    probe = torch.rand((2, *example.shape[1:]), generator=generator)
    # Unlike each other, so that what one does to the other shows.
    probe[1] = probe[1].round()
    return probe.to(example)


def _answer(backbone: nn.Module, probe: Tensor) -> Tensor:
    """The backbone's logits."""
    try:
        with in_mode(backbone, False), torch.no_grad():
            logits = backbone(probe.clone())
    except Exception as error:  # whatever a stranger's code raises
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"the backbone cannot take images of shape {tuple(probe.shape[1:])}: {line}"
        ) from None
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(probe):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"the backbone returns {found}; allowed: logits (batch, classes)")
    return logits


def _taps(net: MultiExit, probe: Tensor) -> list[Tensor]:
    """What each head reads, as it is before anything changes it in place."""
    taps = []
    state: tuple[Tensor, ...] = (probe.clone(),)
    with in_mode(net, False), torch.no_grad():
        for stage in net.stages:
            state = as_state(stage(*state))
            taps.append(state[0].clone())
    return taps


def _require_classes(head: nn.Module, name: str, tap: Tensor, classes: int) -> None:
    try:
        with in_mode(head, False), torch.no_grad():
            logits = head(tap.clone())
    except Exception as error:  # whatever a stranger's code raises
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"the head behind {name!r} cannot take what the module returns, {('batch', *tap.shape[1:])}: {line}"
        ) from None
    if not isinstance(logits, Tensor) or logits.shape != (len(tap), classes):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(
            f"the head behind {name!r} returns {found} for {len(tap)} images; allowed: {(len(tap), classes)}, the "
            "backbone's classes"
        )


_ALIKE = 0.003
"""By how much logits may differ, relative to the largest: rounding, TF32 included."""


def _require_independence(net: MultiExit, names: Sequence[str], probe: Tensor) -> None:
    """Refuse heads whose answer for an image depends on the images beside it, or on being run in one piece.

    The deployed network asks a later head for those alone that are still inside, from copies of what crosses each cut:
    two tensors that were one memory are not any more.
    """
    with in_mode(net, False), torch.no_grad():
        together, alone = as_state(net(probe.clone())), as_state(net(probe[:1].clone()))
        parted: list[Tensor] = []
        state: tuple[Tensor, ...] = (probe.clone(),)
        for stage, head in zip(net.stages, net.heads, strict=True):
            state = as_state(stage(*(part[:1].clone() if len(part) > 1 else part.clone() for part in state)))
            parted.append(head(state[0].clone()))
    for name, *answers in zip([*names, "the end"], together, alone, parted, strict=True):
        beside, single, apart = answers
        scale = float(beside.abs().amax().clamp_min(1e-6))
        if not bool((beside[:1] - single).abs().amax() <= _ALIKE * scale) and bool(single.isfinite().all()):
            raise InputError(
                f"the answer of the exit behind {name!r} depends on the images beside it; allowed: each image alone"
            )
        if not bool((apart - single).abs().amax() <= _ALIKE * scale) and bool(single.isfinite().all()):
            raise InputError(
                f"the exit behind {name!r} answers otherwise when stages run one by one: two tensors that cross a cut "
                "share memory, and one is changed in place later; allowed: cuts where that is not so"
            )


def _touched(net: MultiExit, probe: Tensor) -> tuple[bool, ...]:
    """Which taps their heads or later stages change in place, in either mode: those heads must read a copy.

    Torch counts the changes of a tensor, those through its views included. A gradient of the head would need the value
    from before. Dropout does nothing in evaluation mode and may do it in place in training.
    """
    changed = _changed(net, probe, training=False)
    with _buffers_kept(net), torch.random.fork_rng([probe.device] if probe.is_cuda else []):
        try:
            in_training = _changed(net, probe, training=True)
        except Exception:
            # What cannot run in training mode here, such as batch norm of two numbers, may in a larger batch.
            in_training = (True,) * net.exits
    return tuple(one or other for one, other in zip(changed, in_training, strict=True))


def _changed(net: MultiExit, probe: Tensor, training: bool) -> tuple[bool, ...]:
    """Which taps a pass in one mode changes in place."""
    taps, versions = [], []
    state: tuple[Tensor, ...] = (probe.clone(),)
    with in_mode(net, training), torch.no_grad():
        for stage, head in zip(net.stages, net.heads, strict=True):
            state = as_state(stage(*state))
            taps.append(state[0])
            versions.append(state[0]._version)
            head(state[0])
    return tuple(tap._version != version for tap, version in zip(taps, versions, strict=True))


@contextmanager
def _buffers_kept(net: nn.Module) -> Iterator[None]:
    """Inside the block buffers, such as population statistics, may change; then they are as before."""
    before = [(buffer, buffer.clone()) for buffer in net.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
