"""results.json: what was measured of a network, joined part by part and never across samples or balls.

``results.schema.json`` beside this file is the one definition of the format. `check` reads the schema itself,
so that no validator need be installed; a test holds the two to the same verdicts.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from swiftsure import files
from swiftsure.ball import Ball
from swiftsure.errors import InputError, SoundnessError

NAME = "results.json"
SAMPLED = ("clean", "attacked", "verified")
"""The parts that were measured on n samples; those of one file share n, and the last two share the ball."""

_SUMMARY = {"clean": "clean_accuracy", "attacked": "robust_accuracy", "verified": "verified_accuracy"}
JOINED_BY_KEY = ("exits", "macs", "latency_ms", "seconds", "versions")
"""The parts of which a measurement may bring some keys only."""


@cache
def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of results.json."""
    loaded: dict[str, Any] = json.loads(
        resources.files("swiftsure").joinpath("results.schema.json").read_text(encoding="utf-8")
    )
    return loaded


def empty_results() -> dict[str, Any]:
    """The results of a network of which nothing was measured: every figure is None."""
    properties = schema()["properties"]
    return {
        name: dict.fromkeys(entry.get("required", [])) if entry.get("type") == "object" else None
        for name, entry in properties.items()
    }


def merge_part(results: Mapping[str, Any], part_name: str, part: Any) -> dict[str, Any]:
    """`results` with one part set; see `merge_parts`."""
    return merge_parts(results, {part_name: part})


