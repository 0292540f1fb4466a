"""Every cell of the table in docs/operations.md: exact means attained, relaxed means sound, refused means one line."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import operations
from spelling import CHANNELS, SIZE, Spelling, parameter, weighed
from swiftsure import bounds
from swiftsure.ball import Ball
from swiftsure.bounds import operations as operations_of_graphs
from swiftsure.bounds.rows import add, unit_rows
from swiftsure.errors import InputError

TECHNIQUES = tuple(bounds.TECHNIQUES)
# Of torch about the networks themselves.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
SPELLINGS = {**operations.ATTAINED, **operations.BENT, **operations.REFUSED}


def table() -> dict[str, dict[str, str]]:
    """{operation: {technique: word}}."""
    text = (Path(__file__).parents[1] / "docs" / "operations.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    (_, *names), _, *rows = rows
    return {operation: dict(zip(names, words, strict=True)) for operation, *words in rows}


TABLE = table()


def cases(word: str, most: int | None = None) -> list[Any]:
    """Every spelling (or ``most``) of operations that have a cell with this word, and the techniques of those cells."""
    found = []
    for operation, cells in TABLE.items():
        methods = [method for method, cell in cells.items() if cell == word]
        for spelling in SPELLINGS.get(operation, [])[:most] if methods else []:
            found.append(pytest.param(spelling, methods, id=f"{operation.split(',')[0]}: {spelling.name}"))
    return found


def test_the_table_has_these_operations_techniques_and_words() -> None:
    assert list(TABLE) == list(SPELLINGS)
    for cells in TABLE.values():
        assert set(cells) == set(TECHNIQUES)
        assert set(cells.values()) <= {"exact", "relaxed", "refused"}


class Stretch(nn.Module):
    """Pixels in [0, 1] to values on both sides of zero, one by one."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5) * 6


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(2, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(1), dtype=dtype)


def alone(spelling: Spelling) -> nn.Module:
    """The operation on a box."""
    return nn.Sequential(Stretch(), spelling.body(), nn.Flatten()).eval()


def among(spelling: Spelling, *, bent: bool) -> nn.Module:
    """The operation behind convolutions and in front of a linear layer; with ReLUs about it, if ``bent``."""
    torch.manual_seed(2)
    relu = [nn.ReLU()] if bent else []
    front = nn.Sequential(
        Stretch(),
        nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
        *relu,
        nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
        spelling.body(),
    ).eval()
    with torch.no_grad():
        found = front(images())
    if bent and found.dim() == 4:
        # So that rows which stand on single units of a map meet the operation.
        front.append(nn.Conv2d(found.shape[1], 3, 2, padding=1))
    front.extend([*relu, nn.Flatten()])
    with torch.no_grad():
        features = front(images()).shape[1]
    return nn.Sequential(front, nn.Linear(features, 3)).eval()


def corners(net: nn.Module, lower: Tensor, upper: Tensor) -> Iterator[Tensor]:
    """For each output and side, the corner of the box that its gradient points to; and the way between two corners."""
    for share in torch.linspace(0, 1, 401):
        yield torch.lerp(lower, upper, share)
    middle = ((lower + upper) / 2).requires_grad_()
    outputs = net(middle)
    for j in range(outputs.shape[1]):
        (slope,) = torch.autograd.grad(outputs[:, j].sum(), middle, retain_graph=True)
        for sign in (1, -1):
            yield torch.where(sign * slope > 0, upper, lower)


@pytest.mark.parametrize(("spelling", "methods"), cases("exact"))
def test_exact_bounds_are_attained_and_never_left(spelling: Spelling, methods: list[str]) -> None:
    x, ball = images(), Ball(0.07)
    lower, upper = ball.box(x)
    for methods_, net in (
        ([m for m in methods if m == "interval"], alone(spelling)),
        ([m for m in methods if m != "interval"], among(spelling, bent=False)),
    ):
        if not methods_:
            continue
        with torch.no_grad():
            least = greatest = net(x.clone())
        for point in corners(net, lower, upper):
            with torch.no_grad():
                found = net(point.clone())
            least, greatest = torch.minimum(least, found), torch.maximum(greatest, found)
        assert (greatest > least).any()
        for method in methods_:
            low, high = bounds.output_bounds(net, x, ball, method)
            scale = 1 + greatest.abs().max().item()
            torch.testing.assert_close(
                low, least, rtol=0, atol=1e-5 * scale, msg=lambda m, t=method: f"{t}: {m}"
            )
            torch.testing.assert_close(
                high, greatest, rtol=0, atol=1e-5 * scale, msg=lambda m, t=method: f"{t}: {m}"
            )


