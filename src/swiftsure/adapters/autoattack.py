"""AutoAttack's interface (Croce and Hein 2020) on the attacks of this project: one import is what a script changes."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from swiftsure.attacks import (
    apgd,
    apgd_targeted,
    attacks_for,
    dlr,
    fab_targeted,
    misclassified,
    run_suite,
    square,
)
from swiftsure.attacks._suites import Attack
from swiftsure.attacks.objectives import Judge, as_exits
from swiftsure.ball import Ball
from swiftsure.certificates import certifying
from swiftsure.errors import InputError, UnsupportedError
from swiftsure.exits import MultiExit
from swiftsure.modes import evaluating
from swiftsure.precision import in_full_precision

_NORMS = {"Linf": "inf", "L2": "2", "L1": "1"}
_VERSIONS = ("standard", "plus", "custom")


class AutoAttack:
    """Attack a network with one attack after another, each on the samples that still stand.

    A network of one exit meets AutoAttack's own set: apgd-ce, apgd-t, fab-t, square; "plus" has apgd-dlr too, and
    five restarts of it and of apgd-ce. A `MultiExit` with thresholds is judged as it is deployed and meets
    the suite for several exits ("standard", or "full" for "plus"), which AutoAttack does not have.

    Args:
        model: images (B, C, H, W) in [0, 1] -> logits (B, classes), a module or any function, or a `MultiExit` with
            thresholds; on its device, and computed in full float32, in evaluation mode.
        norm: "Linf", "L2" or "L1".
        eps: the radius in pixel units, a number or "8/255".
        seed: of all random starts; None draws one.
        verbose: print what is left after each attack.
        attacks_to_run: for version "custom": names of `attacks_to_run` of the other versions.
        version: "standard", "plus" or "custom".
        is_tf_model: False; networks are torch modules.
        device: where the model is; None: wherever its weights are, of a function the CPU.
        log_path: a file that what is printed is appended to.

    Raises:
        InputError: a norm, version or attack that is not here, a device that the model is not on, or several exits
            without thresholds.

    Warns:
        UserWarning: two passes over the same images differ (such a network is not attacked as it should be), or an
            attack cannot read the network.

    Example:
        >>> adversary = AutoAttack(model, norm="Linf", eps=8 / 255)
        >>> x_adv = adversary.run_standard_evaluation(x, y, bs=250)
    """

    def __init__(
        self,
        model: nn.Module | Callable[[Tensor], Tensor],
        norm: str = "Linf",
        eps: float | str = 0.3,
        seed: int | None = None,
        verbose: bool = True,
        attacks_to_run: Sequence[str] = (),
        version: str = "standard",
        is_tf_model: bool = False,
        device: torch.device | str | None = None,
        log_path: str | Path | None = None,
    ) -> None:
        if is_tf_model:
            raise InputError("is_tf_model is True; allowed: a torch module")
        if norm not in _NORMS:
            raise InputError(f"norm is {norm!r}; allowed: {', '.join(_NORMS)}")
        if version not in _VERSIONS:
            why = " (an attack on a random network averages over its draws)" if version == "rand" else ""
            raise InputError(f"version is {version!r}{why}; allowed: {', '.join(_VERSIONS)}")
        if not isinstance(model, nn.Module):
            model = _Function(model)
        wanted = torch.device("cpu" if device is None else device)
        place = next((parameter.device for parameter in model.parameters()), wanted)
        if device is not None and wanted.type != place.type:
            raise InputError(f"device is {str(device)!r}, the model is on {place}; they must be alike")
        if isinstance(model, MultiExit) and model.exits > 1 and model.policy is None:
            raise InputError(f"the model has {model.exits} exits and no thresholds; set model.policy")
        self.model, self.norm, self.epsilon = model, norm, eps
        self.version, self.device = version, place
        _ = self.ball  # Refuses a radius that is none.
        self.seed = int(torch.randint(2**31, ())) if seed is None else seed
        self.verbose, self.log_path = verbose, None if log_path is None else Path(log_path)
        self.attacks_to_run = list(attacks_to_run) if version == "custom" else list(self._known())
        """Names, in the order in which they are run; set it to run others."""

    @property
    def ball(self) -> Ball:
        """The threat model: of `norm` and `epsilon` as they are now."""
        return Ball(self.epsilon, _NORMS[self.norm])

    @property
    def judge(self) -> Judge:
        """What counts as broken: a wrong answer of the network as it is deployed now."""
        model = self.model
        if isinstance(model, MultiExit) and model.policy is not None and model.exits > 1:
            return model.policy.misclassified
        return misclassified

    @in_full_precision
    def run_standard_evaluation(
        self, x_orig: Tensor, y_orig: Tensor, bs: int = 250, return_labels: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run all attacks of `attacks_to_run`.

        Args:
            x_orig: images, (n, C, H, W), on any device.
            y_orig: labels, (n,).
            bs: how many are attacked at a time.
            return_labels: return the network's answers as well.

        Returns:
            Images like x_orig: an adversarial one where one was found, else the image itself. With return_labels
            also the answers to them, (n,).

        Raises:
            InputError: an unknown attack, or images and labels that do not fit.
        """
        attacks, ball, judge = self._chosen(), self.ball, self.judge
        with certifying(self.model):
            before = run_suite(self.model, x_orig, y_orig, ball, attacks={}, batch=bs, judge=judge)
            self._warn_of_randomness(x_orig[:bs])
            x_adv, broken, began = x_orig.detach().clone(), before.misclassified, time.perf_counter()
            self._log(f"using {self.version} version including {', '.join(attacks)}.")
            self._log(f"initial accuracy: {(~broken).double().mean():.2%}")
            for name, attack in attacks.items():
                left = (~broken).nonzero().squeeze(1)
                if len(left) == 0:
                    break
                x, y = x_orig[left.to(x_orig.device)], y_orig[left.to(y_orig.device)]
                try:
                    found = run_suite(
                        self.model, x, y, ball,
                        attacks={name: attack}, batch=bs, seed=self.seed, judge=judge,
                    )  # fmt: skip
                except UnsupportedError as error:
                    # Heard whether or not lines are printed: the result is weaker than it looks.
                    warnings.warn(f"{name} is left out: {error}", stacklevel=2)
                    continue
                hit = left[found.union]
                broken[hit] = True
                x_adv[hit.to(x_adv.device)] = found.worst[found.union].to(x_adv)
                self._log(
                    f"robust accuracy after {name.upper()}: {(~broken).double().mean():.2%} "
                    f"(total time {time.perf_counter() - began:.1f} s)"
                )
        far = ball.distance(x_adv, x_orig).max()
        self._log(f"max {self.norm} perturbation: {far:.5f}, max: {x_adv.max():.5f}, min: {x_adv.min():.5f}")
        self._log(f"robust accuracy: {(~broken).double().mean():.2%}")
        return (x_adv, self._labels(x_adv, bs).to(y_orig)) if return_labels else x_adv

    @in_full_precision
    def run_standard_evaluation_individual(
        self, x_orig: Tensor, y_orig: Tensor, bs: int = 250, return_labels: bool = False
    ) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        """Run every attack on all samples: what `run_standard_evaluation` returns, by the attack's name.

        Args, raises: as there.
        """
        chosen, verbose, self.verbose = self.attacks_to_run, self.verbose, False
        found: dict[str, Tensor | tuple[Tensor, Tensor]] = {}
        try:
            for name in chosen:
                self.attacks_to_run, began = [name], time.perf_counter()
                result = self.run_standard_evaluation(x_orig, y_orig, bs, return_labels=True)
                assert isinstance(result, tuple)
                found[name] = result if return_labels else result[0]
                self.verbose = verbose
                left = (result[1] == y_orig).double().mean()
                self._log(
                    f"robust accuracy by {name.upper()} {left:.2%} (time attack: {time.perf_counter() - began:.1f} s)"
                )
                self.verbose = False
        finally:
            self.attacks_to_run, self.verbose = chosen, verbose
        return found

    @in_full_precision
    def clean_accuracy(self, x_orig: Tensor, y_orig: Tensor, bs: int = 250) -> float:
        """The share of samples that the network gets right."""
        right = (self._labels(x_orig, bs) == y_orig.to(self.device)).double().mean().item()
        self._log(f"clean accuracy: {right:.2%}")
        return right

    def _warn_of_randomness(self, x: Tensor) -> None:
        first, again = (as_exits(self.model(x.to(self.device, copy=True))) for _ in range(2))
        if not all(
            torch.allclose(*pair, 1e-3, 1e-5, equal_nan=True) for pair in zip(first, again, strict=True)
        ):
            warnings.warn(
                "two passes over the same images differ: of a network that draws random numbers this evaluation says "
                "too much",
                stacklevel=4,
            )

    def _labels(self, x: Tensor, bs: int) -> Tensor:
        found = []
        with evaluating(self.model), torch.no_grad():
            for part in x.split(bs):
                logits = as_exits(self.model(part.to(self.device)))
                policy = getattr(self.model, "policy", None)
                z = policy.logits_of(logits) if policy is not None and len(logits) > 1 else logits[-1]
                found.append(z.argmax(1))
        return torch.cat(found)

    def _known(self) -> Mapping[str, Attack]:
        """All attacks of the version, by AutoAttack's names where it has them."""
        plus = self.version == "plus"
        if isinstance(self.model, MultiExit) and self.model.exits > 1:
            shape = (getattr(self.model, "config", None) or {}).get("input_shape", (1,))
            suite = "full" if plus else "standard"
            return attacks_for(suite, self.model.exits, shape[0], self.model.policy)
        # AutoAttack gives the sparse ball more restarts, and apgd-t fewer targets.
        sparse = self.ball.norm == "1"
        restarts, targets = (5 if plus or sparse else 1), (5 if sparse else 9)
        known: dict[str, Attack] = {
            "apgd-ce": partial(apgd, restarts=restarts),
            "apgd-dlr": partial(apgd, restarts=restarts, objective=dlr),
            "apgd-t": partial(apgd_targeted, targets=targets),
            "fab-t": fab_targeted,
            "square": partial(square, steps=5000),
        }
        if self.version == "standard":
            known.pop("apgd-dlr")
        return known

    def _chosen(self) -> Mapping[str, Attack]:
        known = self._known()
        for name in self.attacks_to_run:
            if name not in known:
                raise InputError(f"attacks_to_run holds {name!r}; allowed: {', '.join(known)}")
        return {name: known[name] for name in self.attacks_to_run}

    def _log(self, line: str) -> None:
        if self.verbose:
            print(line)
            if self.log_path is not None:
                with self.log_path.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")


class _Function(nn.Module):
    """A plain function of images as a module: AutoAttack takes those too."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)
