"""Figures as a reader says them, and the verdict in a paragraph. None is always "not run", never 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NOT_RUN = "not run"
_NORMS = {"inf": "L∞", "2": "L2", "1": "L1"}
_SCALES = ((1e9, "billion"), (1e6, "million"), (1e3, "thousand"))


def percent(fraction: float | None) -> str:
    """0.9723 -> "97.2%". Only 1 is "100%" and only 0 is "0%": rounding must not perfect a figure."""
    if fraction is None:
        return NOT_RUN
    if fraction in (0, 1):
        return f"{fraction:.0%}"
    for digits in (1, 2, 3):
        text = f"{100 * fraction:.{digits}f}"
        if 0 < float(text) < 100:
            return f"{text}%"
    return "under 0.001%" if fraction < 0.5 else "over 99.999%"


def scaled(amount: float | None) -> tuple[str, str]:
    """A large amount as number and word: 2380000 -> ("2.38", "million"); the word may be empty."""
    if amount is None:
        return NOT_RUN, ""
    for scale, word in _SCALES:
        # 999,500 already reads "1000 thousand" in three digits, so it takes the larger word.
        if amount >= 0.9995 * scale:
            return _three_digits(amount / scale), word
    return _three_digits(amount), ""


def large(amount: float | None) -> str:
    """`scaled` in one string: "2.38 million"."""
    return " ".join(scaled(amount)).strip()


def milliseconds(value: float | None) -> str:
    """A time given in ms: "0.12 ms", "34.5 ms", with a space that does not break."""
    return NOT_RUN if value is None else f"{_three_digits(value)}\u00a0ms"


def duration(seconds: float | None) -> str:
    """A wall time: "8.4 s", "3 min 20 s", "2 h 5 min"."""
    if seconds is None:
        return NOT_RUN
    if seconds < 60:
        return f"{_three_digits(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def number(value: float | None) -> str:
    """Any other figure in four significant digits."""
    return NOT_RUN if value is None else f"{value:.4g}"


def radius(eps: float) -> str:
    """eps as it is written in papers: "0.1", but "8/255" where the decimal would be long."""
    if len(f"{eps:.10g}") <= 5:
        return f"{eps:.10g}"
    return f"{eps * 255:.4g}/255"


def ball_name(ball: Mapping[str, Any] | None) -> str:
    """The threat model in short: "eps 8/255 (L∞)"."""
    return NOT_RUN if ball is None else f"eps {radius(ball['eps'])} ({_NORMS[ball['norm']]})"


def of_n(fraction: float | None, n: int | None) -> str:
    """A fraction as a count: "350 of 360"."""
    return NOT_RUN if fraction is None or n is None else f"{round(fraction * n):,} of {n:,}"


def headline(results: Mapping[str, Any]) -> dict[str, Any]:
    """The figures that lead the page, each None where it was not run.

    Returns:
        clean, attacked (the union over attacks), proven: fractions; n; ball; macs and ms: of the deployed
        network a sample, which is the adaptive one where its figures exist.
    """
    parts = [results[name] for name in ("attacked", "verified", "clean") if results[name]]
    robust, macs, latency = results["robust_accuracy"], results["macs"], results["latency_ms"]
    return {
        "clean": results["clean_accuracy"],
        "attacked": robust["union"] if robust else None,
        "proven": results["verified_accuracy"],
        "n": parts[0]["n"] if parts else None,
        "ball": next((part["ball"] for part in parts if "ball" in part), None),
        "macs": macs["static"] if macs["clean"] is None else macs["clean"],
        "most": None if macs["clean"] is None else macs["certified_max"],
        "ms": latency["static_b1"] if latency["adaptive_b1"] is None else latency["adaptive_b1"],
    }


def verdict(results: Mapping[str, Any], data: str | None) -> str:
    """What was found, in plain words; `data` names the set, where it is known."""
    head = headline(results)
    if head["n"] is None:
        return "Nothing has been measured on the test set yet."
    where = f" of {data}" if data else ""
    attacks = [name for name in results["robust_accuracy"] or {} if name != "union"]
    tried = f" ({', '.join(attacks)})" if 0 < len(attacks) <= 4 else ""
    claims = [
        "clean accuracy was not run" if head["clean"] is None else f"{percent(head['clean'])} right",
        "attacks were not run"
        if head["attacked"] is None
        else f"{percent(head['attacked'])} still right under every attack tried{tried}",
        "nothing was certified, as that was not run"
        if head["proven"] is None
        else f"{percent(head['proven'])} proven right for every image within {ball_name(head['ball'])}",
    ]
    images = "image" if head["n"] == 1 else "images"
    return " ".join(filter(None, [
        f"On {head['n']:,} test {images}{where}: {', '.join(claims)}.", _gap(head), _cost(head),
    ]))  # fmt: skip


def introduction(runs: Sequence[tuple[str | None, Mapping[str, Any]]]) -> str:
    """What a comparison rests on: for each run its data set's name and its `headline`."""
    if len({(data, head["n"], ball_name(head["ball"])) for data, head in runs}) > 1:
        return (
            "Mind the columns: these runs differ in their data, their samples or their ball, "
            "and figures of different tests cannot be set against each other."
        )
    data, head = runs[0]
    if head["n"] is None:
        return "Nothing has been measured on the test sets yet."
    where = f" of {data}" if data else ""
    ball = f", within {ball_name(head['ball'])}" if head["ball"] else ""
    return f"All were measured on the same {head['n']:,} test images{where}{ball}."


def _gap(head: Mapping[str, Any]) -> str:
    if head["attacked"] is None or head["proven"] is None:
        return ""
    unknown = round((head["attacked"] - head["proven"]) * head["n"])
    if unknown <= 0:
        return "No image is left in doubt: each is either proven or broken."
    what = "1 image remains" if unknown == 1 else f"{unknown:,}\u00a0images remain"
    return f"{what} in doubt: no attack broke {'it' if unknown == 1 else 'them'}, and no proof was found."


def _cost(head: Mapping[str, Any]) -> str:
    costs = []
    if head["macs"] is not None:
        costs.append(f"{large(head['macs'])} multiply-adds")
    if head["ms"] is not None:
        costs.append(milliseconds(head["ms"]))
    if head["most"] is not None and costs:
        mean = f"An image costs {' and '.join(costs)} on average"
        return (
            f"{mean}; within the ball no attack can raise that above {large(head['most'])}, which is proven."
        )
    return f"Each image costs {' and '.join(costs)}." if costs else ""


def _three_digits(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    if value >= 1:
        return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
    return f"{value:.2g}"
