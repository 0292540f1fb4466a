"""torchvision and timm, for tests of real backbones.

The torchvision wheel on a CPU-only torch may lack its compiled operators; importing it then fails on `nms`, which no
classifier needs. Declared empty, they let its models, and timm's, be imported.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from types import ModuleType

import torch

_DECLARED: list[torch.library.Library] = []
"""A library is gone with its last reference."""


def load(name: str) -> ModuleType:
    """``torchvision`` or a module that needs it, such as ``timm``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module("torchvision")
        except RuntimeError:
            for half in [module for module in sys.modules if module.split(".")[0] == "torchvision"]:
                del sys.modules[half]
            library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _DECLARED.append(library)
            importlib.import_module("torchvision")
        return importlib.import_module(name)
