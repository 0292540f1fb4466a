"""The papers' networks by name, and networks on disk."""

from swiftsure.models import certified as _certified  # noqa: F401  (registers its networks)
from swiftsure.models import mixtrain as _mixtrain  # noqa: F401  (registers its networks)
from swiftsure.models import rdi as _rdi  # noqa: F401  (registers its networks)
from swiftsure.models.layers import Normalize, ResidualBlock
from swiftsure.models.registry import build, names, register
from swiftsure.models.storage import (
    load,
    load_state,
    read_config,
    read_weights,
    save,
    save_policy,
    save_weights,
)

__all__ = [
    "Normalize",
    "ResidualBlock",
    "build",
    "load",
    "load_state",
    "names",
    "read_config",
    "read_weights",
    "register",
    "save",
    "save_policy",
    "save_weights",
]
