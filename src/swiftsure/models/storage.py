"""A network on disk: model.safetensors (weights) and config.json (how to rebuild it). No pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import swiftsure.files as files
from swiftsure.errors import InputError
from swiftsure.exits import MultiExit, Policy, attach_again, give_adaptive
from swiftsure.models.registry import build

WEIGHTS, CONFIG = "model.safetensors", "config.json"
FORMAT = "swiftsure-model"
FORMAT_VERSION = 1


def save(net: nn.Module, folder: str | Path, **extra: Any) -> None:
    """Write ``folder/model.safetensors`` and ``folder/config.json``, each atomically.

    Args:
        net: a network from `build` (it carries ``net.config``), or any module: then `load` needs ``model=``. Of a
            `MultiExit` its policy is stored as well, and of an attached one its cuts and heads.
        folder: created if missing.
        extra: further plain JSON values for config.json (ball, versions, ...).

    Raises:
        InputError: the folder cannot be written.
    """
    folder = Path(folder)
    save_weights(net.state_dict(), folder / WEIGHTS)
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": getattr(net, "config", None),
        "policy": _policy_of(net),
        **extra,
    }
    files.write_json(folder / CONFIG, {**config, "weights_sha256": files.sha256(folder / WEIGHTS)})


def save_weights(state: dict[str, Tensor], path: Path) -> None:
    """Write a state dict as safetensors, atomically.

    Raises:
        InputError: it cannot be written.
    """
    with files.atomic(path) as temporary:
        # Tensors that share memory (one module used under two names) are refused by safetensors: write copies.
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
        temporary.write_bytes(safetensors.torch.save(tensors, metadata={"format": FORMAT}))


def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """A network in eval mode from a folder that `save` or a run wrote.

    Args:
        folder: holds model.safetensors and config.json.
        model: the rebuilt module for a network that no name is registered for; its tensors' names, shapes and
            types are checked strictly. For a network that `attach` made it is the backbone, to which heads given by
            name are attached again, or the whole `MultiExit`.

    Returns:
        The network; ``net.policy`` holds its thresholds (None for one exit, or where none were set), and
        ``net.adaptive(x)`` answers for any number of exits.

    Raises:
        InputError: a file is missing, damaged or foreign, the architecture is unknown, or a tensor does not fit.
    """
    folder = Path(folder)
    config = read_config(folder)
    model = _rebuilt(folder, config.get("model"), model)
    policy = config.get("policy")
    if policy is not None and not isinstance(model, MultiExit):
        raise InputError(f"{folder / CONFIG} has thresholds of exits; the network has one exit")
    state = _fitting(model, read_weights(folder / WEIGHTS), folder / WEIGHTS)
    if config.get("weights_sha256") != files.sha256(folder / WEIGHTS):
        raise InputError(
            f"{folder / WEIGHTS} is not the file that {CONFIG} was written with (sha256 differs): one is damaged"
        )
    model.load_state_dict(state)
    if isinstance(model, MultiExit):
        try:
            model.policy = None if policy is None else Policy.from_dict(policy)
        except InputError as error:
            raise InputError(f"{folder / CONFIG}: {error}") from None
    return give_adaptive(model).eval()


def save_policy(net: MultiExit, folder: str | Path) -> None:
    """Put the thresholds of a network into the config.json that it was saved with; nothing else changes.

    Raises:
        InputError: the folder holds no network, or cannot be written.
    """
    folder = Path(folder)
    files.write_json(folder / CONFIG, {**read_config(folder), "policy": _policy_of(net)})


def _policy_of(net: nn.Module) -> dict[str, Any] | None:
    policy = getattr(net, "policy", None)
    return policy.as_dict() if isinstance(policy, Policy) else None


def _rebuilt(folder: Path, description: Any, model: nn.Module | None) -> nn.Module:
    """The network that a config describes, with fresh weights, around the module that was passed, if any."""
    described = isinstance(description, dict)
    if model is None:
        if not described or "name" not in description:
            raise InputError(
                f"{folder / CONFIG} names no architecture; pass the module: load({str(folder)!r}, model=...)"
            )
        options = description.get("options", {})
        if not isinstance(options, dict):
            raise InputError(f"{folder / CONFIG} is damaged: model.options is not a table")
        model = build(str(description["name"]), **options)
        if [description.get("input_shape"), description.get("classes")] != [
            getattr(model, "config")["input_shape"],  # noqa: B009 (nn.Module's typed __getattr__)
            getattr(model, "config")["classes"],  # noqa: B009
        ]:
            raise InputError(
                f"{folder / CONFIG} contradicts the architecture {description['name']!r} it names"
            )
    # A network of one exit may be what exits were attached to, unless `attach` made it; one of several is the whole.
    whole = isinstance(model, MultiExit) and (model.exits > 1 or hasattr(model, "backbone"))
    if described and "exits" in description and not whole:
        try:
            return attach_again(model, description["exits"], description.get("input_shape"))
        except InputError as error:
            raise InputError(f"{folder / CONFIG}: {error}") from None
    if described and whole and isinstance(description.get("exits"), dict):
        stored, given = (
            list(description["exits"]),
            list((getattr(model, "config", None) or {}).get("exits") or {}),
        )
        if stored != given:
            raise InputError(
                f"{folder / CONFIG} has exits behind {', '.join(stored)}; the network passed has them behind "
                f"{', '.join(given) or 'nothing that attach knows'}"
            )
    return model


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a saved network.

    Raises:
        InputError: missing, damaged, or not written by swiftsure.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder} is not a folder; expected a run or a saved network with {WEIGHTS} and {CONFIG}"
        )
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise InputError(
                f"{folder} has no {name}; expected a run or a saved network with {WEIGHTS} and {CONFIG}"
            )
    config = files.read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise InputError(f"{folder / CONFIG} was not written by swiftsure (no 'format': {FORMAT!r})")
    if config.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{folder / CONFIG} has format version {config.get('format_version')}; known: {FORMAT_VERSION}"
        )
    return config


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        InputError: missing, truncated, or not safetensors.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is damaged or not a safetensors file: {error}") from None


def load_state(net: nn.Module, state: dict[str, Tensor], source: str | Path = "the state dict") -> None:
    """Copy a state dict into a network, strictly: the same names, shapes and kinds of numbers, all finite.

    Raises:
        InputError: the first thing that does not fit; the network is left as it was.
    """
    net.load_state_dict(_fitting(net, state, source))


def _fitting(net: nn.Module, state: dict[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """A state dict that was held against a network's own, in that one's dictionary."""
    own = net.state_dict()
    for what, names in (("lacks", own.keys() - state.keys()), ("has an unknown", state.keys() - own.keys())):
        if names:
            raise InputError(
                f"{source} {what} tensor {min(names)!r} ({len(names)} in all); it is of another network"
            )
    for name, tensor in own.items():
        new = state[name]
        if new.shape != tensor.shape:
            raise InputError(
                f"{source}: {name} has shape {tuple(new.shape)}, the network needs {tuple(tensor.shape)}"
            )
        if new.is_floating_point() != tensor.is_floating_point():
            raise InputError(f"{source}: {name} holds {new.dtype}, the network needs {tensor.dtype}")
        if new.is_floating_point() and not bool(torch.isfinite(new).all()):
            raise InputError(f"{source}: {name} holds NaN or infinite values")
    # In the network's own dictionary: some layers look there for the version that they were stored by.
    own.update(state)
    return own
