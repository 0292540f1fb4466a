"""Bounds of one image's logit differences, computed plainly: float64, one sample, matrices of `_plain_network`.

The mathematics is that of the papers (Gowal et al. 2018; Wang et al. 2018, MixTrain; Zhang et al. 2018, CROWN; Xu et
al. 2021, alpha-CROWN), the code shares nothing with `swiftsure.bounds`. A linear function a z + c of a ReLU's output
z = relu(w), l <= w <= u, is bounded below by one of its input: where a > 0, z >= s w for any s in [0, 1]; where a < 0,
z <= u (w - l) / (u - l), the chord. So functions go back through the network to the image, over which the least value
of a linear function is known.

| technique | s | l, u of hidden units |
|---|---|---|
| interval | no functions go back: boxes go forward | |
| symbolic | the chord's slope | the tighter of its own and intervals |
| crown-ibp | 1 where u > -l, else 0 | intervals |
| crown | the same | the tighter of its own and intervals |
| alpha-crown | given, for each function | crown's |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from scipy import sparse

from swiftsure.ball import Ball
from swiftsure.certificates._plain_network import Array, PlainNetwork

Box = tuple[Array, Array]
"""Lower and upper ends of z_j - z_y, (classes,) each."""
Columns: TypeAlias = Array | sparse.csr_array
"""Linear functions of a node, one a column: (units, functions)."""
Slopes = Mapping[tuple[int, int, bool], tuple[Array, Array]]
"""By (exit, class j, whether from above): the lower slopes for the bound of z_y - z_j, as (ReLU units, slopes).

ReLU units are counted through all ReLUs that an exit depends on, in the order of execution. Those not named take
CROWN's.
"""

MOST_COEFFICIENTS = 1 << 24
"""Of all functions that go back at once."""
DENSE = 0.05
"""From this share of coefficients that are not 0 on, columns are kept whole."""

Kind = Literal["chord", "adaptive"]
_KINDS: dict[str, tuple[Kind, bool]] = {
    "symbolic": ("chord", True),
    "crown-ibp": ("adaptive", False),
    "crown": ("adaptive", True),
    "alpha-crown": ("adaptive", True),
}
"""Which slope a line below has, and whether hidden units are bounded by functions too."""


@dataclass(frozen=True)
class _Lines:
    """Lines around one ReLU's units: low * w <= relu(w) <= up * w + shift, (units,) each; or low (units, functions)."""

    low: Array
    up: Array
    shift: Array


