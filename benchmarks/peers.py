"""auto_LiRPA's lower bounds of class margins beside ours. Never needed: where it is not installed, nothing is compared.

It is looked for as an installed package, and in ../peers/auto_LiRPA beside this repository.
"""

from __future__ import annotations

import copy
import importlib
import sys
import warnings
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swiftsure as ss
from swiftsure.errors import InputError

BESIDE = Path(__file__).resolve().parents[2] / "peers" / "auto_LiRPA"
METHODS = {"interval": "IBP", "crown-ibp": "CROWN-IBP", "crown": "CROWN"}
"""Techniques of ours that it has too, and their names there."""


def find(path: Path | None = None) -> tuple[ModuleType | None, str]:
    """The package, or None; and its name and version, or why there is none.

    Args:
        path: the folder that holds it; None: wherever Python finds it, else `BESIDE`.

    Raises:
        InputError: a path was given, and it cannot be imported from there.
    """
    if path is not None and not (path / "auto_LiRPA").is_dir():
        raise InputError(f"{path} holds no folder auto_LiRPA; --peer names a checkout of it")
    sys.path.insert(0, str(path)) if path is not None else sys.path.append(str(BESIDE))
    try:
        # It sets filters of its own: what it says of itself is kept from the tables.
        with warnings.catch_warnings(record=True):
            package = importlib.import_module("auto_LiRPA")
    except ImportError as error:
        if path is not None:
            raise InputError(f"auto_LiRPA cannot be imported from {path}: {error}") from None
        return None, f"auto_LiRPA is left out ({error})"
    warnings.filterwarnings("ignore", module="auto_LiRPA")
    return package, f"auto_LiRPA {package.__version__}"


class Peer:
    """One network as auto_LiRPA sees it: a copy, in evaluation mode.

    The normalisation is taken off the network and put on the box: its own training scripts do so, it is the faster
    for it, and inside a network its patches mode refuses it. Convolutions stay in that mode, its default: for crown
    it was several times faster than the other on mnist_small and cifar_resnet.

    Args:
        package: what `find` found.
        net: Sequential, with a Normalize first.
    """

    def __init__(self, package: ModuleType, net: nn.Module) -> None:
        assert isinstance(net, nn.Sequential)
        self._package = package
        self._normalize, *layers = copy.deepcopy(net).eval()
        assert isinstance(self._normalize, ss.models.Normalize)
        shape: tuple[int, ...] = tuple(net.input_shape)  # type: ignore[arg-type]
        self.bounded = package.BoundedModule(nn.Sequential(*layers).eval(), torch.zeros(1, *shape))

    def margins(
        self, x: Tensor, y: Tensor, ball: ss.Ball, technique: str, *, our_rule: bool = False
    ) -> Tensor:
        """Lower bounds of z_y - z_j, (batch, classes - 1): all classes but y, in their order.

        Args:
            x, y: images and labels.
            ball: L-inf.
            technique: a key of `METHODS`.
            our_rule: for "crown": give it plain intervals of the hidden units, so that it takes the tighter of these
                and of its own, side by side, as ours does. By default it takes its own of all units that intervals
                leave unstable in any image of the batch.
        """
        hidden = self._hidden_intervals(x, ball) if our_rule and technique == "crown" else {}
        lower, _ = self.bounded.compute_bounds(
            x=(self._perturbed(x, ball),), C=self._margins_of(y),
            method=METHODS[technique], bound_upper=False, reference_bounds=hidden, aux_reference_bounds=hidden,
        )  # fmt: skip
        assert isinstance(lower, Tensor)
        return lower

    def _margins_of(self, y: Tensor) -> Tensor:
        identity = torch.eye(int(self.bounded.final_shape[-1]), device=y.device)
        return others(identity[y][:, None] - identity, y)

    def _perturbed(self, x: Tensor, ball: ss.Ball) -> Tensor:
        lower, upper = (self._normalize(side) for side in ball.box(x))
        norm = self._package.PerturbationLpNorm(norm=float("inf"), x_L=lower, x_U=upper)
        bounded: Tensor = self._package.BoundedTensor(self._normalize(x), norm)
        return bounded

    def _hidden_intervals(self, x: Tensor, ball: ss.Ball) -> dict[str, tuple[Tensor, Tensor]]:
        self.bounded.compute_bounds(x=(self._perturbed(x, ball),), method="IBP")
        return {
            node.name: (node.lower.detach().clone(), node.upper.detach().clone())
            for node in self.bounded.get_layers_requiring_bounds()
        }


def others(margins: Tensor, y: Tensor) -> Tensor:
    """(batch, classes, ...) without the entry of the true class: (batch, classes - 1, ...)."""
    batch, classes = margins.shape[:2]
    kept = torch.arange(classes, device=y.device) != y[:, None]
    return margins[kept].view(batch, classes - 1, *margins.shape[2:])


def worst_case_loss(lower: Tensor) -> Tensor:
    """Cross-entropy of the worst logits that margins (batch, classes - 1) allow, the true class at 0."""
    return F.cross_entropy(F.pad(-lower, (1, 0)), torch.zeros(len(lower), dtype=torch.int64))


def difference(ours: Tensor, theirs: Tensor) -> Tensor:
    """ours - theirs, in units of the larger of 1 and the largest bound of the image (float32 cannot do better)."""
    scale = theirs.abs().amax(1, keepdim=True).clamp_min(1.0)
    return (ours - theirs) / scale