def merge_parts(results: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `results` with these parts set, and the three accuracies at the top brought up to date.

    "clean", "attacked" and "verified" replace what stood there; "exits", "macs", "latency_ms", "seconds" and
    "versions" join key by key, so that a part may bring only what it measured. Parts given together are
    joined together: all three sampled parts at once may move to other samples or another ball.

    Raises:
        InputError: an unknown part, a part that does not fit the schema, other weights, or sampled parts
            whose n or ball differ.
        SoundnessError: more samples are verified than survive the attacks.
    """
    _check_format(results)
    merged = copy.deepcopy(dict(results))
    for name, part in parts.items():
        if name not in merged or name in _SUMMARY.values():
            allowed = [known for known in empty_results() if known not in _SUMMARY.values()]
            raise InputError(f"{name!r} is no part of {NAME} that can be set; allowed: {', '.join(allowed)}")
        if name == "weights_sha256" and merged[name] not in (None, part):
            raise InputError(
                f"{NAME} was measured on the weights {_short(merged[name])}, these are {_short(part)}; "
                "begin a new file for other weights"
            )
        if name in JOINED_BY_KEY and isinstance(part, Mapping):
            merged[name] = {**merged[name], **copy.deepcopy(dict(part))}
        else:
            merged[name] = copy.deepcopy(part)
    for name, summary in _SUMMARY.items():
        part = merged[name]
        merged[summary] = copy.deepcopy(part.get("accuracy")) if isinstance(part, Mapping) else None
    check(merged)
    return merged


def require_joinable(
    results: Mapping[str, Any], names: Iterable[str], n: int, ball: Ball | None = None
) -> None:
    """Refuse, before the work is done, parts that `merge_parts` would refuse after it.

    Args:
        results: what is there.
        names: the sampled parts about to be measured; they will be replaced, so they are not compared.
        n: the number of samples.
        ball: the threat model, or None where there is none (clean).

    Raises:
        InputError: a part that stays has another n or ball.
    """
    names = list(names)
    measured = {"n": n, "ball": ball.as_dict() if ball else None}
    for other in SAMPLED:
        if other not in names and results.get(other) is not None:
            _refuse_mixture(" and ".join(names), measured, other, results[other])


def check(results: Any) -> None:
    """Refuse results that do not fit the schema or contradict themselves.

    Raises:
        InputError: one line that names the place, what stands there and what is allowed.
        SoundnessError: more samples are verified than survive the attacks, or than are classified rightly.
    """
    _check_format(results)
    present = {name: results[name] for name in SAMPLED if results[name] is not None}
    names = list(present)
    for first, second in itertools.pairwise(names):
        _refuse_mixture(first, present[first], second, present[second])
    for name, summary in _SUMMARY.items():
        expected = present[name]["accuracy"] if name in present else None
        if results[summary] != expected:
            raise InputError(
                f"{NAME}: {summary} is {results[summary]!r}; allowed: that of {name}, {expected!r}"
            )
    if "attacked" in present:
        _check_union(present["attacked"])
    if "verified" in present:
        _check_verified(present)


def read(folder: str | Path) -> dict[str, Any]:
    """The checked results of a run directory.

    Raises:
        InputError: there is no results.json, it is no JSON, or `check` refuses it.
        SoundnessError: as `check`.
    """
    path = Path(folder) / NAME
    if not path.exists():
        raise InputError(f"{folder} has no {NAME}; `swiftsure evaluate` writes it")
    results: dict[str, Any] = files.read_json(path)
    check(results)
    return results


def _check_format(results: Any) -> None:
    for fault in _faults(results, schema(), ""):
        raise InputError(f"{NAME}: {fault}")


def _check_union(attacked: Mapping[str, Any]) -> None:
    for part in ("accuracy", "accuracy_8bit", "accuracy_last"):
        accuracy = attacked.get(part, {})
        for attack, value in accuracy.items():
            if accuracy["union"] > value + 1e-9:
                raise InputError(
                    f"{NAME}: attacked.{part}.union is {accuracy['union']}; allowed: at most that of any "
                    f"attack, and {attack} left {value}"
                )
    for attack, value in attacked.get("accuracy_8bit", {}).items():
        if value < attacked["accuracy"].get(attack, 0) - 1e-9:
            raise InputError(
                f"{NAME}: attacked.accuracy_8bit.{attack} is {value}; allowed: at least attacked.accuracy, "
                f"{attacked['accuracy'][attack]}, as images of 8 bits are some of all"
            )


def _check_verified(present: Mapping[str, Any]) -> None:
    verified = present["verified"]
    n = verified["n"]
    for method, count in verified["by"].items():
        if count > n:
            raise InputError(f"{NAME}: verified.by.{method} is {count}; allowed: at most n = {n}")
    ceilings = {"clean images": present["clean"]["accuracy"]} if "clean" in present else {}
    ceilings |= present["attacked"]["accuracy"] if "attacked" in present else {}
    for name, accuracy in ceilings.items():
        # Accuracies are counts over n; half a sample keeps rounding from looking like a defect.
        if (verified["accuracy"] - accuracy) * n > 0.5:
            raise SoundnessError(
                f"{verified['accuracy']:.4f} of {n} samples are verified, but only {accuracy:.4f} are right "
                f"under {name}: a certificate is wrong"
            )


def _refuse_mixture(name: str, part: Mapping[str, Any], other: str, standing: Mapping[str, Any]) -> None:
    mend = "measure them together, with `swiftsure evaluate`"
    if part["n"] != standing["n"]:
        raise InputError(
            f"{name} on n = {part['n']} cannot join {other} on n = {standing['n']}; {mend} and one --limit"
        )
    here, there = part.get("ball"), standing.get("ball")
    if here and there and not _same_ball(here, there):
        raise InputError(
            f"{name} in {_ball_text(here)} cannot join {other} in {_ball_text(there)}; {mend} and one --eps"
        )


def _same_ball(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return first["norm"] == second["norm"] and all(
        math.isclose(first[key], second[key], rel_tol=1e-9, abs_tol=1e-12) for key in ("eps", "low", "high")
    )


def _ball_text(ball: Mapping[str, Any]) -> str:
    return (
        f"the L{ball['norm']} ball of eps {ball['eps']:g} with pixels in [{ball['low']:g}, {ball['high']:g}]"
    )


def _short(digest: Any) -> str:
    return f"{str(digest)[:12]}..."


_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "null": (type(None),),
}


def _faults(value: Any, rule: Mapping[str, Any], path: str) -> Iterator[str]:
    """What is wrong with `value`, one line each, under the part of JSON Schema that our schema uses."""
    if "$ref" in rule:
        rule = schema()["$defs"][rule["$ref"].removeprefix("#/$defs/")]
    if not _fits(value, rule):
        yield f"{path or 'the file'} is {reprlib.repr(value)}; allowed: {rule['description']}"
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _faults(item, rule["items"], f"{path}[{index}]")
    elif isinstance(value, dict):
        known, others = rule.get("properties", {}), rule["additionalProperties"]
        for key in rule.get("required", []):
            if key not in value:
                yield f"{path or 'the file'} has no {key!r}; what was not run is null"
        for key, item in value.items():
            if key not in known and others is False:
                allowed = ", ".join(known)
                yield f"{path or 'the file'} has the unknown key {reprlib.repr(key)}; allowed: {allowed}"
            else:
                yield from _faults(item, known.get(key, others), f"{path}.{key}" if path else str(key))


def _fits(value: Any, rule: Mapping[str, Any]) -> bool:
    if "enum" in rule and value not in rule["enum"]:
        return False
    if "type" in rule:
        names = [rule["type"]] if isinstance(rule["type"], str) else rule["type"]
        # Python counts True as an integer, JSON does not.
        if isinstance(value, bool) or not any(isinstance(value, _TYPES[name]) for name in names):
            return False
    if isinstance(value, int | float):
        # Written so that NaN, which compares false, never fits.
        return math.isfinite(value) and rule.get("minimum", -math.inf) <= value <= rule.get(
            "maximum", math.inf
        )
    if isinstance(value, str) and "pattern" in rule:
        return re.search(rule["pattern"], value) is not None
    return not (isinstance(value, list) and len(value) < rule.get("minItems", 0))
