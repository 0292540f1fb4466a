"""What training needs to go on after a kill: one safetensors file, replaced whole after each epoch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import swiftsure.files as files
from swiftsure.errors import InputError
from swiftsure.models import load_state

NAME = "epoch.safetensors"
_FORMAT = "swiftsure-training-state-1"


@dataclass
class Progress:
    """Where training stands between two epochs. Randomness is not in it: each epoch draws from (seed, epoch)."""

    records: list[dict[str, Any]] = field(default_factory=list)
    """The log so far, one entry an epoch."""
    controller: dict[str, float] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    """State dict of the epoch chosen so far; empty before the first."""

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.records)


def save(
    folder: Path, net: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, settings: str
) -> None:
    """Write the state of network, optimiser and progress atomically.

    Args:
        folder: created if missing.
        net: the network as trained so far.
        optimizer: its optimiser.
        progress: everything else.
        settings: what the training depends on; `restore` refuses a state written under other settings.

    Raises:
        InputError: the folder cannot be written.
    """
    tensors = {f"net.{name}": value for name, value in net.state_dict().items()}
    tensors |= {f"best.{name}": value for name, value in progress.best.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {
            f"optimizer.{index}.{name}": torch.as_tensor(value)
            for name, value in state.items()
            if value is not None
        }
    metadata = {
        "format": _FORMAT,
        "settings": settings,
        "records": json.dumps(progress.records),
        "controller": json.dumps(progress.controller),
    }
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with files.atomic(folder / NAME) as temporary:
        temporary.write_bytes(safetensors.torch.save(plain, metadata=metadata))


def restore(folder: Path, net: nn.Module, optimizer: torch.optim.Optimizer, settings: str) -> Progress | None:
    """Load the last saved state into network and optimiser; None where there is none yet.

    Raises:
        InputError: the file is damaged or foreign, or was written under other settings.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is damaged: {error}; remove it to start again") from None
    if metadata.get("format") != _FORMAT:
        raise InputError(f"{path} is not a training state of this version of swiftsure")
    if metadata["settings"] != settings:
        raise InputError(
            f"{path} is of a training with other settings; resume with the same, or start in a new folder"
        )

    def part(prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)
        }

    load_state(net, part("net."), path)
    slots: dict[int, dict[str, Tensor]] = {}
    for name, value in part("optimizer.").items():
        index, key = name.split(".", 1)
        slots.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    # In the parameters' own layout again: with another one an optimiser may round otherwise.
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if value.shape == parameter.shape:
                state[key] = torch.empty_like(parameter).copy_(value)
    return Progress(json.loads(metadata["records"]), json.loads(metadata["controller"]), part("best."))