def strided(sizes: tuple[int, int], pads: tuple[Any, Any]) -> Spelling:
    """A sum of two convolutions of a third one's map, from and beyond its padding."""

    def total(self: Any, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.front, padding=1)
        parts = zip((self.a, self.b), pads, strict=True)
        return sum(F.conv2d(x, kernel, stride=3, padding=pad) for kernel, pad in parts)

    a, b = (parameter(3, CHANNELS, size, size) for size in sizes)
    return weighed(f"strided {sizes} {pads}", total, front=parameter(CHANNELS, CHANNELS, 3, 3), a=a, b=b)


# Rows of single units meet in windows of unlike sizes and places.
STRIDED = [
    strided((1, 1), (1, 1)), strided((1, 3), ((1, 0), (2, 1))), strided((4, 1), (1, 0)), strided((2, 4), (1, 2))
]  # fmt: skip


@pytest.mark.parametrize("negated", [False, True], ids=["", "negated"])
@pytest.mark.parametrize(
    "spelling", [*[case.values[0] for case in cases("exact") if "crown" in case.values[1]], *STRIDED], ids=str
)
def test_rows_of_single_units_are_the_gradient(spelling: Spelling, negated: bool) -> None:
    """As hidden units are bounded: on maps by windows, which must hold what whole maps would."""
    torch.manual_seed(2)
    before = [Stretch(), nn.Conv2d(CHANNELS, CHANNELS, 3, 2, 1), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)]
    net = nn.Sequential(*before, nn.Upsample(SIZE), spelling.body(), nn.Flatten()).double().eval()
    x = images(torch.float64)[:1]
    graph = bounds.trace(net, x)
    last = graph.outputs[0]
    if isinstance(graph.nodes[last].operation, operations_of_graphs.Reshape):
        (last,) = graph.nodes[last].inputs
    shape = graph.nodes[last].shape
    units = torch.arange(0, torch.Size(shape).numel(), 3)
    rows = unit_rows(units, shape, None, x.dtype)
    pending = {last: rows.negative() if negated else rows}
    for index in graph.ancestors(last)[:-1]:
        node, rows = graph.nodes[index], pending.pop(index)
        for source, part in zip(node.inputs, node.operation.transpose(rows), strict=True):
            pending[source] = add(pending[source], part) if source in pending else part
    slopes = torch.autograd.functional.jacobian(net, x)[0, units, 0]
    found = pending[0].dense().spread().values
    torch.testing.assert_close(found, -slopes if negated else slopes, rtol=1e-9, atol=1e-9)


