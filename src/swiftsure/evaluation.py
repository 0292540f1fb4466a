"""What is measured of a trained run: attacks, certificates and cost, on the same images, joined into its files.

The order of writing matters: the files that a defect would be examined with come first, then the guard that no
attack breaks a certified sample, and results.json only after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

import swiftsure.files as files
from swiftsure import certificates, examples, report, results, run, run_attacks, samples, sweep, usage
from swiftsure.attacks import SUITE_NAMES
from swiftsure.certificates import METHODS, Certificate, certify
from swiftsure.data.progress import progress
from swiftsure.errors import InputError, SoundnessError
from swiftsure.exits import Answer, MultiExit, adaptive_latency_ms, latency_ms, parameters, static_macs
from swiftsure.models.storage import WEIGHTS
from swiftsure.run_attacks import Attacked
from swiftsure.samples import Table
from swiftsure.subject import BATCH, Subject, open_subject

PAGE = "report.html"


@dataclass(frozen=True)
class Measured:
    """What a measurement says, beside the files that it wrote.

    Attributes:
        results: all of results.json.
        data: the name of the set, and which part of it was used where it is not all of it.
        parameters: of the network.
        page: report.html, where it was drawn.
        skipped: attacks that could not be run on this network, and why.
    """

    results: dict[str, Any]
    data: str
    parameters: int
    page: Path | None = None
    skipped: dict[str, str] = field(default_factory=dict)


def attack_run(
    folder: str | Path,
    *,
    suite: str | None = None,
    transfer: Sequence[str | Path] = (),
    guards: int | None = None,
    **choice: Any,
) -> Measured:
    """Attack a run's network; writes its part of results.json, its columns of samples.csv, and examples.npz.

    Args:
        folder: a run directory.
        suite: one of `swiftsure.attacks.SUITE_NAMES`; None: the recipe's.
        transfer: run directories of other networks for the same images, to attack from as well.
        guards: how many samples the guards ask about, 0 for no guards; None: the recipe's.
        choice: limit, eps, device, model and data_root, as `open_subject` takes them.

    Raises:
        InputError: unusable options or files, or what is measured already is of other samples or another ball.
        SoundnessError: an attack broke a certified sample; the files to examine it with are written.
    """
    subject = open_subject(folder, **choice)
    suite = _known(suite or subject.recipe.evaluate.suite, "suite", SUITE_NAMES)
    results.require_joinable(subject.results, ("clean", "attacked"), subject.n, subject.ball)
    proven = _certificates_at_hand(subject)
    answers = subject.answers()
    clean = _clean_columns(subject, answers)
    attacked = _attack(subject, suite, transfer, guards)
    table = {**clean, **run_attacks.columns(attacked), **proven}
    return _publish(subject, _joined(_attack_parts(subject, attacked, answers, clean)), table, attacked)


def certify_run(folder: str | Path, *, method: str | None = None, **choice: Any) -> Measured:
    """Certify a run's network; writes its part of results.json, its columns of samples.csv, and certificates.jsonl.

    Args:
        folder: a run directory.
        method: a technique of `swiftsure.bounds`, or "auto" (cheap ones first); None: the recipe's.
        choice: limit, eps, device, model and data_root, as `open_subject` takes them.

    Raises:
        InputError, SoundnessError: as `attack_run`.
    """
    subject = open_subject(folder, **choice)
    method = _known(method or subject.recipe.evaluate.method, "method", METHODS)
    results.require_joinable(subject.results, ("clean", "verified"), subject.n, subject.ball)
    standing = samples.read(subject.folder) if subject.results["attacked"] else {}
    answers = subject.answers()
    clean = _clean_columns(subject, answers)
    certificate, seconds = _certify(subject, method)
    measured = {**clean, **_proven_columns(certificate)}
    table = samples.join(standing, measured, [name for name in standing if samples.is_of_attacks(name)])
    parts = [_certify_parts(subject, certificate, seconds, clean), usage.parts(subject, answers)]
    return _publish(subject, _joined(parts), table, certificate=certificate)


def measure_run(folder: str | Path, **choice: Any) -> Measured:
    """Count multiply-adds and time a run's network, one image at a time and 256 at a time.

    Args:
        folder: a run directory.
        choice: limit, eps, device, model and data_root, as `open_subject` takes them. What an image costs a network
            with one exit depends on neither limit nor eps.

    Raises:
        InputError: unusable options or files.
    """
    subject = open_subject(folder, **choice)
    return _publish(subject, _measure_parts(subject), None)


def evaluate_run(
    folder: str | Path,
    *,
    suite: str | None = None,
    method: str | None = None,
    transfer: Sequence[str | Path] = (),
    guards: int | None = None,
    **choice: Any,
) -> Measured:
    """Certify, attack and measure a run's network on the same images and ball, and draw its page.

    What was measured before on other samples or in another ball is replaced. A network of several exits is measured
    as it is deployed, with its thresholds.

    Args and errors as in `attack_run` and `certify_run`.
    """
    subject = open_subject(folder, **choice)
    suite = _known(suite or subject.recipe.evaluate.suite, "suite", SUITE_NAMES)
    method = _known(method or subject.recipe.evaluate.method, "method", METHODS)
    answers = subject.answers()
    clean = _clean_columns(subject, answers)
    certificate, seconds = _certify(subject, method)
    attacked = _attack(subject, suite, transfer, guards)
    parts = [
        _certify_parts(subject, certificate, seconds, clean),
        *_attack_parts(subject, attacked, answers, clean),
        _measure_parts(subject),
    ]
    table = {**clean, **_proven_columns(certificate), **run_attacks.columns(attacked)}
    measured = _publish(subject, _joined(parts), table, attacked, certificate)
    sweep.write(subject.folder, sweep.sweep(subject))
    page = report.page([subject.folder], subject.folder / PAGE)
    return replace(measured, page=page)


def _known(name: str, what: str, allowed: Mapping[str, Any] | tuple[str, ...]) -> str:
    if name not in allowed:
        raise InputError(f"{what} is {name!r}; allowed: {', '.join(allowed)}")
    return name


def _joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Parts of results.json together; those that are joined by key may come from several."""
    merged: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            merged[name] = {**merged.get(name, {}), **value} if name in results.JOINED_BY_KEY else value
    return merged


