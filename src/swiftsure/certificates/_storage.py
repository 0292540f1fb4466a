"""certificates.jsonl: a header line, one line a sample, and a digest of all bytes before it.

The digest notices damage: a flipped bit, a lost line, a careless edit. It is no signature; whoever forges a verdict can
compute it anew, and `recheck` is what finds that out. Slopes that a recomputation needs stand beside it, in
certificates.safetensors, whose digest is in the header.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from swiftsure import files
from swiftsure.ball import Ball
from swiftsure.certificates._certify import METHODS, Certificate
from swiftsure.certificates._proof import UNPROVEN, SampleSlopes
from swiftsure.certificates._slopes import SLOPES_NAME, DamagedSlopes, packed, unpacked
from swiftsure.data import ImageSet
from swiftsure.errors import InputError
from swiftsure.exits import Policy
from swiftsure.models.storage import WEIGHTS

NAME = "certificates.jsonl"
FORMAT = "swiftsure-certificates"
FORMAT_VERSION = 2

Types = tuple[type, ...]
_HEADER: dict[str, Types] = {
    "format": (str,),
    "format_version": (int,),
    "n": (int,),
    "weights_sha256": (str,),
    "data_sha256": (str,),
    "policy": (dict, type(None)),
    "policy_sha256": (str, type(None)),
    "slopes_sha256": (str, type(None)),
    "ball": (dict,),
    "method": (str,),
    "delta": (float,),
    "versions": (dict,),
}
_BALL: dict[str, Types] = {"eps": (float,), "norm": (str,), "low": (float,), "high": (float,)}
_SAMPLE: dict[str, Types] = {
    "index": (int,),
    "image": (str,),
    "label": (int,),
    "certified": (bool,),
    "margin": (float, type(None)),
    "method": (str,),
    "exits": (list,),
    "max_exit": (int,),
    "max_macs": (int,),
}


@dataclass(frozen=True)
class CertificateFile:
    """What certificates.jsonl holds.

    Attributes:
        certificate: the verdicts, on the CPU; margins in float64, which holds what was written exactly.
        weights_sha256: of model.safetensors beside it.
        data_sha256: of the certified images and labels, as ``ImageSet.sha256``.
        policy_sha256: of rule and thresholds; None for one exit, which has none.
        slopes_sha256: of certificates.safetensors beside it; None where no proof needs slopes.
        image_sha256: for each sample the digest of its image, as `image_sha256` gives it.
        versions: of swiftsure, torch and Python when it was written.
    """

    certificate: Certificate
    weights_sha256: str
    data_sha256: str
    policy_sha256: str | None
    slopes_sha256: str | None
    image_sha256: Sequence[str]
    versions: Mapping[str, str]


def write(folder: str | Path, certificate: Certificate, images: ImageSet) -> None:
    """Write ``folder/certificates.jsonl`` beside the weights that it is about, and its slopes, each atomically.

    Args:
        folder: holds model.safetensors, the certified network.
        certificate: from `certify`.
        images: the set that was certified, in its order and no more than that.

    Raises:
        InputError: there are no weights, the numbers of samples differ, or the folder cannot be written.
    """
    folder = Path(folder)
    if not (folder / WEIGHTS).is_file():
        raise InputError(
            f"{folder} has no {WEIGHTS}; certificates are kept beside the weights they are about"
        )
    if len(images) != len(certificate):
        raise InputError(
            f"{len(certificate)} certificates but {len(images)} images; there must be one an image"
        )
    slopes = packed(certificate.slopes)
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "n": len(certificate),
        "weights_sha256": files.sha256(folder / WEIGHTS),
        "data_sha256": images.sha256(),
        "policy": None if certificate.policy is None else certificate.policy.as_dict(),
        "policy_sha256": policy_sha256(certificate.policy),
        "slopes_sha256": None if slopes is None else hashlib.sha256(slopes).hexdigest(),
        "ball": {
            key: value if key == "norm" else float(value) for key, value in certificate.ball.as_dict().items()
        },
        "method": certificate.asked,
        "delta": float(certificate.delta),
        "versions": _versions(),
    }
    columns = zip(
        certificate.label.tolist(),
        certificate.certified.tolist(),
        certificate.margin.tolist(),
        certificate.method,
        certificate.required.tolist(),
        certificate.max_exit.tolist(),
        certificate.max_macs.tolist(),
        strict=True,
    )
    lines = [_line(header)]
    for index, (label, certified, margin, method, required, max_exit, max_macs) in enumerate(columns):
        known = margin if math.isfinite(margin) else None
        exits = [exit for exit, can in enumerate(required) if can]
        values = (
            index,
            image_sha256(images, index),
            label,
            certified,
            known,
            method,
            exits,
            max_exit,
            max_macs,
        )
        lines.append(_line(dict(zip(_SAMPLE, values, strict=True))))
    body = b"".join(lines)
    # First the slopes: a kill in between leaves certificates that say that their slopes are others'.
    if slopes is not None:
        with files.atomic(folder / SLOPES_NAME) as temporary:
            temporary.write_bytes(slopes)
    with files.atomic(folder / NAME) as temporary:
        temporary.write_bytes(body + _digest(body))
    if slopes is None:
        (folder / SLOPES_NAME).unlink(missing_ok=True)


def read(folder: str | Path) -> CertificateFile:
    """The certificates of a folder, once every byte of the file and of its slopes is accounted for.

    Raises:
        InputError: no such file, or it or its slopes are damaged, truncated, edited, foreign, or contradict themselves.
    """
    path = Path(folder) / NAME
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{folder} has no {NAME}; `swiftsure certify` writes it") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        return _parse(content, path.with_name(SLOPES_NAME))
    except _Fault as fault:
        raise InputError(f"{path} cannot be trusted: {fault}; `swiftsure certify` writes it anew") from None


def policy_sha256(policy: Policy | None) -> str | None:
    """A digest of a policy's rule and thresholds; None for none."""
    return None if policy is None else hashlib.sha256(_line(policy.as_dict())).hexdigest()


