"""Every module, function and method that has a rule is met: the rarer ones here, the others by the table's cells."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import test_bounds_operations as cells
from operations import ATTAINED, BENT, REFUSED, normed
from spelling import SIZE, Spelling, call, lines, module, parameter, solid, weighed
from swiftsure import bounds
from swiftsure.ball import Ball
from swiftsure.bounds.tracing import reader, spellings
from swiftsure.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:.*upsample.* is deprecated")
BALL = Ball(0.07)


def squares(x: Tensor) -> Tensor:
    """(batch, CHANNELS * SIZE * SIZE)."""
    return x.flatten(1)


LINEAR = [
    # Modules
    module(lambda: normed(nn.SyncBatchNorm(4))), module(lambda: nn.Dropout(0.3)),
    module(lambda: nn.Dropout1d(0.3), lines), module(lambda: nn.Dropout3d(0.3), solid),
    module(lambda: nn.FeatureAlphaDropout(0.3)), module(lambda: nn.AdaptiveAvgPool3d((1, 4, 5)), solid),
    module(lambda: nn.PixelUnshuffle(2)), module(lambda: nn.Fold((7, 7), 2), lines),
    module(lambda: nn.UpsamplingNearest2d(scale_factor=2)), module(lambda: nn.ZeroPad1d((1, 2)), lines),
    module(lambda: nn.ZeroPad3d(1), solid), module(lambda: nn.ConstantPad3d((1, 0, 2, 0, 0, 1), 0.5), solid),
    module(lambda: nn.ReflectionPad1d((2, 1)), lines), module(lambda: nn.ReflectionPad3d(1), solid),
    module(lambda: nn.ReplicationPad3d((1, 0, 2, 0, 0, 1)), solid), module(lambda: nn.CircularPad1d((2, 1)), lines),
    module(lambda: nn.CircularPad3d((1, 0, 2, 0, 0, 1)), solid),
    # Functions
    weighed(
        "F.conv3d", lambda self, x: F.conv3d(solid(x), self.w, None, (1, 2, 1), 1, groups=2), w=parameter(2, 1, 2, 2, 3)
    ),
    weighed(
        "F.conv_transpose3d",
        lambda self, x: F.conv_transpose3d(solid(x), self.w, self.b, (2, 1, 1), 0, 1, dilation=2),
        w=parameter(2, 1, 2, 2, 1), b=parameter(1),
    ),
    call("F.dropout1d", lambda x: F.dropout1d(lines(x), 0.3, False)),
    call("F.dropout3d", lambda x: F.dropout3d(solid(x), training=False)),
    call("F.alpha_dropout", lambda x: F.alpha_dropout(x, 0.3)),
    call("torch.reshape", lambda x: torch.reshape(x, (x.shape[0], 8, -1))),
    call("torch.squeeze", lambda x: torch.squeeze(torch.unsqueeze(x, 2), 2)),
    call("torch.unflatten", lambda x: torch.unflatten(x, 1, (2, 2))), call("torch.clone", torch.clone),
    call("torch.swapaxes", lambda x: torch.swapaxes(x, 1, 3)), call("torch.flip", lambda x: torch.flip(x, (1, -1))),
    call("torch.select", lambda x: torch.select(x, 2, -2)), call("torch.tile", lambda x: torch.tile(x, (1, 2, 1, 1))),
    call("torch.unbind", lambda x: torch.unbind(x, 1)[2]), call("F.upsample", lambda x: F.upsample(x, None, 2)),
    call("F.pixel_shuffle", lambda x: F.pixel_shuffle(x, 2)),
    call("torch.channel_shuffle", lambda x: torch.channel_shuffle(x, 2)),
    call("F.unfold", lambda x: F.unfold(x, (2, 3), 2, 1, 2)),
    call("torch.subtract", lambda x: torch.subtract(x[:, 1:], x[:, :3], alpha=2)),
    call("torch.mul", lambda x: torch.mul(-3, x)), call("torch.multiply", lambda x: torch.multiply(x, 0.3)),
    call("torch.divide", lambda x: torch.divide(x, -7)), call("torch.true_divide", lambda x: torch.true_divide(x, 3)),
    call("F.avg_pool3d", lambda x: F.avg_pool3d(solid(x), (1, 2, 3), 2, (0, 1, 1), True, False)),
    call("F.adaptive_avg_pool1d", lambda x: F.adaptive_avg_pool1d(lines(x), 5)),
    call("F.adaptive_avg_pool3d", lambda x: F.adaptive_avg_pool3d(solid(x), (1, 4, None))),
    # Methods
    call("view_as", lambda x: lines(x).view_as(x)), call("reshape_as", lambda x: x.transpose(1, 2).reshape_as(x)),
    call("float", lambda x: x.float()), call("type", lambda x: x.type(torch.float32)),
    call("swapaxes", lambda x: x.swapaxes(-1, 1)), call("movedim", lambda x: x.movedim(1, 3)),
    call("narrow", lambda x: x.narrow(2, 1, 3)),
    weighed(
        "index_select", lambda self, x: x.index_select(3, self.i), i=lambda: torch.tensor([5, 0, 0])
    ),
    call("tile", lambda x: x.tile(1, 1, 2, 1)), call("repeat_interleave", lambda x: x.repeat_interleave(3, 1)),
    call("expand_as", lambda x: x[:, :1].expand_as(x)),
    weighed("matmul", lambda self, x: x.matmul(self.w), w=parameter(SIZE, 2)), call("neg", lambda x: x.neg()),
    call("neg_", lambda x: (x + 1).neg_()), call("div", lambda x: x.div(-0.3)),
]  # fmt: skip

RISING = [
    call("F.max_pool1d", lambda x: F.max_pool1d(lines(x), 4, 3, 1, 2, True)),
    call("F.adaptive_max_pool1d", lambda x: F.adaptive_max_pool1d(lines(x), 7)),
    call("torch.max_pool1d", lambda x: torch.max_pool1d(lines(x), 3, 2)),
    call("F.relu_", lambda x: F.relu_(x + 0.1)), call("F.leaky_relu_", lambda x: F.leaky_relu_(x + 0.1, 0.4)),
    call("F.hardtanh_", lambda x: F.hardtanh_(x + 0.1, -0.5)), call("torch.relu_", lambda x: torch.relu_(x + 0.1)),
    call("torch.clip", lambda x: torch.clip(x, max=0.5)), call("torch.clamp_min", lambda x: torch.clamp_min(x, -0.2)),
    call("torch.clamp_max", lambda x: torch.clamp_max(x, 0.2)),
    call("F.sigmoid", F.sigmoid), call("torch.sigmoid", torch.sigmoid), call("F.tanh", F.tanh),
    call("torch.tanh", torch.tanh), call("torch.sigmoid_", lambda x: torch.sigmoid_(x - 1)),
    call("torch.tanh_", lambda x: torch.tanh_(x - 1)), call("relu", lambda x: x.relu()),
    call("clip_", lambda x: (x * 2).clip_(-0.3, 0.9)), call("clamp_min_", lambda x: (x * 2).clamp_min_(0.3)),
    call("clamp_max", lambda x: x.clamp_max(0.3)), call("clamp_max_", lambda x: (x * 2).clamp_max_(0.3)),
    call("maximum", lambda x: x.maximum(torch.tensor(-0.4))), call("minimum", lambda x: x.minimum(torch.tensor(0.4))),
    call("sigmoid_", lambda x: (x + 1).sigmoid_()), call("tanh", lambda x: x.tanh()),
]  # fmt: skip

UNBOUNDED = [
    module(lambda: nn.Softmax2d()), module(lambda: nn.LogSoftmax(1)), module(lambda: nn.LocalResponseNorm(2)),
    module(lambda: nn.InstanceNorm1d(4), lines), module(lambda: nn.InstanceNorm3d(2), solid),
    call("F.softmax", lambda x: F.softmax(squares(x), 1)), call("torch.softmax", lambda x: torch.softmax(x, 1)),
    call("F.log_softmax", lambda x: F.log_softmax(x, 1)), call("torch.log_softmax", lambda x: torch.log_softmax(x, 1)),
    call("F.group_norm", lambda x: F.group_norm(x, 2)), call("F.instance_norm", F.instance_norm),
    call("log_softmax", lambda x: x.log_softmax(1)),
]  # fmt: skip


@pytest.mark.parametrize("spelling", LINEAR, ids=str)
def test_a_linear_operation_is_bounded_by_its_jacobian(spelling: Spelling) -> None:
    net, x = cells.alone(spelling), cells.images()[:1]
    lower, upper = BALL.box(x)
    center, radius = (lower + upper) / 2, (upper - lower) / 2
    slopes = torch.autograd.functional.jacobian(net, center)[0, :, 0].flatten(1)
    with torch.no_grad():
        middle, reach = net(center.clone()), slopes.abs() @ radius.flatten()
        for method in ("interval", "crown"):
            low, high = bounds.output_bounds(net, x, BALL, method)
            torch.testing.assert_close(low, middle - reach, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(high, middle + reach, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spelling", RISING, ids=str)
def test_an_operation_that_never_falls_has_its_range_at_the_ends(spelling: Spelling) -> None:
    net, x = cells.alone(spelling), cells.images()
    with torch.no_grad():
        ends = [net(end) for end in BALL.box(x)]
        assert (ends[1] > ends[0]).any()
        for end, found in zip(ends, bounds.output_bounds(net, x, BALL), strict=True):
            torch.testing.assert_close(found, end, rtol=1e-5, atol=1e-5)
        low, high = bounds.output_bounds(net, x, BALL, "crown")
        for share in (0.0, 0.3, 0.7, 1.0):
            value = net(torch.lerp(*BALL.box(x), share))
            assert ((low - 1e-5 <= value) & (value <= high + 1e-5)).all()


@pytest.mark.parametrize("spelling", UNBOUNDED, ids=str)
def test_what_has_no_bounds_is_refused_with_a_reason(spelling: Spelling) -> None:
    with pytest.raises(InputError, match=r"^no bound rule for .* \(it divides by .*; replace it"):
        bounds.output_bounds(cells.alone(spelling), cells.images(), BALL)


def test_every_spelling_that_has_a_rule_is_met(monkeypatch: pytest.MonkeyPatch) -> None:
    met: set[Any] = set()
    translate = reader._translate

    def noted(known: Any) -> None:
        node = known.node
        met.add(type(known.module) if known.module is not None else node.target)
        translate(known)

    monkeypatch.setattr(reader, "_translate", noted)
    tables = [group for table in (ATTAINED, BENT, REFUSED) for group in table.values()]
    for spelling in [one for group in (*tables, LINEAR, RISING, UNBOUNDED) for one in group]:
        try:
            reader.trace(cells.alone(spelling), cells.images())
        except InputError:
            continue
    known = {*spellings.MODULES, *spellings.FUNCTIONS, *spellings.METHODS}
    assert {getattr(one, "__qualname__", one) for one in known - met} == set()
