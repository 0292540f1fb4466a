"""The loss, the batches and the loop: what each setting of them promises."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from swiftsure.ball import Ball
from swiftsure.bounds import margins
from swiftsure.data import ImageSet, load
from swiftsure.errors import InputError
from swiftsure.models import build
from swiftsure.training import (
    Attack,
    BatchStatistics,
    Loss,
    Mixing,
    Optimizer,
    Schedule,
    fit,
    mixtrain_loss,
    source,
    three_term_loss,
)
from swiftsure.training.terms import draw, worst_case_loss


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def small(batch_norm=False):
    layers = [nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)]
    if batch_norm:
        layers.insert(1, nn.BatchNorm2d(4))
    return nn.Sequential(*layers)


def short(**changes):
    settings = {"epochs": 2, "batch": 32, "ramp": 1, "check_images": 50, "check_steps": 2}
    return Schedule(**{**settings, **changes})


# ---- terms


def test_worst_case_loss_is_above_the_loss_at_every_point_of_the_ball():
    net, ball = small(), Ball(0.1)
    x, y = torch.rand(8, 1, 8, 8), torch.randint(10, (8,))
    for method in ("interval", "symbolic", "best"):
        bound = worst_case_loss(net, x, y, ball, method)
        for _ in range(20):
            assert F.cross_entropy(net(ball.sample(x)), y) <= bound + 1e-5
    assert worst_case_loss(net, x, y, ball, "best") <= worst_case_loss(net, x, y, ball, "interval") + 1e-6


def test_worst_case_loss_at_radius_zero_is_cross_entropy():
    net, x, y = small(), torch.rand(4, 1, 8, 8), torch.randint(10, (4,))
    for method in ("interval", "symbolic"):
        value = worst_case_loss(net, x, y, Ball(0), method)
        torch.testing.assert_close(value, F.cross_entropy(net(x), y))


def test_k_samples_are_drawn_without_replacement_and_all_in_turn():
    generator = torch.Generator().manual_seed(1)
    seen = torch.zeros(20)
    for _ in range(400):
        chosen = draw(20, 5, generator)
        assert len(set(chosen.tolist())) == 5
        seen[chosen] += 1
    assert seen.min() > 60
    assert seen.max() < 140
    assert draw(20, None, generator) == slice(None)
    assert draw(3, 5, generator) == slice(None)


def test_the_loss_is_the_weighted_sum_of_its_terms():
    net, ball = small(), Ball(0.05)
    x, y = torch.rand(6, 1, 8, 8), torch.randint(10, (6,))
    other = torch.rand_like(x)
    loss = Loss(clean=0.5, attacked=0.3, bound="interval", k=None)
    value = three_term_loss(net, x, y, ball, loss, 2.0, attack=lambda *_: other)
    proven = F.cross_entropy(-margins(net, x, y, ball), y)
    expected = 0.5 * F.cross_entropy(net(x), y) + 0.3 * F.cross_entropy(net(other), y) + 2.0 * proven
    torch.testing.assert_close(value, expected)
    rest = three_term_loss(net, x, y, ball, Loss(clean=None, k=None, bound="interval"), 0.4)
    torch.testing.assert_close(rest, 0.6 * F.cross_entropy(net(x), y) + 0.4 * proven)
    shared = three_term_loss(net, x, y, ball, Loss(clean=0.0, k=None, interval_share=0.25), 2.0)
    symbolic = F.cross_entropy(-margins(net, x, y, ball, "symbolic"), y)
    torch.testing.assert_close(shared, 2.0 * (0.75 * symbolic + 0.25 * proven))


def test_l1_counts_weights_and_not_biases():
    net, x, y = small(), torch.rand(2, 1, 8, 8), torch.tensor([1, 2])
    plain, penalised = (
        three_term_loss(net, x, y, Ball(0), Loss(proven=False, l1=l1), 0.0) for l1 in (0.0, 0.5)
    )
    expected = 0.5 * (net[0].weight.abs().sum() + net[3].weight.abs().sum())
    torch.testing.assert_close(penalised - plain, expected)


def test_several_exits_are_summed():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.a, self.b = nn.Linear(64, 16), nn.Linear(16, 10), nn.Linear(16, 10)

        def forward(self, x):
            h = F.relu(self.body(x.flatten(1)))
            return self.a(h), self.b(h)

    net, x, y = Two(), torch.rand(5, 1, 8, 8), torch.randint(10, (5,))
    a, b = net(x)
    value = three_term_loss(net, x, y, Ball(0), Loss(), 0.0)
    torch.testing.assert_close(value, F.cross_entropy(a, y) + F.cross_entropy(b, y))
    lower = margins(net, x, y, Ball(0.1), "symbolic")
    proven = sum(F.cross_entropy(-low, y) for low in lower)
    torch.testing.assert_close(worst_case_loss(net, x, y, Ball(0.1), "symbolic"), proven)


def test_attack_and_bound_use_the_clean_batch_statistics_and_leave_them_alone():
    net = small(batch_norm=True).train()
    layer, x = net[1], torch.rand(16, 1, 8, 8)
    statistics = BatchStatistics(net)
    with statistics.recorded():
        clean = net(x)
    running = layer.running_mean.clone()
    with statistics.frozen():
        assert not layer.training
        torch.testing.assert_close(net(x), clean, rtol=1e-4, atol=1e-5)
        net(torch.rand(16, 1, 8, 8) + 3)
        with pytest.raises(RuntimeError), statistics.frozen():
            raise RuntimeError
    assert layer.training
    torch.testing.assert_close(layer.running_mean, running, rtol=0, atol=0)


@pytest.mark.parametrize("proven", [False, True])
def test_attacked_images_have_their_own_statistics_but_beside_a_proof(proven):
    net = small(batch_norm=True).train()
    x, y = torch.rand(16, 1, 8, 8), torch.randint(10, (16,))

    def shift(_net, x, y, ball):
        return x + 0.2  # batch norm takes it away but at the padded border, if it may look

    def value(**weights):
        loss = Loss(clean=0.0, proven=proven, **weights)
        return three_term_loss(net, x, y, Ball(0.3), loss, 0.0, attack=shift).item()

    ours = value(attacked=1.0)
    with torch.no_grad():
        own = F.cross_entropy(net(x + 0.2), y).item()
    assert (abs(ours - own) < 1e-5) is not proven


@pytest.mark.parametrize(("proven", "passes"), [(False, 2), (True, 1)])
def test_population_statistics_are_of_clean_and_attacked_images_but_beside_a_proof(proven, passes):
    net = small(batch_norm=True).train()
    x, y = torch.rand(16, 1, 8, 8), torch.randint(10, (16,))
    loss = Loss(clean=0.5, attacked=0.5, proven=proven)
    three_term_loss(net, x, y, Ball(0.1), loss, 0.0, attack=lambda _net, x, y, ball: x)
    assert net[1].num_batches_tracked == passes


def test_mixtrain_loss_in_a_loop_of_ones_own(digits):
    net = small()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    x, y = digits.train.batch(slice(0, 200))
    before = mixtrain_loss(net, x, y, Ball(0.05), k=None).item()
    for start in [0, 50, 100, 150] * 25:
        batch = slice(start, start + 50)
        loss = mixtrain_loss(net, x[batch], y[batch], Ball(0.05), k=5, weight=1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert mixtrain_loss(net, x, y, Ball(0.05), k=None).item() < 0.6 * before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weight": -1.0}, "weight is -1"),
        ({"weight": math.nan}, "weight is nan"),
        ({"method": "magic"}, "unknown bound method 'magic'"),
        ({"k": 0}, "loss.k is 0"),
        ({"k": 1.5}, "k is 1.5"),
        ({"y": torch.tensor([0, 10])}, "label"),
        ({"x": torch.rand(2, 1, 8, 8, dtype=torch.float64)}, "float64"),
    ],
)
def test_mixtrain_loss_refuses_what_makes_no_sense(changes, words):
    with pytest.raises(InputError, match=words):
        mixtrain_loss(
            small(), **{"x": torch.rand(2, 1, 8, 8), "y": torch.tensor([0, 1]), "ball": Ball(0.1), **changes}
        )


# ---- batches


def test_every_kind_of_data_gives_the_same_images(digits):
    part = digits.train.select(slice(0, 40))
    x, y = part.batch(slice(None))
    kinds = {
        "set": part,
        "tensors": (x, y),
        "dataset": TensorDataset(x, y),
        "items": part,
        "loader": DataLoader(TensorDataset(x, y), batch_size=8),
    }
    for name, data in kinds.items():
        batches = source(data, 8, torch.device("cpu"))
        assert batches.steps == 5, name
        pairs = list(batches.epoch(torch.Generator().manual_seed(0)))
        got = torch.cat([a for a, _ in pairs])
        assert got.shape == x.shape, name
        torch.testing.assert_close(got.sum(0), x.sum(0), msg=name)
        labels = torch.cat([b for _, b in pairs])
        assert sorted(labels.tolist()) == sorted(y.tolist()), name


def test_order_follows_the_generator(digits):
    def first(seed):
        batches = source(digits.train, 16, torch.device("cpu"))
        return next(iter(batches.epoch(torch.Generator().manual_seed(seed))))[0]

    torch.testing.assert_close(first(1), first(1))
    assert not torch.equal(first(1), first(2))


@pytest.mark.parametrize(("until", "epochs"), [(None, [1, 2, 3]), (2, [1, 2]), (0, [])])
def test_images_are_varied_until_the_epoch_that_is_set(digits, until, epochs):
    seen = []

    def augment(x, generator):
        seen.append(len(x))
        return x.flip(3)

    train = (digits.train.batch(slice(0, 40))[0], digits.train.labels[:40])
    schedule = Schedule(epochs=3, batch=10, ramp=0, check_images=20, augment_until=until)
    fit(small(), train, digits.val, loss=Loss(proven=False), schedule=schedule, augment=augment)
    assert seen == [10] * 4 * len(epochs)


@pytest.mark.parametrize("data", [3, (torch.rand(2, 3), "no"), [torch.rand(4, 1, 2, 2)]])
def test_other_data_is_refused(data):
    with pytest.raises(InputError):
        source(data, 4, torch.device("cpu"))


# ---- the loop


@pytest.mark.parametrize(
    "loss",
    [
        Loss(proven=False),
        Loss(clean=0.5, attacked=0.5, proven=False, attack=Attack(steps=3)),
        Loss(clean=None, bound="interval", k=None, mixing=Mixing("ramp", first=0.0, last=0.5)),
        Loss(bound="symbolic", k=2, mixing=Mixing("geometric", first=0.1, factor=2.5, gate=0.8)),
        Loss(bound="best", k=4, mixing=Mixing("balanced", first=0.1)),
    ],
    ids=["plain", "adversarial", "interval", "mixtrain-geometric", "mixtrain-balanced"],
)
def test_fit_learns_under_every_setting(digits, loss):
    net = small()
    schedule, rate = short(epochs=5, ramp=2, check_images=71), Optimizer(rate=3e-3)
    history = fit(
        net, digits.train, digits.val, loss=loss, ball=Ball(0.02), optimizer=rate, schedule=schedule
    )
    last = history.records[-1]
    assert last["clean_accuracy"] > 0.6
    assert [record["epoch"] for record in history.records] == [1, 2, 3, 4, 5]
    assert sum(record["chosen"] for record in history.records) == 1
    assert not net.training
    if loss.proven:
        assert last["verified_accuracy"] <= last["robust_accuracy"] <= last["clean_accuracy"]
    else:
        assert last["verified_accuracy"] is None


def test_interval_training_proves_more_than_plain_training(digits):
    x, y = digits.val.batch(slice(None))
    verified = {}
    for name, loss in {
        "plain": Loss(proven=False),
        "interval": Loss(clean=None, bound="interval", k=None, mixing=Mixing("ramp", first=0.0, last=0.5)),
    }.items():
        net, schedule = build("digits_small", width=4, hidden=16), short(epochs=8, ramp=4)
        rate = Optimizer(rate=3e-3)
        fit(net, digits.train, digits.val, loss=loss, ball=Ball(0.05), optimizer=rate, schedule=schedule)
        lower = margins(net, x, y, Ball(0.05)).scatter(1, y[:, None], 1.0)
        verified[name] = (lower > 0).all(1).float().mean().item()
    assert verified["interval"] > verified["plain"] + 0.2


def test_the_kept_weights_are_those_of_the_chosen_epoch(digits):
    seen = []
    net = small()

    def note(records):
        seen.append({name: value.clone() for name, value in net.state_dict().items()})

    loss = Loss(proven=False)
    history = fit(net, digits.train, digits.val, loss=loss, schedule=short(epochs=5, ramp=0), on_epoch=note)
    best = max(range(5), key=lambda i: (history.records[i]["clean_accuracy"], -i))
    assert history.best == best
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, seen[best][name], rtol=0, atol=0)


def test_a_stopped_training_goes_on_to_the_same_weights(digits, tmp_path):
    class Stop(Exception):
        pass

    def train(folder, stop_after=None, resume=False):
        torch.manual_seed(5)
        net = nn.Sequential(*small(batch_norm=True), nn.Dropout(0.1))

        def on_epoch(records):
            if len(records) == stop_after:
                raise Stop

        settings = {
            "loss": Loss(k=2, attacked=0.2, attack=Attack(steps=2), mixing=Mixing("balanced")),
            "ball": Ball(0.03),
            "optimizer": Optimizer(weight_decay=1e-4, clip=5.0),
            "schedule": short(epochs=4, ramp=2),
        }
        history = fit(
            net, digits.train, digits.val, **settings, state_folder=folder, resume=resume, on_epoch=on_epoch
        )
        return net, history

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole, history = train(tmp_path / "whole")
        for stop_after in (1, 3):
            with pytest.raises(Stop):
                train(tmp_path / "parts", stop_after=stop_after, resume=True)
        parts, resumed = train(tmp_path / "parts", resume=True)
    finally:
        torch.set_num_threads(threads)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
    for one, two in zip(history.records, resumed.records, strict=True):
        assert {**one, "seconds": 0} == {**two, "seconds": 0}


def test_a_state_of_other_settings_or_a_damaged_one_is_refused(digits, tmp_path):
    loss = Loss(proven=False)
    fit(small(), digits.train, digits.val, loss=loss, schedule=short(), state_folder=tmp_path)
    with pytest.raises(InputError, match="other settings"):
        fit(
            small(),
            digits.train,
            digits.val,
            loss=loss,
            schedule=short(epochs=3),
            state_folder=tmp_path,
            resume=True,
        )
    path = tmp_path / "epoch.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(InputError, match="damaged"):
        fit(
            small(), digits.train, digits.val, loss=loss, schedule=short(), state_folder=tmp_path, resume=True
        )


def test_a_loss_that_is_not_finite_ends_training_with_a_clear_line(digits):
    with pytest.raises(InputError, match="the loss became"):
        fit(
            small(), digits.train, digits.val, loss=Loss(proven=False),
            optimizer=Optimizer(rate=1e30), schedule=short(ramp=0),
        )  # fmt: skip


def test_labels_or_images_that_do_not_fit_the_network_are_found_before_training(digits):
    three = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(InputError, match="label"):
        fit(three, digits.train, digits.val, schedule=short())
    with pytest.raises(InputError, match="shape"):
        fit(build("mnist_small"), digits.train, digits.val, schedule=short())


class Endless(IterableDataset):
    def __iter__(self):
        yield torch.rand(1, 8, 8), 0


@pytest.mark.parametrize(
    ("train", "val", "changes", "words"),
    [
        ("digits", (torch.rand(4, 1, 9, 9), torch.zeros(4).long()), {}, "shape"),
        ((torch.rand(4, 1, 9, 9), torch.zeros(4).long()), "digits", {}, "shape"),
        ((torch.rand(4, 1, 8, 8), torch.full((4,), 10)), "digits", {}, "label"),
        (DataLoader(TensorDataset(torch.rand(4, 1, 8, 8), torch.full((4,), 10))), "digits", {}, "label"),
        ("digits", TensorDataset(torch.rand(0, 1, 8, 8), torch.zeros(0).long()), {}, "empty"),
        (Endless(), "digits", {}, "stream"),
        (DataLoader(Endless()), "digits", {}, "stream"),
        ("digits", "digits", {"ball": "0.1"}, "ball is '0.1'"),
        ("digits", "digits", {"double": True}, "float64"),
    ],
)
@pytest.mark.parametrize("proven", [True, False])
def test_fit_refuses_what_it_cannot_train_on_in_one_line(digits, train, val, changes, words, proven):
    parts = [
        getattr(digits, name) if isinstance(part, str) else part
        for name, part in (("train", train), ("val", val))
    ]
    net, changes = small(), dict(changes)
    if changes.pop("double", False):
        net.double()
    with pytest.raises(InputError, match=words) as caught:
        fit(net, *parts, loss=Loss(proven=proven), schedule=short(), **changes)
    assert "\n" not in str(caught.value)


def test_fit_leaves_the_global_generator_as_it_was(digits):
    net = small()
    state = torch.get_rng_state()
    fit(net, digits.train, digits.val, loss=Loss(proven=False), schedule=short())
    assert torch.equal(torch.get_rng_state(), state)


def test_training_works_on_a_tensor_pair_of_two_classes():
    x = torch.rand(64, 1, 4, 4)
    y = (x[:, 0, 0, 0] > 0.5).long()
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
    history = fit(
        net, (x, y), (x, y), ball=Ball("1/255"), loss=Loss(k=4),
        optimizer=Optimizer(rate=3e-2, decay="constant"), schedule=short(epochs=30, batch=16),
    )  # fmt: skip
    assert history.records[-1]["clean_accuracy"] > 0.8
    assert isinstance(ImageSet.from_tensors(x, y), ImageSet)
