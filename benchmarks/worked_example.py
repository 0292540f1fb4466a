"""The picture of docs/certified-exits.md: one digit, and the walk of its certificate over three exits.

    python benchmarks/worked_example.py [--thresholds 0.2 0.8] [--svg docs/walk.svg]

The network is that of `exit_certificates.py cost`, trained for some seconds from seed 0. Of the test images the first
is taken at which exit 1 may leave, cannot be shown by margins alone to say the right thing, is by the second look, and
exit 2 always leaves. Prints what the picture shows.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import swiftsure as ss
from exit_certificates import EPS, trained
from swiftsure.ball import Ball
from swiftsure.bounds import Region, crown, difference_bounds, trace
from swiftsure.bounds.entropy import entropy, highest_entropy, lowest_entropy
from swiftsure.certificates import FLOOR
from swiftsure.certificates._walk import rival_boxes
from swiftsure.exits import MultiExit, Policy

STYLE = """
  .ink { fill: #1f2426 } .soft { fill: #5d6668 } .rule { stroke: #e2dfd6 } .line { stroke: #1f2426 }
  .range { fill: #7fb7b8 } .proven { fill: #0d6b73 } .limit { stroke: #b5611f } .other { fill: #b5611f }
  text { font: 13px ui-sans-serif, system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif }
  .small { font-size: 11px }
  @media (prefers-color-scheme: dark) {
    .ink { fill: #e7e8e4 } .soft { fill: #a3adae } .rule { stroke: #2d3538 } .line { stroke: #e7e8e4 }
    .range { fill: #33777a } .proven { fill: #4fb9bc } .limit { stroke: #e0965a } .other { fill: #e0965a }
  }
"""


@dataclass(frozen=True)
class Exit:
    """What bounds say of one exit over the ball around one image.

    Attributes:
        own, lowest, highest: entropies: of the image, and over the ball; nats.
        margin: (classes,) lower bounds of z_y - z_j.
        rivals: the lowest entropy at which each class that margins do not exclude could be the answer.
    """

    own: float
    lowest: float
    highest: float
    margin: list[float]
    rivals: dict[int, float]


def exits_of(net: MultiExit, x: Tensor, y: Tensor, ball: Ball) -> list[list[Exit]]:
    """For each image what CROWN's bounds say of each exit."""
    with torch.no_grad():
        found = difference_bounds(crown, trace(net, x), Region(x, ball), y)
        own = torch.nn.functional.one_hot(y, 10).bool()
        columns = []
        for (lower, upper), z in zip(found, net(x), strict=True):
            low, high = ((side + sign * FLOOR).double() for side, sign in ((-upper, -1), (-lower, 1)))
            low, high = low.masked_fill(own, 0.0), high.masked_fill(own, 0.0)
            own_score, least, most = (
                score.tolist()
                for score in (entropy(z), lowest_entropy(low, high), highest_entropy(low, high))
            )
            column = [Exit(*of, {}) for of in zip(own_score, least, most, lower.tolist(), strict=True)]
            sample, rival = ((high >= 0) & ~own).nonzero(as_tuple=True)
            narrow_low, narrow_high, empty = rival_boxes(low[sample], high[sample], rival)
            for i, j, box_low, box_high, none in zip(
                sample.tolist(), rival.tolist(), narrow_low, narrow_high, empty, strict=True
            ):
                column[i].rivals[j] = (
                    math.inf if none else float(lowest_entropy(box_low[None], box_high[None]))
                )
            columns.append(column)
    return [list(row) for row in zip(*columns, strict=True)]


def teaches(exits: list[Exit], policy: Policy) -> bool:
    """Whether the second look is needed and enough at exit 1, and exit 2 ends the walk."""
    (first, second, _), (one, two) = exits, policy.thresholds
    may = first.lowest < one <= first.highest and first.own >= one
    looks = bool(first.rivals) and all(least >= one for least in first.rivals.values())
    return may and looks and second.highest < two and not second.rivals


def svg(image: Tensor, label: int, exits: list[Exit], policy: Policy, macs: list[int]) -> str:
    """The picture: the image; entropy ranges against thresholds; margins at exit 1."""
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 820 300" width="820" height="300" role="img">',
        f"<title>The walk over three exits of one image of a {label}</title><style>{STYLE}</style>",
    ]

    def text(x: float, y: float, words: str, kind: str = "ink", anchor: str = "start") -> None:
        parts.append(f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>')

    def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        parts.append(f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')

    side = 120 / image.shape[-1]
    for i, row in enumerate(image[0].tolist()):
        for k, pixel in enumerate(row):
            grey = round(255 * (1 - pixel))
            place = f'x="{10 + side * k:.1f}" y="{60 + side * i:.1f}" width="{side:.1f}" height="{side:.1f}"'
            parts.append(f'<rect {place} fill="rgb({grey},{grey},{grey})"/>')
    text(10, 30, f"A {label}, eps {EPS:g}")
    text(160, 30, "Entropy of each exit over the ball, nats")
    most = math.log(10)

    def at(value: float) -> float:
        return 210 + 260 * min(value, most) / most

    for tick in (0.0, 0.5, 1.0, 1.5, 2.0):
        line(at(tick), 50, at(tick), 250, "rule")
        text(at(tick), 268, f"{tick:g}", "soft small", "middle")
    ended = False
    for number, one in enumerate(exits):
        y = 80 + 65 * number
        text(160, y + 5, f"exit {number + 1}")
        limit = policy.thresholds[number] if number < len(policy.thresholds) else None
        if ended:
            text(215, y + 5, "not reached", "soft")
            continue
        width = max(2.0, at(one.highest) - at(one.lowest))
        parts.append(
            f'<rect class="range" x="{at(one.lowest):.1f}" y="{y - 7}" width="{width:.1f}" height="14" rx="3"/>'
        )
        parts.append(f'<circle class="ink" cx="{at(one.own):.1f}" cy="{y}" r="4"/>')
        verdict = "leaves here"
        if limit is not None:
            line(at(limit), y - 16, at(limit), y + 16, "limit")
            text(at(limit) + 4, y - 10, f"{limit:g}", "other small")
            ended = one.highest < limit
            verdict = "always leaves" if ended else "may leave" if one.lowest < limit else "never leaves"
        text(215, y + 27, f"{verdict}; {macs[number]:,} multiply-adds", "soft small")
    text(500, 30, "Least margin of each class at exit 1")
    first = exits[0]
    span = max(abs(value) for j, value in enumerate(first.margin) if j != label)

    def across(value: float) -> float:
        return 590 + 200 * value / span

    line(across(0), 45, across(0), 252, "line")
    for order, j in enumerate(j for j in range(10) if j != label):
        height, value = 58.0 + 23 * order, first.margin[j]
        text(500, height + 4, str(j), "soft")
        kind = "other" if j in first.rivals else "proven"
        left, width = min(across(0), across(value)), abs(across(value) - across(0))
        parts.append(
            f'<rect class="{kind}" x="{left:.1f}" y="{height - 5}" width="{width:.1f}" height="10"/>'
        )
        if j in first.rivals:
            least = first.rivals[j]
            words = (
                "never the answer" if least == math.inf else f"the answer only at entropies above {least:.2f}"
            )
            text(across(0) + 8, height + 4, words, "small soft")
    text(across(0), 268, "0", "soft small", "middle")
    return "\n".join([*parts, "</svg>"]) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--thresholds", nargs=2, type=float, default=[0.2, 0.8])
    parser.add_argument("--svg", type=Path, help="where to write the picture")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    policy, ball = Policy("entropy", options.thresholds), Ball(EPS)
    net, test = trained(), ss.data.load("digits").test
    x, y = test.batch(torch.arange(len(test)))
    found = exits_of(net, x, y, ball)
    chosen = [i for i, exits in enumerate(found) if teaches(exits, policy)]
    print(
        f"{len(chosen)} of {len(test)} test images need the second look at exit 1 and always leave by exit 2"
    )
    if not chosen:
        print("none to show; allowed: thresholds at which there is one", file=sys.stderr)
        return 2
    index = chosen[0]
    image, label = x[index : index + 1], y[index : index + 1]
    macs = net.macs(x.shape[1:])
    print(f"test image {index}, a {int(label)}; cumulative multiply-adds {macs}")
    for number, exit in enumerate(found[index]):
        worst = min(value for j, value in enumerate(exit.margin) if j != int(label))
        rivals = ", ".join(f"{j}: {least:.3f}" for j, least in exit.rivals.items()) or "none"
        print(
            f"exit {number + 1}: entropy {exit.own:.3f} in [{exit.lowest:.3f}, {exit.highest:.3f}], "
            f"least margin {worst:.3f}, rivals at entropies of at least: {rivals}"
        )
    proof = ss.certify(net, image, label, ball, policy, "crown", delta=FLOOR)
    print(
        f"certified: {bool(proof.certified[0])}, last exit {int(proof.max_exit[0]) + 1}, {int(proof.max_macs[0]):,}"
    )
    if options.svg is not None:
        options.svg.write_text(svg(x[index], int(label), found[index], policy, macs), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
