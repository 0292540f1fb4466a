"""Run directories with made-up figures, and the pages drawn of them."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from swiftsure import report
from swiftsure.ball import Ball
from swiftsure.results import empty_results, merge_parts

N = 40
BALL = Ball("0.1").as_dict()
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


def full_results(**parts):
    return merge_parts(
        empty_results(),
        {
            "clean": {"n": N, "accuracy": 38 / N},
            "attacked": {
                "n": N,
                "ball": BALL,
                "suite": "quick",
                "accuracy": {"fgsm": 37 / N, "pgd": 35 / N, "union": 35 / N},
            },
            "verified": {"n": N, "ball": BALL, "accuracy": 32 / N, "by": {"interval": 20, "symbolic": 12}},
            "macs": {"static": 10432.0},
            "latency_ms": {"static_b1": 0.1234, "static_b256": 0.0042},
            "seconds": {"train": 75.2, "attack": 3.0, "certify": 1.5},
            "seed": 0,
            "device": "cpu",
            "versions": {"swiftsure": "0.1.0", "torch": "2.13.0"},
            "weights_sha256": "ab" * 32,
            **parts,
        },
    )


def write_log(folder: Path, epochs: int = 12) -> None:
    lines = [
        {
            "epoch": epoch,
            "eps": 0.1 * min(1, epoch / 5),
            "weight": 0.1 * 1.5 ** (epoch // 2),
            "rate": 1e-3,
            "loss": 2.3 / epoch,
            "clean_accuracy": 0.97 - 0.6 / epoch,
            "robust_accuracy": None if epoch % 2 else 0.94 - 0.7 / epoch,
            "verified_accuracy": 0.9 - 0.88 / epoch,
            "seconds": 1.5,
            "chosen": epoch in (3, epochs - 2),
        }
        for epoch in range(1, epochs + 1)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_samples(folder: Path) -> None:
    """40 samples of 10 classes: 2 wrong, 3 more broken, 3 more unproven, 32 proven."""
    names = [
        "index",
        "label",
        "prediction",
        "correct",
        "attack:pgd",
        "attack:union",
        "verified:symbolic",
        "certified",
        "margin",
    ]
    with (folder / "samples.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow([*names, "max_exit", "max_macs"])
        for index in range(N):
            right, held, proven = index >= 2, index >= 5, index >= 8
            margin = (index - 7.5) / 4
            rows.writerow(
                [
                    index,
                    index % 10,
                    index % 10 if right else 9,
                    int(right),
                    int(not held),
                    int(not held),
                    int(proven),
                    int(proven),
                    margin,
                    0,
                    10432,
                ]
            )


def write_examples(folder: Path, *, shape=(1, 8, 8), count: int = 12, seed: int = 0) -> None:
    draw = np.random.default_rng(seed)
    x = draw.integers(0, 256, (count, *shape), dtype=np.uint8)
    kind = np.arange(count) % 4
    label = np.arange(count) % 10
    np.savez(
        folder / "examples.npz",
        x=x,
        x_adv=np.clip(x / 255 + draw.uniform(-0.1, 0.1, x.shape), 0, 1).astype(np.float32),
        label=label,
        clean_prediction=np.where(kind == 3, (label + 1) % 10, label),
        adversarial_prediction=np.where(kind >= 2, (label + 1) % 10, label),
        attack_broke=kind >= 2,
        certified=kind == 0,
        margin=np.where(kind == 0, 2.5, -0.75).astype(np.float32),
        index=np.arange(count) * 3,
    )


def write_run(
    folder: Path, name: str = "digits_demo", results=None, classes: list[str] | None = None
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(full_results() if results is None else results))
    (folder / "recipe.yaml").write_text(
        f"name: {json.dumps(name)}\nseed: 0\ndata: {{name: digits}}\nmodel: {{name: digits_small}}\n"
    )
    (folder / "config.json").write_text(json.dumps({"classes_names": classes} if classes else {}))
    write_log(folder)
    write_samples(folder)
    write_examples(folder)
    return folder


class Reader(HTMLParser):
    """Collects the text by element and every address, and holds the page to its own nesting."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.addresses += [
            value for name, value in attrs if name in ("src", "href", "data", "action", "srcset")
        ]
        assert not any(name.startswith("on") for name in names)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, tag
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def drawn(folders, out: Path) -> tuple[str, Reader]:
    assert report.page(folders, out) == out
    html = out.read_text(encoding="utf-8")
    return html, Reader(html)