def _clean_columns(subject: Subject, answers: Answer) -> Table:
    """index, label, prediction and correct of every sample; with several exits, exit and macs as well."""
    label = subject.images.labels.cpu().numpy()
    predicted = answers.label.numpy()
    table: Table = {
        "index": np.arange(subject.n),
        "label": label,
        "prediction": predicted,
        "correct": (predicted == label).astype(np.int64),
    }
    return (
        table if subject.exits == 1 else {**table, "exit": answers.exit.numpy(), "macs": answers.macs.numpy()}
    )


def _attack(subject: Subject, suite: str, transfer: Sequence[str | Path], guards: int | None) -> Attacked:
    guards = subject.recipe.evaluate.guards if guards is None else guards
    if isinstance(guards, bool) or not isinstance(guards, int) or guards < 0:
        raise InputError(f"guards is {guards!r}; allowed: a number of samples, or 0 for none")
    return run_attacks.attack(subject, suite, transfer, guards)


def _certify(subject: Subject, method: str) -> tuple[Certificate, float]:
    """One certificate for all samples, computed part by part with the slack measured on the first."""
    began = perf_counter()
    parts: list[Certificate] = []
    with progress("certify", subject.n) as advance:
        for start in range(0, subject.n, BATCH):
            x, y = subject.images.batch(slice(start, start + BATCH), subject.device)
            delta = parts[0].delta if parts else None
            parts.append(certify(subject.net, x, y, ball=subject.ball, method=method, delta=delta))
            advance(len(x))

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name).cpu() for part in parts])

    names = ("certified", "margin", "required", "max_exit", "max_macs", "label")
    whole = Certificate(
        **{name: joined(name) for name in names},
        method=[one for part in parts for one in part.method],
        ball=subject.ball,
        policy=parts[0].policy,
        asked=method,
        delta=parts[0].delta,
        slopes=[one for part in parts for one in part.slopes],
    )
    return whole, perf_counter() - began


