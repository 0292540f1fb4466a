"""results.json: the format, what may be joined, and what contradicts itself."""

from __future__ import annotations

import copy
import json
import math

import jsonschema
import pytest

from swiftsure import results
from swiftsure.ball import Ball
from swiftsure.errors import InputError, SoundnessError

BALL = Ball("8/255").as_dict()
CLEAN = {"n": 200, "accuracy": 0.95}
ATTACKED = {"n": 200, "ball": BALL, "suite": "quick", "accuracy": {"pgd": 0.9, "fgsm": 0.92, "union": 0.89}}
VERIFIED = {"n": 200, "ball": BALL, "accuracy": 0.8, "by": {"interval": 100, "symbolic": 60}}
ALL = {
    "clean": CLEAN,
    "attacked": ATTACKED,
    "verified": VERIFIED,
    "exits": {"clean": [0.25, 0.75]},
    "macs": {"static": 1e6, "clean": 4e5},
    "latency_ms": {"static_b1": 0.2},
    "seconds": {"train": 10},
    "seed": 3,
    "device": "cpu",
    "versions": {"torch": "2.13.0"},
    "weights_sha256": "0f" * 32,
}


@pytest.fixture
def full():
    return results.merge_parts(results.empty_results(), ALL)


def test_empty_results_have_every_field_of_the_design_and_no_figure():
    empty = results.empty_results()
    results.check(empty)
    assert list(empty) == [
        "clean", "attacked", "verified", "exits", "macs", "latency_ms",
        "clean_accuracy", "robust_accuracy", "verified_accuracy",
        "seconds", "seed", "device", "versions", "weights_sha256",
    ]  # fmt: skip
    assert empty["macs"] == dict.fromkeys(
        ("static", "clean", "attacked", "slowdown", "clean_p95", "certified_max", "paper")
    )
    assert empty["exits"] == dict.fromkeys(("clean", "attacked", "slowdown"))
    assert empty["latency_ms"] == dict.fromkeys(("static_b1", "adaptive_b1", "static_b256", "adaptive_b256"))
    assert empty["seconds"] == dict.fromkeys(("train", "attack", "certify"))
    assert empty["versions"] == {}
    assert all(empty[name] is None for name in ("clean", "attacked", "verified", "clean_accuracy", "seed"))
    empty["macs"]["static"] = 1
    assert results.empty_results()["macs"]["static"] is None


def test_merging_fills_the_accuracies_and_leaves_its_input_alone():
    empty = results.empty_results()
    merged = results.merge_part(empty, "clean", CLEAN)
    merged = results.merge_part(merged, "attacked", ATTACKED)
    assert (merged["clean_accuracy"], merged["robust_accuracy"]) == (0.95, ATTACKED["accuracy"])
    assert merged["verified_accuracy"] is None
    assert empty == results.empty_results()
    merged["robust_accuracy"]["pgd"] = 0.0
    assert ATTACKED["accuracy"]["pgd"] == 0.9
    assert results.merge_part(results.merge_part(empty, "clean", CLEAN), "clean", None) == empty


def test_images_of_eight_bits_are_some_of_all(full):
    rounded = {"pgd": 0.91, "fgsm": 0.92, "union": 0.9}
    guards = {
        "n": 200,
        "verdict": "reliable",
        "reason": "",
        "checks": {"eps": {"verdict": "reliable", "reason": "it falls"}},
    }
    joined = results.merge_part(full, "attacked", {**ATTACKED, "accuracy_8bit": rounded, "guards": guards})
    jsonschema.validate(joined, results.schema())
    assert joined["robust_accuracy"] == ATTACKED["accuracy"]
    for wrong, said in (
        ({**rounded, "union": 0.915}, "attacked.accuracy_8bit.union is 0.915; allowed: at most"),
        ({**rounded, "pgd": 0.89, "union": 0.89}, "accuracy_8bit.pgd is 0.89; allowed: at least"),
    ):
        with pytest.raises(InputError, match=said):
            results.merge_part(full, "attacked", {**ATTACKED, "accuracy_8bit": wrong})
    for part, value in (
        ("attacked", {**ATTACKED, "guards": {**guards, "verdict": "fine"}}),
        ("attacked", {**ATTACKED, "guards": {"n": 1}}),
        ("seconds", {"by_attack": {"pgd": -1.0}}),
        ("macs", {"by_attack": {"pgd": None}}),
    ):
        with pytest.raises(InputError):
            results.merge_part(full, part, value)
    timed = results.merge_part(full, "seconds", {"by_attack": {"pgd": 1.5}, "guards": 2.0})
    jsonschema.validate(timed, results.schema())


def test_measures_join_key_by_key(full):
    joined = results.merge_part(full, "seconds", {"attack": 2.5})
    joined = results.merge_part(joined, "macs", {"paper": 0.4})
    assert joined["seconds"] == {"train": 10, "attack": 2.5, "certify": None}
    assert (joined["macs"]["static"], joined["macs"]["paper"]) == (1e6, 0.4)


