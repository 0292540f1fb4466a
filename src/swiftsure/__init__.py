"""Image classifiers that are swift (they leave at the first sure exit) and sure (what is promised is proven).

>>> import swiftsure as ss
>>> net = ss.load("runs/demo")
>>> ball = ss.Ball(eps="8/255", norm="inf")
>>> certificate = ss.certify(net, x, ball=ball)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swiftsure import (
        adapters,
        attacks,
        bounds,
        certificates,
        data,
        exits,
        models,
        report,
        results,
        training,
    )
    from swiftsure.ball import Ball
    from swiftsure.bounds import margins
    from swiftsure.certificates import certify
    from swiftsure.errors import InputError, SoundnessError
    from swiftsure.exits import attach
    from swiftsure.models import load
    from swiftsure.training import fit

    __version__: str

__all__ = [
    "Ball",
    "InputError",
    "SoundnessError",
    "__version__",
    "adapters",
    "attach",
    "attacks",
    "bounds",
    "certificates",
    "certify",
    "data",
    "exits",
    "fit",
    "load",
    "margins",
    "models",
    "report",
    "results",
    "training",
]

_HOME = {
    "Ball": "swiftsure.ball",
    "InputError": "swiftsure.errors",
    "SoundnessError": "swiftsure.errors",
    "attach": "swiftsure.exits",
    "certify": "swiftsure.certificates",
    "fit": "swiftsure.training",
    "load": "swiftsure.models",
    "margins": "swiftsure.bounds",
}


def __getattr__(name: str) -> Any:
    # On first use: importing torch takes seconds, and `swiftsure --help` needs none of it.
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("swiftsure")
    elif name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    elif name in __all__:
        value = import_module(f"swiftsure.{name}")
    else:
        raise AttributeError(f"module 'swiftsure' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