def _proven_columns(certificate: Certificate) -> Table:
    margin = certificate.margin.cpu().double().numpy()
    table: Table = {
        f"verified:{name}": np.array([int(one == name) for one in certificate.method])
        for name in certificate.by
    }
    return {
        **table,
        "certified": certificate.certified.cpu().numpy().astype(np.int64),
        "margin": np.where(np.isfinite(margin), margin, np.nan),
        "max_exit": certificate.max_exit.cpu().numpy(),
        "max_macs": certificate.max_macs.cpu().numpy(),
    }


def _certificates_at_hand(subject: Subject) -> Table:
    """The columns of certificates.jsonl, where it is about these weights, images and ball; else none."""
    if not (subject.folder / certificates.NAME).exists():
        return {}
    file = certificates.read(subject.folder)
    about = (file.weights_sha256, file.data_sha256, file.certificate.ball, file.certificate.policy)
    policy = subject.net.policy if isinstance(subject.net, MultiExit) and subject.exits > 1 else None
    if about != (files.sha256(subject.folder / WEIGHTS), subject.images.sha256(), subject.ball, policy):
        return {}
    return _proven_columns(file.certificate)


def _attack_parts(
    subject: Subject, attacked: Attacked, answers: Answer, clean: Table
) -> list[Mapping[str, Any]]:
    slowed = attacked.slowed.dearest if attacked.slowed is not None else None
    return [
        {"clean": _clean_part(clean)},
        run_attacks.parts(subject, attacked),
        usage.parts(subject, answers, attacked.worst, slowed),
    ]


def _certify_parts(
    subject: Subject, certificate: Certificate, seconds: float, clean: Table
) -> dict[str, Any]:
    last = certificate.max_exit.bincount(minlength=subject.exits).double() / subject.n
    return {
        "clean": _clean_part(clean),
        "verified": {
            "n": subject.n,
            "ball": subject.ball.as_dict(),
            "accuracy": certificate.certified.double().mean().item(),
            "by": certificate.by,
        },
        "seconds": {"certify": seconds},
        "macs": {"certified_max": certificate.max_macs.double().mean().item()},
        **({} if subject.exits == 1 else {"exits": {"certified": last.tolist()}}),
    }


def _clean_part(clean: Table) -> dict[str, Any]:
    return {"n": len(clean["correct"]), "accuracy": float(clean["correct"].mean())}


def _measure_parts(subject: Subject) -> dict[str, Any]:
    shape, net = subject.images.shape, subject.net
    latency = {
        "static_b1": latency_ms(net, 1, input_shape=shape),
        "static_b256": latency_ms(net, 256, input_shape=shape),
    }
    if isinstance(net, MultiExit) and net.policy is not None and subject.exits > 1:
        # Which exits are taken depends on the images: real ones, and enough of them.
        for name, batch, count in (("adaptive_b1", 1, 64), ("adaptive_b256", 256, 512)):
            x, _ = subject.images.batch(slice(0, count), subject.device)
            latency[name] = adaptive_latency_ms(net, x, batch)
    return {"macs": {"static": static_macs(net, shape)}, "latency_ms": latency}


def _publish(
    subject: Subject,
    parts: dict[str, Any],
    table: Table | None,
    attacked: Attacked | None = None,
    certificate: Certificate | None = None,
) -> Measured:
    """Write what was measured: table, certificates and examples, then the guard, then results.json."""
    folder = subject.folder
    parts = {
        **parts,
        "seed": subject.recipe.seed,
        "device": run.device_name(subject.device),
        "versions": run.versions(),
        "weights_sha256": files.sha256(folder / WEIGHTS),
    }
    unsound = None
    try:
        merged = results.merge_parts(subject.results, parts)
    except SoundnessError as error:
        # The totals already contradict each other; the table below may name the sample.
        unsound = error
    if certificate is not None:
        certificates.write(folder, certificate, subject.images)
    if table is not None:
        samples.write(folder, table)
        if attacked is None:
            examples.update(folder, table)
        else:
            examples.write(folder, subject.images, table, attacked.found.worst, attacked.worst.label.numpy())
        samples.refuse_broken_certificates(folder, table)
    if unsound is not None:
        raise unsound
    files.write_json(folder / results.NAME, merged)
    name = subject.images.name + (f" ({subject.images.subset})" if subject.images.subset else "")
    skipped = {} if attacked is None else attacked.found.skipped
    return Measured(merged, name, parameters(subject.net), skipped=skipped)
