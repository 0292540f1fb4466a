"""What each command does: call the library, print what it found. Options are those of `swiftsure.cli`."""

from __future__ import annotations

import json
import shlex
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from swiftsure import adapters, calibration, certificates, data, evaluation, prediction, recipe_file, run
from swiftsure import demo as demonstration
from swiftsure import report as pages
from swiftsure.bounds import memory
from swiftsure.errors import InputError
from swiftsure.evaluation import Measured


def train(options: Namespace) -> None:
    """swiftsure train."""
    recipe = recipe_file.read(options.recipe, options.set)
    folder = Path(options.out or Path("runs") / recipe.name)
    try:
        done = run.train(
            recipe,
            folder,
            resume=options.resume,
            device=options.device,
            data_root=options.data,
            model=options.model,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_resume(folder, options)) from None
    print_trained(done)


def evaluate(options: Namespace) -> None:
    """swiftsure evaluate."""
    with _memory(options):
        measured = evaluation.evaluate_run(
            options.run, method=options.method, **_attacks(options), **_choice(options)
        )
    print_measured(measured)


def attack(options: Namespace) -> None:
    """swiftsure attack."""
    print_measured(evaluation.attack_run(options.run, **_attacks(options), **_choice(options)), "attacked")


def certify(options: Namespace) -> None:
    """swiftsure certify."""
    with _memory(options):
        measured = evaluation.certify_run(options.run, method=options.method, **_choice(options))
    print_measured(measured, "verified")


def measure(options: Namespace) -> None:
    """swiftsure measure."""
    print_measured(evaluation.measure_run(options.run, **_choice(options)), "cost")


def calibrate(options: Namespace) -> None:
    """swiftsure calibrate."""
    found = calibration.calibrate_run(
        options.run,
        macs=options.macs,
        certified_macs=options.certified_macs,
        forced_macs=options.forced_macs,
        attacked=options.attacked,
        thresholds=options.thresholds,
        policy=options.policy,
        device=options.device,
        data_root=options.data,
        model=options.model,
    )
    shares = ", ".join(_percent(share).strip() for share in found.shares)
    print(
        f"{found.policy.rule} thresholds {', '.join(f'{value:.6g}' for value in found.policy.thresholds)}: of "
        f"{found.n:,} held-out images {_percent(found.accuracy).strip()} are right; {shares} leave at each exit, for "
        f"{found.macs:,.0f} multiply-adds on average (all exits: {found.static:,})"
    )
    if found.forced is not None:
        forced = found.forced
        print(
            f"on {forced.n:,} of them attacks on the cost force {forced.macs:,.0f} multiply-adds on average"
        )
    if found.forgot:
        print(
            f"what was measured with other thresholds is gone from {options.run}; `swiftsure evaluate {options.run}` "
            "measures it again"
        )


def predict(options: Namespace) -> None:
    """swiftsure predict."""
    answers = prediction.predict(
        options.run,
        options.images,
        eps=options.eps,
        method=options.method,
        device=options.device,
        model=options.model,
    )
    for one in answers:
        proven = ""
        if one.certified is not None:
            proven = f"  {'proven' if one.certified else 'not proven'} within eps {options.eps}"
        print(
            f"{one.path}  {one.name}  {_percent(one.probability).strip()}  exit {one.exit + 1} of {one.exits}"
            f"  {one.macs:,} multiply-adds{proven}"
        )