@pytest.mark.parametrize(
    ("name", "part", "said"),
    [
        ("verified", {**VERIFIED, "n": 100, "by": {}}, "verified on n = 100|n = 100"),
        ("clean", {**CLEAN, "n": 100}, "n = 100"),
        ("attacked", {**ATTACKED, "ball": Ball(0.1).as_dict()}, "eps 0.1"),
        ("attacked", {**ATTACKED, "ball": Ball("8/255", "2").as_dict()}, "L2 ball"),
        ("verified", {**VERIFIED, "ball": Ball("8/255", high=2.0).as_dict()}, r"\[0, 2\]"),
        ("weights_sha256", "ab" * 32, "weights 0f0f0f0f0f0f"),
        ("robust_accuracy", {"union": 0.5}, "no part"),
        ("canaries", {}, "no part"),
        ("macs", {"flops": 3}, "unknown key 'flops'"),
        ("macs", None, "macs is None"),
        ("clean", {"n": 200}, "clean has no 'accuracy'"),
        ("attacked", {**ATTACKED, "accuracy": {"pgd": 0.9}}, "has no 'union'"),
        ("attacked", {**ATTACKED, "accuracy": {"pgd": 0.9, "union": 0.91}}, "union is 0.91"),
        ("verified", {**VERIFIED, "by": {"interval": 201}}, "interval is 201"),
    ],
)
def test_refused_parts(full, name, part, said):
    before = copy.deepcopy(full)
    with pytest.raises(InputError, match=said) as caught:
        results.merge_part(full, name, part)
    assert "\n" not in str(caught.value)
    assert full == before


def test_parts_measured_together_may_move_to_other_samples(full):
    ball = Ball(0.1).as_dict()
    moved = {
        "clean": {**CLEAN, "n": 10},
        "attacked": {**ATTACKED, "n": 10, "ball": ball},
        "verified": {"n": 10, "ball": ball, "accuracy": 0.8, "by": {}},
    }
    assert results.merge_parts(full, moved)["verified"]["n"] == 10
    del moved["verified"]
    with pytest.raises(InputError, match="n = 10"):
        results.merge_parts(full, moved)


def test_a_mixture_is_refused_before_the_work(full):
    ball = Ball("8/255")
    results.require_joinable(full, ["clean", "attacked"], 200, ball)
    results.require_joinable(full, ["clean", "attacked", "verified"], 10, Ball(0.1))
    results.require_joinable(results.empty_results(), ["verified"], 10, ball)
    with pytest.raises(InputError, match="clean and attacked on n = 10 cannot join verified on n = 200"):
        results.require_joinable(full, ["clean", "attacked"], 10, ball)
    with pytest.raises(InputError, match=r"eps 0\.1"):
        results.require_joinable(full, ["verified"], 200, Ball(0.1))


@pytest.mark.parametrize("ceiling", ["clean", "attacked"])
def test_more_verified_than_right_is_a_defect(ceiling):
    parts = {**ALL, "verified": {**VERIFIED, "accuracy": 0.895 if ceiling == "attacked" else 0.955}}
    if ceiling == "clean":
        parts["attacked"] = None
    with pytest.raises(SoundnessError, match="a certificate is wrong"):
        results.merge_parts(results.empty_results(), parts)
    rounded = {**ALL, "verified": {**VERIFIED, "accuracy": 0.89 + 1e-9}}
    results.merge_parts(results.empty_results(), rounded)


def places(value, path=()):
    yield path
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(item, (*path, key))


def changed(value, path, new):
    if not path:
        return new
    value = copy.copy(value)
    value[path[0]] = changed(value[path[0]], path[1:], new)
    return value


def test_check_and_the_schema_agree_on_every_small_damage(full):
    validator = jsonschema.Draft202012Validator(results.schema())
    jsonschema.Draft202012Validator.check_schema(results.schema())
    assert validator.is_valid(full)
    cases = [
        changed(full, path, new)
        for path in places(full)
        for new in (None, -1, 2, 1.5, True, "inf", "f" * 64, [], [3], {}, {"union": 0.5}, {"new": 0.5})
    ]
    verdicts = {True: 0, False: 0}
    for case in cases:
        valid = validator.is_valid(case)
        assert (next(results._faults(case, results.schema(), ""), None) is None) == valid, case
        verdicts[valid] += 1
    assert min(verdicts.values()) > 50


def test_numbers_must_be_numbers(full):
    for value in (math.nan, math.inf, True):
        with pytest.raises(InputError, match=r"macs\.static is"):
            results.check(changed(full, ("macs", "static"), value))


def test_summaries_must_match_their_parts(full):
    with pytest.raises(InputError, match=r"verified_accuracy is 0\.7; allowed: that of verified, 0\.8"):
        results.check({**full, "verified_accuracy": 0.7})
    with pytest.raises(InputError, match=r"clean_accuracy is 0\.5"):
        results.check({**results.empty_results(), "clean_accuracy": 0.5})


def test_the_schema_knows_only_words_that_check_reads():
    known = {
        "$ref", "type", "enum", "minimum", "maximum", "pattern", "minItems", "items", "required",
        "properties", "additionalProperties", "description",
    }  # fmt: skip

    def walk(rule):
        assert set(rule) <= known, set(rule) - known
        assert "$ref" in rule or "description" in rule
        assert "properties" not in rule or rule["additionalProperties"] is False
        for inner in rule.get("properties", {}).values():
            walk(inner)
        for inner in (rule.get("items"), rule.get("additionalProperties")):
            if isinstance(inner, dict):
                walk(inner)

    for rule in [*results.schema()["properties"].values(), *results.schema()["$defs"].values()]:
        walk(rule)


def test_read_takes_what_was_written_and_nothing_else(full, tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(InputError, match=r"has no results\.json"):
        results.read(tmp_path)
    path.write_text(json.dumps(full))
    assert results.read(tmp_path) == full
    for text, said in (("{", "damaged"), ("[]", "the file is"), ('{"clean": NaN}', "results.json: ")):
        path.write_text(text)
        with pytest.raises(InputError, match=said) as caught:
            results.read(tmp_path)
        assert "\n" not in str(caught.value)