def image_sha256(images: ImageSet, index: int) -> str:
    """The first 16 digits of a digest of one image's stored values."""
    values = images.images[index].cpu().contiguous().numpy()
    return hashlib.sha256(values.tobytes()).hexdigest()[:16]


class _Fault(Exception):
    """What is wrong with the file."""


def _line(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, allow_nan=False) + "\n").encode()


def _digest(body: bytes) -> bytes:
    return _line({"sha256": hashlib.sha256(body).hexdigest()})


def _versions() -> dict[str, str]:
    return {
        "swiftsure": metadata.version("swiftsure"),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def _parse(content: bytes, slopes: Path) -> CertificateFile:
    lines = content.splitlines(keepends=True)
    if not lines or f'"{FORMAT}"'.encode() not in lines[0]:
        raise _Fault(f"it was not written by swiftsure (no 'format': {FORMAT!r})")
    body = b"".join(lines[:-1])
    if lines[-1] != _digest(body):
        raise _Fault(
            "its last line is not the digest of what stands before, so it was damaged, cut or edited"
        )
    header = _table(lines[0], _HEADER, "the header")
    if header["format"] != FORMAT or header["format_version"] != FORMAT_VERSION:
        version = f"{header['format']} {header['format_version']}"
        raise _Fault(f"its format is {version}; known: {FORMAT} {FORMAT_VERSION}")
    if header["n"] != len(lines) - 2:
        raise _Fault(f"its header speaks of {header['n']} samples, and {len(lines) - 2} follow")
    if header["method"] not in METHODS or not 0 <= header["delta"] < math.inf:
        raise _Fault(f"its method is {header['method']!r} and its delta {header['delta']}")
    _typed(header["ball"], _BALL, "the ball")
    try:
        ball = Ball(**header["ball"])
    except InputError as error:
        raise _Fault(str(error)) from None
    policy = _policy(header)
    samples = [_table(line, _SAMPLE, f"sample {index}") for index, line in enumerate(lines[1:-1])]
    for index, sample in enumerate(samples):
        _check_sample(index, sample, header)
    exits = 1 if policy is None else policy.exits
    certificate = Certificate(
        certified=torch.tensor([sample["certified"] for sample in samples], dtype=torch.bool),
        margin=torch.tensor([_margin(sample) for sample in samples], dtype=torch.float64),
        required=_required(samples, exits),
        max_exit=torch.tensor([sample["max_exit"] for sample in samples], dtype=torch.int64),
        max_macs=torch.tensor([sample["max_macs"] for sample in samples], dtype=torch.int64),
        method=[sample["method"] for sample in samples],
        label=torch.tensor([sample["label"] for sample in samples], dtype=torch.int64),
        ball=ball,
        policy=policy,
        asked=header["method"],
        delta=header["delta"],
        slopes=_slopes(slopes, header, exits),
    )
    names = ("weights_sha256", "data_sha256", "policy_sha256", "slopes_sha256", "versions")
    images = [sample["image"] for sample in samples]
    return CertificateFile(certificate, image_sha256=images, **{name: header[name] for name in names})


def _slopes(path: Path, header: Mapping[str, Any], exits: int) -> Sequence[SampleSlopes | None]:
    if header["slopes_sha256"] is None:
        return [None] * header["n"]
    try:
        content = path.read_bytes()
    except OSError:
        raise _Fault(f"its slopes, {path.name} beside it, cannot be read") from None
    if hashlib.sha256(content).hexdigest() != header["slopes_sha256"]:
        raise _Fault(f"its slopes, {path.name} beside it, are not those that it was written with")
    try:
        return unpacked(content, header["n"], exits)
    except DamagedSlopes as error:
        raise _Fault(f"its slopes, {path.name} beside it: {error}") from None


def _table(line: bytes, types: Mapping[str, Types], where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
        written_here = _line(value) == line
    except (ValueError, TypeError):
        raise _Fault(f"{where} is not JSON") from None
    # One value has many spellings in JSON (repeated keys, 1e0 for 1.0); the writer knows only one.
    if not written_here:
        raise _Fault(f"{where} is not in the form that swiftsure writes")
    return _typed(value, types, where)


def _typed(value: Any, types: Mapping[str, Types], where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or list(value) != list(types):
        raise _Fault(f"{where} must hold {', '.join(types)}, in this order")
    for key, allowed in types.items():
        # Exact types: True would pass for the integer 1.
        if type(value[key]) not in allowed:
            raise _Fault(f"{key} of {where} is {value[key]!r}")
    return value


def _policy(header: Mapping[str, Any]) -> Policy | None:
    try:
        policy = None if header["policy"] is None else Policy.from_dict(header["policy"])
    except InputError as error:
        raise _Fault(str(error)) from None
    if policy_sha256(policy) != header["policy_sha256"]:
        raise _Fault("its policy does not have the digest that stands beside it")
    return policy


def _required(samples: list[dict[str, Any]], exits: int) -> torch.Tensor:
    required = torch.zeros(len(samples), exits, dtype=torch.bool)
    for index, sample in enumerate(samples):
        named = sample["exits"]
        last = sample["max_exit"]
        if (
            any(type(exit) is not int for exit in named)
            or sorted(set(named)) != named
            or not 0 <= last < exits
        ):
            raise _Fault(f"exits of sample {index} are {named}, the last one {last}")
        if not named or not 0 <= named[0] <= named[-1] <= last:
            raise _Fault(f"exits of sample {index} are {named}, the last one {last}")
        required[index, named] = True
    return required


def _margin(sample: Mapping[str, Any]) -> float:
    """The margin; none is written where it is infinite: nothing was needed for a proof, or nothing is known."""
    if sample["margin"] is None:
        return math.inf if sample["certified"] else -math.inf
    return float(sample["margin"])


def _check_sample(index: int, sample: Mapping[str, Any], header: Mapping[str, Any]) -> None:
    if sample["index"] != index:
        raise _Fault(f"sample {sample['index']} stands where sample {index} should")
    techniques = {name for name in METHODS if name != "auto" and header["method"] in (name, "auto")}
    if sample["method"] not in techniques | {UNPROVEN}:
        raise _Fault(f"sample {index} names the method {sample['method']!r}, the header {header['method']!r}")
    proven = _margin(sample) > header["delta"]
    if sample["certified"] != proven or (sample["method"] != UNPROVEN) != proven:
        raise _Fault(f"certified, margin and method of sample {index} contradict each other")
    for key in ("label", "max_exit", "max_macs"):
        if not 0 <= sample[key] < 1 << 63:
            raise _Fault(f"{key} of sample {index} is {sample[key]}")