def recheck(options: Namespace) -> None:
    """swiftsure recheck."""
    stated = certificates.read(options.run)
    subject = evaluation.open_subject(
        options.run,
        limit=len(stated.certificate),
        device=options.device,
        model=options.model,
        data_root=options.data,
    )
    labels = subject.images.labels.to(stated.certificate.label.device)
    if not bool((stated.certificate.label == labels).all()):
        raise InputError(f"{options.run} holds certificates for other labels than the test set's")
    with _memory(options):
        found = certificates.recheck(subject.net, subject.folder, subject.images, limit=options.limit)
    verified = subject.results["verified"]
    if verified and verified["n"] == found.n == subject.n and verified["ball"] == subject.ball.as_dict():
        count = round(verified["accuracy"] * found.n)
        if count != found.certified:
            raise InputError(
                f"results.json states {count} verified samples, the certificates {found.certified}"
            )
    print(
        f"{found.certified} of {found.n} samples are certified, and proven again; margins differ by at most "
        f"{found.largest_difference:.2g} ({found.seconds:.1f} s)"
    )
    if found.reason is None:
        print(f"computed by the plain reference in float64: {found.by_reference} samples")
    else:
        print(
            f"computed by the bounds of certify in float64: {found.n} samples; the plain reference does not read this "
            f"network: {found.reason}"
        )


def report(options: Namespace) -> None:
    """swiftsure report."""
    print(pages.page(options.runs, options.out))


def record(options: Namespace) -> None:
    """swiftsure record."""
    about = {}
    for text in options.about:
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--about is {text!r}; allowed: KEY=VALUE, such as venue='ICLR 2020'")
        about[key] = {"true": True, "false": False}.get(value, value)
    entry = adapters.record(options.run, **about)
    if options.row:
        columns = adapters.COLUMNS
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n{adapters.as_row(entry)}")
    else:
        print(json.dumps(entry, indent=2))


def demo(options: Namespace) -> None:
    """swiftsure demo."""
    done, measured = demonstration.demo(options.out)
    print_trained(done)
    print_measured(measured)


def data_list(options: Namespace) -> None:
    """swiftsure data list."""
    there = data.found(options.data)
    for name in data.names():
        print(f"{name:<14} {there.get(name, 'not found; `swiftsure data path ' + name + '` says why')}")


def data_path(options: Namespace) -> None:
    """swiftsure data path."""
    print(data.path(options.name, options.data))


def data_fetch(options: Namespace) -> None:
    """swiftsure data fetch."""
    print(data.fetch(options.name, options.data))


def print_trained(done: run.Trained) -> None:
    """The end of a training: which epoch was kept, and where it lies."""
    if done.finished_before:
        print(f"{done.folder} is finished: there is nothing to resume")
        return
    kept = done.history.records[done.history.best]
    print(
        f"trained {len(done.history.records)} epochs in {done.history.seconds:.1f} s, kept epoch {kept['epoch']}: "
        f"{done.folder}"
    )


def print_measured(measured: Measured, only: str | None = None) -> None:
    """What was measured, a line a figure; all of it, or one of "attacked", "verified" and "cost"."""
    found = measured.results
    clean, attacked, verified = found["clean"], found["attacked"], found["verified"]
    lines = []
    if only != "cost" and clean:
        ball = (attacked or verified)["ball"]
        lines.append(
            f"{clean['n']:,} test images of {measured.data}, eps {ball['eps']:.6g} in L{ball['norm']}"
        )
        lines.append(f"clean     {_percent(clean['accuracy'])}")
    if only in (None, "attacked") and attacked:
        lines += _attacked(found)
    if only in (None, "verified") and verified:
        by = ", ".join(f"{count:,} by {name}" for name, count in verified["by"].items())
        lines.append(
            f"verified  {_percent(verified['accuracy'])}  {by}  ({found['seconds']['certify']:.1f} s)"
        )
    if only in (None, "attacked"):
        lines += [f"skipped   {name}: {reason}" for name, reason in measured.skipped.items()]
    if only != "cost" and found["exits"]["clean"]:
        lines += _usage(found)
    if only in (None, "cost"):
        macs, latency = found["macs"]["static"], found["latency_ms"]
        lines.append(
            f"cost      {macs:,} multiply-adds, {measured.parameters:,} parameters, "
            f"{latency['static_b1']:.3g} ms an image alone, {latency['static_b256']:.3g} ms in batches of 256"
        )
    if measured.page is not None:
        lines.append(f"page      {measured.page}")
    print("\n".join(lines))