class PlainBounds:
    """Bounds over the ball around one image.

    Args:
        network: as `read_plainly` gives it.
        image: (units,), flat, in float64.
        ball: the threat model.
    """

    def __init__(self, network: PlainNetwork, image: Array, ball: Ball) -> None:
        self._network, self._image, self._ball = network, image, ball
        self._lower = np.clip(image - ball.radius, ball.low, ball.high)
        self._upper = np.clip(image + ball.radius, ball.low, ball.high)
        self._boxes = self._intervals()
        self._hidden: dict[tuple[Kind, bool], dict[int, tuple[Array, Array]]] = {}

    def differences(self, technique: str, y: int, slopes: Slopes | None = None) -> list[Box]:
        """Bounds of z_j - z_y at every exit.

        Args:
            technique: a name of the table above.
            y: the class that is subtracted.
            slopes: for alpha-crown.
        """
        found = []
        for exit, output in enumerate(self._network.outputs):
            classes = self._network.nodes[output].size
            others = np.delete(np.arange(classes), y)
            functions = np.zeros((classes, classes - 1))
            functions[others, np.arange(classes - 1)] = -1.0
            functions[y] = 1.0
            low, high = np.zeros(classes), np.zeros(classes)
            # What bounds z_y - z_j from below bounds z_j - z_y from above.
            for end, sign in ((high, -1.0), (low, 1.0)):
                if technique == "interval":
                    least = self._least_by_intervals(output, -sign * functions)
                else:
                    least = self._least(technique, output, -sign * functions)
                if technique == "alpha-crown" and slopes:
                    given = [slopes.get((exit, int(j), sign > 0)) for j in others]
                    chosen = np.array([i for i, known in enumerate(given) if known is not None], dtype=int)
                    if len(chosen):
                        lines = self._with_slopes([known for known in given if known is not None])
                        climbed = self._substituted(output, -sign * functions[:, chosen], lines)
                        least[chosen] = np.maximum(least[chosen], climbed)
                end[others] = sign * least
            found.append((low, high))
        return found

    # Intervals

    def _intervals(self) -> list[tuple[Array, Array]]:
        """Lower and upper ends of every node, as boxes go through the network call by call."""
        boxes: list[tuple[Array, Array]] = []
        for node in self._network.nodes:
            if not node.inputs:
                boxes.append((self._lower, self._upper))
            elif node.relu:
                lower, upper = boxes[node.inputs[0]]
                boxes.append((np.maximum(lower, 0.0), np.maximum(upper, 0.0)))
            else:
                center, radius = node.constant, np.zeros(node.size)
                for matrix, source in zip(node.matrices, node.inputs, strict=True):
                    lower, upper = boxes[source]
                    center = center + matrix @ ((upper + lower) / 2)
                    radius = radius + abs(matrix) @ ((upper - lower) / 2)
                boxes.append((center - radius, center + radius))
        return boxes

    def _least_by_intervals(self, output: int, functions: Array) -> Array:
        """The least that functions (classes, functions) of an exit can be, by intervals: (functions,)."""
        node = self._network.nodes[output]
        start = np.zeros(functions.shape[1])
        if node.linear:
            # The true class is subtracted before the last layer is bounded.
            start, functions = functions.T @ node.constant, _back(node.matrices[0], functions)
            output = node.inputs[0]
        return start + _least_over_box(functions, *self._boxes[output])

    # Substitution

    def _least(self, technique: str, output: int, functions: Array) -> Array:
        kind, refined = _KINDS[technique]
        known = self._hidden_bounds(kind, refined)
        return self._substituted(output, functions, {i: _lines(kind, *ends) for i, ends in known.items()})

    def _hidden_bounds(self, kind: Kind, refined: bool) -> dict[int, tuple[Array, Array]]:
        """l, u of the inputs of every ReLU."""
        if (kind, refined) not in self._hidden:
            known: dict[int, tuple[Array, Array]] = {}
            lines: dict[int, _Lines] = {}
            for index in self._network.relus:
                source = self._network.nodes[index].inputs[0]
                lower, upper = (end.copy() for end in self._boxes[source])
                unstable = np.flatnonzero(~((lower >= 0) | (upper <= 0)))
                if refined and len(unstable):
                    units = sparse.csr_array(
                        (np.ones(len(unstable)), (unstable, np.arange(len(unstable)))),
                        shape=(len(lower), len(unstable)),
                    )
                    lower[unstable] = np.maximum(lower[unstable], self._substituted(source, units, lines))
                    upper[unstable] = np.minimum(upper[unstable], -self._substituted(source, -units, lines))
                known[index] = lower, upper
                lines[index] = _lines(kind, lower, upper)
            self._hidden[kind, refined] = known
        return self._hidden[kind, refined]

    def _with_slopes(self, given: list[tuple[Array, Array]]) -> dict[int, _Lines]:
        """CROWN's lines, with slopes given for each of some functions."""
        lines, start = {}, 0
        for index, (lower, upper) in self._hidden_bounds("adaptive", True).items():
            plain = _lines("adaptive", lower, upper)
            low = np.repeat(plain.low[:, None], len(given), axis=1)
            for function, (units, slopes) in enumerate(given):
                here = (units >= start) & (units < start + len(lower))
                low[units[here] - start, function] = slopes[here]
            lines[index] = _Lines(low, plain.up, plain.shift)
            start += len(lower)
        return lines

    def _substituted(self, target: int, functions: Columns, lines: Mapping[int, _Lines]) -> Array:
        """Lower bounds of functions (units, functions) of a node, by lines of the ReLUs before it: (functions,)."""
        ancestors = self._network.ancestors([target])
        widest = max(self._network.nodes[index].size for index in ancestors)
        count, step = functions.shape[1], max(1, MOST_COEFFICIENTS // widest)
        if count > step:
            parts = []
            for start in range(0, count, step):
                part = slice(start, start + step)
                own = {
                    index: _Lines(line.low[:, part] if line.low.ndim == 2 else line.low, line.up, line.shift)
                    for index, line in lines.items()
                }
                parts.append(self._substituted(target, functions[:, part], own))
            return np.concatenate(parts)
        pending: dict[int, Columns] = {target: functions}
        least = np.zeros(count)
        for index in sorted(ancestors - {0}, reverse=True):
            columns, node = pending.pop(index), self._network.nodes[index]
            if node.relu:
                columns, fall = _through_relu(columns, lines[index])
                least = least + fall
                parts_ = [columns]
            else:
                least = least + columns.T @ node.constant
                parts_ = [_back(matrix, columns) for matrix in node.matrices]
            for source, part_ in zip(node.inputs, parts_, strict=True):
                pending[source] = _sum(pending[source], part_) if source in pending else part_
        return least + self._least_over_ball(_whole(pending[0]))

    def _least_over_ball(self, functions: Array) -> Array:
        """The least values of functions (units, functions) of the image: (functions,).

        Over an L2 or L1 ball the better of the ball (Hoelder's inequality) and the box that holds it.
        """
        over_box = _least_over_box(functions, self._lower, self._upper)
        if self._ball.norm == "inf":
            return over_box
        length = np.sqrt((functions**2).sum(axis=0)) if self._ball.norm == "2" else abs(functions).max(axis=0)
        return np.maximum(over_box, functions.T @ self._image - self._ball.radius * length)


def _lines(kind: Kind, lower: Array, upper: Array) -> _Lines:
    falls, rises = np.maximum(-lower, 0.0), np.maximum(upper, 0.0)
    chord = rises / np.maximum(rises + falls, np.finfo(np.float64).tiny)
    return _Lines(chord if kind == "chord" else (upper > -lower).astype(np.float64), chord, chord * falls)


def _through_relu(columns: Columns, lines: _Lines) -> tuple[Columns, Array]:
    """Functions of a ReLU's output as functions of its input, and what that adds to them."""
    if isinstance(columns, np.ndarray):
        low = lines.low if lines.low.ndim == 2 else lines.low[:, None]
        scaled = np.where(columns > 0, low, lines.up[:, None]) * columns
        return scaled, np.minimum(columns, 0.0).T @ lines.shift
    entries = columns.tocoo()
    unit, function, values = entries.coords[0], entries.coords[1], entries.data
    low = lines.low[unit, function] if lines.low.ndim == 2 else lines.low[unit]
    scaled_ = np.where(values > 0, low, lines.up[unit]) * values
    fall = np.bincount(function, np.minimum(values, 0.0) * lines.shift[unit], minlength=columns.shape[1])
    return sparse.csr_array((scaled_, (unit, function)), shape=columns.shape), fall.astype(np.float64)


def _back(matrix: sparse.csr_array, columns: Columns) -> Columns:
    """Functions of W z as functions of z."""
    found = matrix.T @ columns
    if not isinstance(found, np.ndarray) and found.nnz > DENSE * found.shape[0] * found.shape[1]:
        return _whole(found)
    return found


def _sum(first: Columns, second: Columns) -> Columns:
    if isinstance(first, np.ndarray) or isinstance(second, np.ndarray):
        return _whole(first) + _whole(second)
    return (first + second).tocsr()


def _whole(columns: Columns) -> Array:
    return columns if isinstance(columns, np.ndarray) else columns.toarray()


def _least_over_box(functions: Array, lower: Array, upper: Array) -> Array:
    return np.maximum(functions, 0.0).T @ lower + np.minimum(functions, 0.0).T @ upper
