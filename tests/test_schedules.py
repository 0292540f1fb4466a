"""Radius, learning rate and mixing weight over the epochs."""

import itertools

import pytest

from swiftsure.errors import InputError
from swiftsure.recipe import Loss, Mixing, Optimizer, Recipe, Schedule, option_names
from swiftsure.training import controller, learning_rate, radius_share
from swiftsure.training.check import chosen_epoch


def shares(schedule, steps=10):
    return [radius_share(schedule, e, s, steps) for e in range(1, schedule.epochs + 1) for s in range(steps)]


@pytest.mark.parametrize("shape", ["epoch", "batch", "smooth"])
def test_the_radius_is_zero_in_warmup_grows_in_the_ramp_and_stays(shape):
    values = shares(Schedule(epochs=10, warmup=2, ramp=4, shape=shape))
    assert values[:20] == [0.0] * 20
    ramp = values[20:60]
    assert all(a <= b for a, b in itertools.pairwise(ramp))
    assert max(ramp) <= 1
    assert values[60:] == [1.0] * 40


def test_linear_per_epoch_is_constant_within_an_epoch_and_linear_per_batch_is_not():
    epoch = shares(Schedule(epochs=6, ramp=4, shape="epoch"))
    assert epoch[::10] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert all(len(set(epoch[i : i + 10])) == 1 for i in range(0, 60, 10))
    batch = shares(Schedule(epochs=6, ramp=4, shape="batch"))
    assert batch[:40] == pytest.approx([(i + 1) / 40 for i in range(40)])


def test_smooth_is_a_fourth_power_then_linear_and_meets_without_a_kink():
    values = shares(Schedule(epochs=4, ramp=4, shape="smooth"), steps=100)
    assert values[49] == pytest.approx(values[99] * (50 / 100) ** 4)
    slopes = [b - a for a, b in itertools.pairwise(values[100:])]
    assert max(slopes) == pytest.approx(min(slopes), rel=1e-6)
    assert values[100] - values[99] == pytest.approx(slopes[0], rel=0.02)


def test_no_ramp_is_the_full_radius_at_once():
    assert shares(Schedule(epochs=2, ramp=0)) == [1.0] * 20


def test_learning_rates():
    schedule = Schedule(epochs=4, ramp=0)
    step = Optimizer(rate=1.0, decay="step", decay_epochs=[2, 3], decay_factor=0.1)
    assert [learning_rate(step, schedule, e, 0, 5) for e in (1, 2, 3, 4)] == pytest.approx([1, 1, 0.1, 0.01])
    cosine = Optimizer(rate=1.0, decay="cosine", decay_from=2)
    rates = [learning_rate(cosine, schedule, e, s, 5) for e in (1, 2, 3, 4) for s in range(5)]
    assert rates[:11] == [1.0] * 11
    assert rates[15] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.05
    linear = Optimizer(rate=1.0, decay="linear", decay_from=2)
    assert [learning_rate(linear, schedule, e, 0, 5) for e in (1, 2, 3, 4)] == pytest.approx([1, 1, 1, 0.5])
    assert learning_rate(linear, schedule, 4, 4, 5) == pytest.approx(0.1)
    assert learning_rate(Optimizer(rate=0.3, decay="constant"), schedule, 4, 4, 5) == 0.3


def test_geometric_is_hydras_schedule():
    mixing = Mixing("geometric", first=0.1, factor=2.5, every=5, last=50)
    weights = [controller(mixing, Schedule(epochs=60, ramp=15)).weight(e, None, None) for e in range(1, 61)]
    # Its epochs count from 0: min(0.1 * 2.5 ** (max(epoch - 15, 0) // 5), 50).
    expected = [min(0.1 * 2.5 ** (max(e - 15, 0) // 5), 50) for e in range(60)]
    assert weights == pytest.approx(expected)
    assert max(weights) == 50


def test_balanced_raises_while_clean_accuracy_holds_and_lowers_when_it_falls():
    mixing = Mixing("balanced", first=1.0, factor=2.0, last=8.0, least=0.5, clean_target=0.9)
    control = controller(mixing, Schedule(ramp=0))
    clean = [None, 0.95, 0.95, 0.95, 0.95, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.9]
    weights = [control.weight(i + 1, c, None) for i, c in enumerate(clean)]
    assert weights == [1, 2, 4, 8, 8, 4, 2, 1, 0.5, 0.5, 0.5, 1.0]


def test_balanced_waits_for_the_full_radius():
    control = controller(
        Mixing("balanced", first=1.0, factor=2.0, clean_target=0.9), Schedule(warmup=1, ramp=2)
    )
    assert [control.weight(e, 0.95, None) for e in range(1, 7)] == [1, 1, 1, 1, 2, 4]


def test_balanced_without_a_target_stays_within_tolerance_of_the_best():
    control = controller(Mixing("balanced", first=1.0, factor=2.0, tolerance=0.02), Schedule(ramp=0))
    weights = [control.weight(i + 1, c, None) for i, c in enumerate([None, 0.9, 0.95, 0.94, 0.92])]
    assert weights == [1, 2, 4, 8, 4]


def test_balanced_goes_on_from_its_saved_state():
    mixing = Mixing("balanced", first=1.0, factor=2.0)
    schedule = Schedule(ramp=0)
    whole, part = controller(mixing, schedule), controller(mixing, schedule)
    for epoch, clean in enumerate([None, 0.9, 0.95], 1):
        last = whole.weight(epoch, clean, None)
    part.state.update({name: float(value) for name, value in whole.state.items()})
    assert part.weight(4, 0.95, None) == whole.weight(4, 0.95, None) == 2 * last


def test_ramp_follows_the_radius():
    control = controller(Mixing("ramp", first=0.0, last=0.5), Schedule(epochs=6, warmup=1, ramp=4))
    assert [control.weight(e, None, None) for e in range(1, 7)] == [0, 0, 0.125, 0.25, 0.375, 0.5]


def test_the_kept_epoch_is_at_the_full_radius_and_above_the_floor():
    def record(eps, clean, verified):
        return {"eps": eps, "clean_accuracy": clean, "robust_accuracy": None, "verified_accuracy": verified}

    records = [record(0.1, 0.99, 0.9), record(0.2, 0.9, 0.8), record(0.2, 0.97, 0.7), record(0.2, 0.98, 0.6)]
    assert chosen_epoch(records, Loss(), Schedule()) == 1
    assert chosen_epoch(records, Loss(), Schedule(clean_floor=0.95)) == 2
    assert chosen_epoch(records, Loss(), Schedule(clean_floor=0.999)) == 1
    assert chosen_epoch(records, Loss(), Schedule(choose="clean")) == 3
    assert chosen_epoch(records, Loss(), Schedule(choose="last")) == len(records) - 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: Schedule(epochs=3, warmup=2, ramp=2),
        lambda: Schedule(batch=0),
        lambda: Mixing(factor=1.0),
        lambda: Mixing(gate=0.0),
        lambda: Mixing(clean_target=99),
        lambda: Loss(k=0),
        lambda: Loss(clean=0.0, proven=False),
        lambda: Optimizer(rate=0.0),
    ],
)
def test_settings_that_make_no_sense_are_refused(make):
    with pytest.raises(InputError, match=r"allowed|must|more than|no term"):
        make()


def test_options_are_listed_by_their_dotted_names():
    names = option_names(Recipe)
    assert {"seed", "loss.mixing.gate", "schedule.ramp", "ball.eps"} <= set(names)
