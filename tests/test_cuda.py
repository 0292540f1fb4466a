"""On a GPU everything says what it says on the CPU; skipped where there is none."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import small_run
import swiftsure as ss
from swiftsure import attacks, bounds, data, evaluation, results, run
from swiftsure.attacks import Replayed, at_exit, average, max_average, never, pgd
from swiftsure.calibration import calibrate_run
from swiftsure.certificates import certifying
from swiftsure.exits import MultiExit
from swiftsure.prediction import predict
from swiftsure.recipe import Attack, Loss, Schedule
from swiftsure.training.adversary import adversary
from swiftsure.training.statistics import BatchStatistics

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore:.*lazy loading.*")]

BALL = ss.Ball(0.1)


def normed() -> MultiExit:
    """Two exits behind convolutions with batch norm, on the GPU, in training mode."""
    torch.manual_seed(0)
    stages = [
        nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
    ]
    heads = [nn.Sequential(nn.Flatten(), nn.Linear(8 * 64, 10)) for _ in range(2)]
    return MultiExit(stages, heads).cuda()


def digits(count: int = 64) -> tuple[Tensor, Tensor]:
    return data.load("digits").train.batch(slice(0, count), "cuda")


@pytest.mark.parametrize("form", ["main", "exit1", "average", "max_average"])
def test_recorded_gradients_are_those_of_plain_passes(form: str) -> None:
    net, (x, y) = normed(), digits()
    replayed = Replayed()
    make = [
        adversary(Attack(form, 5, random_start=False), BALL, 2, None, how)
        for how in (replayed, attacks.input_gradient)
    ]
    descent = torch.optim.SGD(net.parameters(), 0.5)
    for _ in range(3):
        # Weights and the batch's own statistics change from step to step, and the record must follow both.
        statistics = BatchStatistics(net)
        with statistics.recorded():
            loss = sum(nn.functional.cross_entropy(z, y) for z in net(x))
        descent.zero_grad()
        loss.backward()
        with statistics.frozen():
            first, second = (attack(net, x, y, BALL) for attack in make)
        assert (first != second).double().mean() < 2e-3, "a step is a sign, which rounding may turn near 0"
        assert (first != x).double().mean() > 0.2
        descent.step()
        x = x.flip(0)
        y = y.flip(0)
    assert len(replayed._recorded) == 1 and None not in replayed._recorded.values()


def test_a_record_in_half_precision_follows_the_weights() -> None:
    net, (x, y) = normed().eval(), digits()
    replayed = Replayed()
    with torch.autocast("cuda", torch.bfloat16):
        before = pgd(net, x, y, BALL, steps=1, random_start=False, gradient=replayed)
        with torch.no_grad():
            for weight in net.parameters():
                weight.neg_()
        after = pgd(net, x, y, BALL, steps=1, random_start=False, gradient=replayed)
        plain = pgd(net, x, y, BALL, steps=1, random_start=False, judge=never)
    assert (after != plain).double().mean() < 0.02
    assert (before != plain).double().mean() > 0.1


def test_a_network_that_waits_for_numbers_is_not_recorded() -> None:
    class Waits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            z = self.linear(x.flatten(1))
            return z if float(z.amax()) < 1e9 else z / 2

    net, (x, y) = Waits().cuda(), digits()
    replayed = Replayed()
    found = pgd(net, x, y, BALL, steps=3, random_start=False, gradient=replayed)
    plain = pgd(net, x, y, BALL, steps=3, random_start=False, judge=never)
    torch.testing.assert_close(found, plain)
    assert list(replayed._recorded.values()) == [None]
    torch.rand(3, device="cuda")


@pytest.mark.parametrize("technique", list(bounds.TECHNIQUES))
def test_bounds_are_those_of_the_cpu(technique: str) -> None:
    torch.manual_seed(0)
    net = ss.models.build("digits_small")
    x, y = data.load("digits").test.batch(slice(0, 20))
    there = ss.margins(copy.deepcopy(net).cuda(), x.cuda(), y.cuda(), BALL, method=technique)
    with certifying(net):
        here = ss.margins(net, x, y, BALL, method=technique)
    # alpha-crown climbs: rounding may lead it elsewhere.
    near = 1e-2 if technique == "alpha-crown" else 2e-3
    torch.testing.assert_close(there.cpu(), here, rtol=near, atol=near)


def test_attacks_find_on_the_gpu_what_they_find_on_the_cpu() -> None:
    splits = data.load("digits")
    torch.manual_seed(0)
    net = ss.models.build("digits_small")
    ss.fit(
        net, splits.train, splits.val, ball=BALL, loss=Loss(proven=False), schedule=Schedule(epochs=3, ramp=0)
    )
    x, y = splits.test.batch(slice(0, 100))
    here = attacks.run_suite(net, x, y, BALL, "standard").accuracy
    there = attacks.run_suite(net.cuda(), x, y, BALL, "standard").accuracy
    for name, share in here.items():
        assert there[name] == pytest.approx(share, abs=0.03), name


def test_forms_over_exits() -> None:
    net, (x, y) = normed().eval(), digits()
    for found in (
        max_average(net, x, y, BALL, steps=3),
        at_exit(net, x, y, BALL, exit=0, steps=3),
        pgd(net, x, y, BALL, objective=average(), steps=3),
    ):
        assert found.is_cuda and bool(BALL.contains(found, x).all())


def test_a_run_with_exits_from_end_to_end(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    wanted = small_run.recipe(
        *("exits.at={2: pooled, 4: {kind: pooled, grid: 4}}", "exits.thresholds=[0.5, 0.5]"),
        *("loss.leaving=0.3", "loss.attacked=0.5", "loss.attack.form=max_average", "loss.attack.steps=2"),
        *("data.crop=1", "loss.interval_share=0.5", "loss.attack.precision=bfloat16", "evaluate.guards=20"),
    )
    run.train(wanted, folder, device="cuda")
    evaluation.evaluate_run(folder, device="cuda", suite="standard", method="auto")
    found = results.read(folder)
    assert "NVIDIA" in found["device"]
    assert (
        found["verified"]["accuracy"] <= found["attacked"]["accuracy"]["union"] <= found["clean"]["accuracy"]
    )
    images = data.load("digits").test.batch(slice(0, 1))[0]
    Image.fromarray((images[0, 0] * 255).byte().numpy()).save(tmp_path / "digit.png")
    (answer,) = predict(folder, [tmp_path / "digit.png"], eps="0.01", device="cuda")
    assert answer.exit in (0, 1, 2)
    calibrate_run(folder, macs=60_000, attacked=True, device="cuda")
    calibrate_run(folder, certified_macs=100_000, device="cuda")


def test_certificates_made_on_the_gpu_are_checked_on_the_cpu(tmp_path: Path) -> None:
    folder = run.train(small_run.recipe("ball.eps=0.01"), tmp_path / "run", device="cuda").folder
    evaluation.certify_run(folder, device="cuda", method="auto")
    process = small_run.start("recheck", folder)
    out, error = process.communicate()
    assert process.returncode == 0, out + error


def test_a_resumed_training_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    class Stopped(BaseException):
        pass

    def stop(records: list[dict[str, object]]) -> None:
        if len(records) == 1:
            raise Stopped

    splits = data.load("digits")
    options = {
        "ball": BALL, "loss": Loss(attacked=0.5, proven=False, attack=Attack(steps=2)),
        "schedule": Schedule(epochs=3, ramp=1), "device": "cuda", "state_folder": folder,
    }  # fmt: skip
    net = ss.models.build("digits_small")
    with pytest.raises(Stopped):
        ss.fit(net, splits.train, splits.val, on_epoch=stop, **options)  # type: ignore[arg-type]
    history = ss.fit(net, splits.train, splits.val, resume=True, **options)  # type: ignore[arg-type]
    assert len(history.records) == 3