def points(net: nn.Module, x: Tensor, ball: Ball) -> Iterator[Tensor]:
    """Random points, random corners, and for each output points that gradients lead to."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        yield ball.sample(x, generator)
        yield ball.maximiser(x, torch.randn(x.shape, generator=generator, dtype=x.dtype))
    for j in range(3):
        for sign in (1.0, -1.0):
            point = x
            for _ in range(4):
                point = point.detach().requires_grad_()
                (slope,) = torch.autograd.grad(sign * net(point * 1)[:, j].sum(), point)
                # The best point for a linear network, then ever shorter steps towards it.
                point = torch.lerp(point, ball.maximiser(x, slope), 0.7)
            yield point.detach()


def bounded(net: nn.Module, x: Tensor, ball: Ball, method: str) -> tuple[Tensor, Tensor]:
    """Bounds of three logits and of their differences: two of (batch, 6)."""
    graph, identity = bounds.trace(net, x), torch.eye(3, dtype=x.dtype)
    functions = torch.cat([identity, identity - identity.roll(1, 0)]).expand(len(x), -1, -1)
    # Few steps: any slopes are sound, those of an ascent under way more likely to show that they are not.
    fewer = {"steps": 4} if method == "alpha-crown" else {}
    ((lower, upper),) = bounds.technique(method)(graph, bounds.Region(x, ball), functions, **fewer)
    return lower, upper


def assert_holds(spelling: Spelling, methods: list[str], ball: Ball) -> None:
    net, x = among(spelling, bent=True), images()
    with torch.no_grad():
        boxes = {method: bounded(net, x, ball, method) for method in methods}
    for point in points(net, x, ball):
        assert ball.contains(point, x).all()
        with torch.no_grad():
            logits = net(point.clone())
        values = torch.cat([logits, logits - logits.roll(1, 1)], 1)
        slack = 1e-5 * (1 + logits.abs().max())
        for method, (lower, upper) in boxes.items():
            assert (values >= lower - slack).all(), method
            assert (values <= upper + slack).all(), method


@pytest.mark.parametrize(("spelling", "methods"), [*cases("exact", most=3), *cases("relaxed")])
def test_no_point_of_the_ball_leaves_the_bounds(spelling: Spelling, methods: list[str]) -> None:
    assert_holds(spelling, methods, Ball(0.05))


@pytest.mark.parametrize("ball", [Ball(0.4, "2"), Ball(1.0, "1")], ids=lambda ball: ball.norm)
@pytest.mark.parametrize(("spelling", "methods"), [*cases("exact", most=1), *cases("relaxed", most=1)])
def test_no_point_of_other_balls_leaves_the_bounds(
    spelling: Spelling, methods: list[str], ball: Ball
) -> None:
    assert_holds(spelling, methods, ball)


@pytest.mark.parametrize(("spelling", "methods"), [*cases("exact", most=2), *cases("relaxed", most=2)])
def test_gradients_equal_finite_differences(spelling: Spelling, methods: list[str]) -> None:
    """Through the operation to the weights before it, and to its own."""
    net, x = among(spelling, bent=True).double(), images(torch.float64)
    y, parameters = torch.tensor([0, 2]), list(net.parameters())
    start = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(0)
    way = [torch.randn(parameter.shape, generator=generator, dtype=torch.float64) for parameter in parameters]

    def total(method: str, step: float) -> Tensor:
        with torch.no_grad():
            for parameter, value, direction in zip(parameters, start, way, strict=True):
                parameter.copy_(value + step * direction)
        return bounds.margins(net, x, y, Ball(0.02), method).sum()

    for method in methods:
        if method == "alpha-crown":  # not for training
            continue
        gradients = torch.autograd.grad(
            total(method, 0.0), parameters, allow_unused=True, materialize_grads=True
        )
        slope = sum((g * d).sum() for g, d in zip(gradients, way, strict=True)).item()
        steps = [(total(method, h).item() - total(method, -h).item()) / (2 * h) for h in (1e-6, 1e-7)]
        # Two steps that disagree straddle a kink, where there is no derivative to compare with.
        if abs(steps[0] - steps[1]) < 1e-4 * (1 + abs(slope)):
            assert slope == pytest.approx(steps[0], rel=1e-3, abs=1e-3), method


@pytest.mark.parametrize(("spelling", "methods"), cases("refused"))
def test_a_refusal_is_one_line_with_place_reason_and_way_out(spelling: Spelling, methods: list[str]) -> None:
    net, x = nn.Sequential(Stretch(), nn.Sequential(spelling.body()), nn.Flatten()).eval(), images()
    state = copy.deepcopy(net.state_dict())
    for method in methods:
        with pytest.raises(InputError) as caught:
            bounds.output_bounds(net, x, Ball(0.1), method)
        line = str(caught.value)
        assert "\n" not in line
        assert spelling.line in line
        assert re.search(r"replace it|bounds (are|need)|remove", line), line
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


class Whole(nn.Module):
    """All operations in one network, none of which must keep it alive."""

    def __init__(self, spellings: list[Spelling]) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(spelling.body() for spelling in spellings)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([body(x).flatten(1) for body in self.bodies], 1)


def test_no_operation_keeps_its_network_alive() -> None:
    spellings = [
        s for table in (operations.ATTAINED, operations.BENT) for group in table.values() for s in group
    ]
    net = Whole(spellings).eval()
    bounds.output_bounds(net, images(), Ball(0.1))
    watch = weakref.ref(net)
    del net
    gc.collect()
    assert watch() is None


@pytest.mark.parametrize("norm", ["inf", "2"])
@pytest.mark.parametrize("method", TECHNIQUES)
def test_no_images_give_no_bounds(method: str, norm: str) -> None:
    for group in (operations.ATTAINED, operations.BENT):
        for spellings in group.values():
            net = among(spellings[0], bent=True)
            low, high = bounds.output_bounds(net, images()[:0], Ball(0.1, norm), method)
            assert low.shape == high.shape == (0, 3)