def _attacked(found: dict[str, Any]) -> list[str]:
    """The union, what the guards say of it, and a line for each attack."""
    attacked, seconds, macs = found["attacked"], found["seconds"].get("by_attack", {}), found["macs"]
    forced, rounded = macs.get("by_attack", {}), attacked.get("accuracy_8bit")
    guards = attacked.get(
        "guards", {"verdict": "not evaluated", "reason": "measured before there were guards"}
    )
    lines = [
        f"attacked  {_percent(attacked['accuracy']['union'])}  suite {attacked['suite']}: right under every attack"
        f"  ({found['seconds']['attack']:.1f} s)",
        f"          {guards['verdict']}: {guards['reason']}",
    ]
    table = [["attack", "right", "8-bit", "seconds", "multiply-adds"]]
    for name, value in attacked["accuracy"].items():
        table.append(
            [
                "all together" if name == "union" else name,
                _percent(value).strip(),
                _percent(rounded[name]).strip() if rounded else "",
                f"{seconds[name]:.1f}" if name in seconds else "",
                f"{forced[name]:,.0f}" if name in forced else "",
            ]
        )
    if last := attacked.get("accuracy_last"):
        lines.insert(
            2, f"          the last exit alone on the same images: {_percent(last['union']).strip()}"
        )
    slow = [name for name in forced if name not in attacked["accuracy"]]
    table += [[name, "", "", f"{seconds[name]:.1f}", f"{forced[name]:,.0f}"] for name in slow]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for name, *cells in table:
        row = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append(f"          {name.ljust(widths[0])}  {row}".rstrip())
    return lines


def _usage(found: dict[str, Any]) -> list[str]:
    """How images use the exits: a line for clean ones, and one each for those made to be wrong and to be slow."""
    lines = []
    for name, what in (("clean", "clean"), ("attacked", "attacked"), ("slowdown", "slowed")):
        if found["exits"][name]:
            shares = ", ".join(_percent(share).strip() for share in found["exits"][name])
            cost = f"{found['macs'][name]:,.0f} multiply-adds on average"
            lines.append(f"exits     {what} images leave at {shares}: {cost}")
    if guard := found["macs"].get("slowdown_guard"):
        lines.append(f"          {guard['verdict']}: {guard['reason']}")
    if found["exits"].get("certified"):
        shares = ", ".join(_percent(share).strip() for share in found["exits"]["certified"])
        most = f"{found['macs']['certified_max']:,.0f} multiply-adds at most, on average"
        lines.append(f"exits     proven: at the latest at {shares}: {most}")
    return lines


def _percent(share: float) -> str:
    return f"{100 * share:6.2f}%"


def _memory(options: Namespace) -> AbstractContextManager[None]:
    """The limit of memory for bounds that was asked for, if any."""
    return memory.limited(None if options.memory is None else memory.parse(options.memory))


def _attacks(options: Namespace) -> dict[str, Any]:
    """The options of attacks."""
    return {"suite": options.suite, "transfer": options.transfer, "guards": options.guards}


def _choice(options: Namespace) -> dict[str, Any]:
    """The options that every measurement takes."""
    return {
        "limit": options.limit,
        "eps": options.eps,
        "device": options.device,
        "model": options.model,
        "data_root": options.data,
    }


def _how_to_resume(folder: Path, options: Namespace) -> str:
    if not (folder / run.RECIPE).exists():
        return "nothing was written yet; run the same command again"
    words = ["swiftsure", "train", str(folder / run.RECIPE), "--out", str(folder), "--resume"]
    for name in ("device", "data", "model"):
        value = getattr(options, name)
        if value not in (None, "auto"):
            words += [f"--{name}", str(value)]
    return f"go on with `{shlex.join(words)}`"
