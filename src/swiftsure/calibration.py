"""New thresholds for the exits of a trained run, from held-out images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import swiftsure.files as files
from swiftsure import certificates, data, examples, models, results, run, run_exits, samples
from swiftsure.attacks import Forced
from swiftsure.certificates import certifying
from swiftsure.errors import InputError
from swiftsure.exits import MultiExit, Policy

PAGE = "report.html"


@dataclass(frozen=True)
class Calibrated:
    """Thresholds, and what they do on the images that they were fitted to.

    Attributes:
        policy: as it was stored.
        n: how many images.
        accuracy: share of them that is right.
        shares: share that leaves at each exit.
        macs: mean multiply-adds.
        static: multiply-adds of all exits.
        forced: with a forced budget: what attacks did to the images that it was fitted to.
        forgot: whether the run held what other thresholds had measured, which was removed.
    """

    policy: Policy
    n: int
    accuracy: float
    shares: list[float]
    macs: float
    static: int
    forced: Forced | None = None
    forgot: bool = False


def calibrate_run(
    folder: str | Path,
    *,
    macs: float | None = None,
    certified_macs: float | None = None,
    forced_macs: float | None = None,
    attacked: bool = False,
    thresholds: Sequence[float] | None = None,
    policy: str | None = None,
    device: str = "auto",
    data_root: str | Path | None = None,
    model: str | None = None,
) -> Calibrated:
    """Fit thresholds on the calibration half of the validation split, and store them in config.json.

    What was measured with other thresholds is removed from the run.

    Args:
        folder: a run directory whose training is finished.
        macs: the mean multiply-adds an image may cost, for the best accuracy within them; None: equally many images at
            each exit.
        certified_macs: instead, the mean of the proven worst-case multiply-adds over the recipe's ball, for the best
            verified accuracy within them.
        forced_macs: instead, the mean multiply-adds that attacks on the cost may force within the recipe's ball, for
            the best accuracy within them; fitted to 300 of the images.
        attacked: with macs or forced_macs: the best accuracy on clean images and under attacks on each exit, over the
            recipe's ball.
        thresholds: by hand instead, one for each exit but the last.
        policy: "entropy" or "confidence"; None: the recipe's.
        device: "auto" or a torch device.
        data_root: where the data sets lie.
        model: "package.module:function" for an architecture that no name is registered for.

    Raises:
        InputError: one exit, a budget below the first exit's cost, thresholds of the wrong number, or unusable options
            or files.
    """
    folder = Path(folder)
    recipe = run.read_recipe(folder)
    given = {
        "macs": macs, "certified_macs": certified_macs, "forced_macs": forced_macs, "thresholds": thresholds
    }  # fmt: skip
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise InputError(f"{' and '.join(named)} are given together; allowed: one of them")
    if attacked and macs is None and forced_macs is None:
        raise InputError("attacked images fit thresholds within a budget; give macs or forced_macs as well")
    choice = replace(
        recipe.exits,
        policy=policy or recipe.exits.policy,  # type: ignore[arg-type]
        macs=macs,
        certified_macs=certified_macs,
        forced_macs=forced_macs,
        attacked=attacked,
        thresholds=None if thresholds is None else list(thresholds),
    )
    net = run.read_network(folder, run.pick_device(device), model)
    if not isinstance(net, MultiExit) or net.exits == 1:
        raise InputError(f"{folder} has a network of one exit; there are no thresholds to fit")
    images = data.load(recipe.data.name, data_root, recipe.seed).calibration
    ball = recipe.ball.build()
    forced = None if forced_macs is None else run_exits.fit_forced(net, choice, images, ball)
    fitted = run_exits.fit_policy(net, choice, images, ball) if forced is None else forced.policy
    assert fitted is not None
    net.policy = fitted
    found = _measured(net, fitted, images)
    # In this order: killed in between, the run has no figures rather than figures of other thresholds.
    forgot = _forget(folder)
    models.save_policy(net, folder)
    return replace(found, forced=forced, forgot=forgot)


def _measured(net: MultiExit, policy: Policy, images: data.ImageSet) -> Calibrated:
    device = next(net.parameters()).device
    right, exit, macs = [], [], []
    with certifying(net):
        for part in torch.arange(len(images)).split(500):
            x, y = images.batch(part, device)
            answer = net.adaptive(x, policy)
            right.append((answer.label == y).cpu())
            exit.append(answer.exit.cpu())
            macs.append(answer.macs.cpu())
    shares = torch.cat(exit).bincount(minlength=net.exits).double() / len(images)
    return Calibrated(
        policy,
        len(images),
        torch.cat(right).double().mean().item(),
        shares.tolist(),
        torch.cat(macs).double().mean().item(),
        net.macs(images.shape)[-1],
    )


def _forget(folder: Path) -> bool:
    """Take out of a run what depends on thresholds; how it was trained stays. Whether there was anything."""
    path, measured = folder / results.NAME, False
    if path.exists():
        known = results.read(folder)
        measured = any(known[part] is not None for part in ("clean", "attacked", "verified"))
        kept = {name: known[name] for name in ("seed", "device", "versions", "weights_sha256")}
        kept["seconds"] = {"train": known["seconds"]["train"]}
        files.write_json(path, results.merge_parts(results.empty_results(), kept))
    proofs = (certificates.NAME, certificates.SLOPES_NAME)
    for name in (samples.NAME, *proofs, examples.NAME, examples.BROKEN, run.SWEEP, PAGE):
        measured |= (folder / name).exists()
        (folder / name).unlink(missing_ok=True)
    return measured
