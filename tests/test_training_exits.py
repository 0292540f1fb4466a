"""Training over exits: forms of attack as defences, the paper's loss and settings, epochs judged as deployed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import small_run
import swiftsure as ss
from swiftsure import data, models, recipe_file, run
from swiftsure.attacks import average, cross_entropy, fgsm, max_average, never, pgd, single
from swiftsure.ball import Ball
from swiftsure.errors import InputError
from swiftsure.exits import MultiExit, Policy, all_logits, equal_share
from swiftsure.recipe import Attack, Exits, Loss, Optimizer, Schedule
from swiftsure.training import fit, learning_rate, three_term_loss
from swiftsure.training.adversary import adversary
from swiftsure.training.check import check
from swiftsure.training.schedules import epochs_of, steps_of

BALL = Ball(0.1)
RDI = ("rdi_small_mnist", "rdi_resnet38_cifar10", "rdi_mobilenetv2_cifar10")
MINE = ("mnist_rdi_small", "mnist_rdi_small_static")


def network(exits: int = 3) -> MultiExit:
    """Convolutions of the digits, with dropout in the heads."""
    torch.manual_seed(1)
    stages = [
        nn.Sequential(nn.Conv2d(1 if number == 0 else 6, 6, 3, 1, 1), nn.ReLU()) for number in range(exits)
    ]
    heads = [nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(384, 10)) for _ in range(exits)]
    return MultiExit(stages, heads)


@pytest.fixture(scope="module")
def digits() -> data.Splits:
    return data.load("digits")


@pytest.fixture(scope="module")
def trained(digits: data.Splits) -> MultiExit:
    net = network()
    x, y = digits.train.batch(slice(0, 400))
    descent = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(30):
        loss = torch.stack([F.cross_entropy(z, y) for z in net(x)]).sum()
        descent.zero_grad()
        loss.backward()
        descent.step()
    return net.eval()


def batch(digits: data.Splits, count: int = 20) -> tuple[Tensor, Tensor]:
    return digits.test.batch(slice(0, count))


def drawn() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# ---- the loss and the attacks


def test_the_papers_loss(digits: data.Splits) -> None:
    """L = sum over exits of (CE(f_i(x), y) + CE(f_i(x_adv), y)) / 2."""
    net = network().eval()
    x, y = batch(digits)
    made = adversary(Attack(form="max_average", steps=2), BALL, 3, drawn())
    loss = recipe_file.parse("loss: {clean: .5, attacked: .5, proven: false}", "paper").loss
    value = three_term_loss(net, x, y, BALL, loss, 7.0, attack=made)
    x_adv = adversary(Attack(form="max_average", steps=2), BALL, 3, drawn())(net, x, y, BALL)
    pairs = zip(net(x), net(x_adv), strict=True)
    expected = sum((F.cross_entropy(clean, y) + F.cross_entropy(adv, y)) / 2 for clean, adv in pairs)
    torch.testing.assert_close(value, expected)
    # At radius 0 both images are the same one.
    torch.testing.assert_close(
        three_term_loss(net, x, y, Ball(0), loss, 7.0, attack=made),
        sum(F.cross_entropy(z, y) for z in net(x)),
    )


def test_every_form_is_what_it_is_called(trained: MultiExit, digits: data.Splits) -> None:
    x, y = batch(digits)
    options: dict[str, Any] = {"steps": 3, "step_size": 0.04}
    # Images of training go on when they fool the network.
    to_the_end = partial(pgd, judge=never)
    expected: dict[str, Callable[[], Tensor]] = {
        "main": lambda: to_the_end(trained, x, y, BALL, generator=drawn(), **options),
        "exit1": lambda: to_the_end(trained, x, y, BALL, objective=single(0), generator=drawn(), **options),
        "exit2": lambda: to_the_end(trained, x, y, BALL, objective=single(1), generator=drawn(), **options),
        "average": lambda: to_the_end(trained, x, y, BALL, objective=average(), generator=drawn(), **options),
        "max_average": lambda: max_average(trained, x, y, BALL, generator=drawn(), **options),
    }
    found = {
        form: adversary(Attack(form, **options), BALL, 3, drawn())(trained, x, y, BALL) for form in expected
    }
    for form, images in expected.items():
        torch.testing.assert_close(found[form], images(), rtol=0, atol=1e-6)
    names = list(found)
    assert not any(torch.equal(found[a], found[b]) for a in names for b in names[names.index(a) + 1 :])
    mixes = adversary(Attack("mix", **options), BALL, 3, drawn())
    assert not torch.equal(mixes(trained, x, y, BALL), mixes(trained, x, y, BALL))
    # A step is of the full radius, and shrinks with it.
    small = adversary(Attack("main", **options), BALL, 3, drawn())(trained, x, y, Ball(0.05))
    halved = pgd(trained, x, y, Ball(0.05), judge=never, steps=3, step_size=0.02, generator=drawn())
    torch.testing.assert_close(small, halved, rtol=0, atol=1e-6)


def test_a_step_of_the_average_form_is_one_pass(digits: data.Splits) -> None:
    net, (x, y) = network(), batch(digits)
    net.config = {"classes": 10}
    calls: list[int] = []
    for part in (*net.stages, *net.heads):
        part.register_forward_hook(lambda *_: calls.append(1))
    adversary(Attack("average", steps=4), BALL, 3)(net, x, y, BALL)
    assert len(calls) == 4 * (3 + 3)


def test_one_step_from_the_image_is_fgsm(trained: MultiExit, digits: data.Splits) -> None:
    x, y = batch(digits)
    attack = Attack("average", steps=1, step_size=0.1, random_start=False)
    found = adversary(attack, BALL, 3)(trained, x, y, BALL)
    torch.testing.assert_close(found, fgsm(trained, x, y, BALL, objective=average()), rtol=0, atol=1e-6)


def test_with_one_exit_all_forms_are_one(digits: data.Splits) -> None:
    net, (x, y) = network(1).eval(), batch(digits)
    found = [
        adversary(Attack(form, steps=3), BALL, 1, drawn())(net, x, y, BALL)
        for form in ("main", "average", "max_average", "mix")
    ]
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert torch.equal(found[0], pgd(net, x, y, BALL, judge=never, steps=3, generator=drawn()))


def test_attacks_in_half_precision_are_as_good(trained: MultiExit, digits: data.Splits) -> None:
    x, y = batch(digits, 100)
    reached = {}
    for precision in ("float32", "bfloat16"):
        attack = Attack("average", steps=5, precision=precision)
        found = adversary(attack, BALL, 3, drawn())(trained, x, y, BALL)
        assert found.dtype == torch.float32
        assert BALL.contains(found, x).all()
        with torch.no_grad():
            reached[precision] = average()(trained(found), y).mean().item()
    with torch.no_grad():
        clean = average()(trained(x), y).mean().item()
    assert reached["bfloat16"] - clean > 0.97 * (reached["float32"] - clean) > 0
    assert all(parameter.dtype == torch.float32 for parameter in trained.parameters())


def test_the_loss_of_a_sure_network_does_not_round_to_nothing() -> None:
    """In 8 bits the probability .9999 is 1, and half of the gradient would be gone."""

    class Sure(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            first = x.flatten(1).sum(1)
            return torch.stack([first + 9, 0.9 * first], 1).bfloat16()

    x, y = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])
    attack = Attack("main", steps=1, step_size=0.1, random_start=False, precision="bfloat16")
    # Up goes the first logit, faster than the second: the way to a larger loss is down.
    assert (adversary(attack, BALL, 1)(Sure(), x, y, BALL) < x).all()


@pytest.mark.parametrize(
    "form", ["exit0", "exit", "exit01", "exit-1", "exit1.5", "median", "max-average", ""]
)
def test_forms_that_there_are_not(form: str) -> None:
    allowed = re.escape(
        f"attack.form is {form!r}; allowed: main, average, max_average, mix, exit1, exit2, ..."
    )
    with pytest.raises(InputError, match=allowed):
        Attack(form)


@pytest.mark.parametrize(
    ("form", "exits", "words"),
    [
        ("exit3", 3, "'exit3', and the network has 3 exits; allowed: main, .*, mix, exit1, exit2 "),
        ("exit1", 1, "'exit1', and the network has 1 exit; allowed: main, average, max_average, mix "),
    ],
)
def test_exits_that_the_network_has_not(digits: data.Splits, form: str, exits: int, words: str) -> None:
    loss = Loss(clean=0.5, attacked=0.5, proven=False, attack=Attack(form))
    with pytest.raises(InputError, match=words):
        fit(network(exits), digits.train, digits.val, loss=loss, ball=BALL)


# ---- the paper's schedule


def test_milestones_and_length_in_steps() -> None:
    schedule = Schedule(epochs=62, steps=13_100, batch=256, ramp=0)
    assert epochs_of(schedule, 214) == 62
    assert [steps_of(schedule, epoch, 214) for epoch in (1, 61, 62)] == [214, 214, 13_100 - 61 * 214]
    assert epochs_of(Schedule(epochs=3, steps=50, ramp=0), 20) == 3
    assert epochs_of(Schedule(epochs=9, steps=40, ramp=0), 20) == 2
    assert epochs_of(Schedule(epochs=2, steps=50, ramp=0), 20) == 2
    assert steps_of(Schedule(epochs=2, steps=50, ramp=0), 2, 20) == 20
    sgd = Optimizer("sgd", rate=1.0, decay="step", decay_steps=[11_700, 12_900])

    def rate(step: int) -> float:
        return learning_rate(sgd, schedule, step // 214 + 1, step % 214, 214)

    assert [rate(step) for step in (0, 11_699, 11_700, 12_899, 12_900, 13_099)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )
    linear = Optimizer(rate=1.0, decay="linear")
    assert learning_rate(linear, schedule, 62, 45, 214) == pytest.approx(1 / 13_100)


def test_training_ends_after_so_many_steps(digits: data.Splits) -> None:
    net = network()
    calls = []
    net.heads[0].register_forward_hook(lambda module, *_: calls.append(1) if module.training else None)
    part = digits.train.select(slice(0, 64))
    schedule = Schedule(epochs=5, steps=7, batch=16, ramp=0, check_images=1)
    history = fit(net, part, digits.val, loss=Loss(proven=False), ball=BALL, schedule=schedule)
    assert len(calls) == 7
    assert len(history.records) == 2
    # A mean over the steps that there were: of an untrained network ln 10 an exit, at first.
    assert 3 < history.records[1]["loss"] < 7


# ---- epochs are judged as deployed


def figures(net: nn.Module, digits: data.Splits, choice: Exits | None = None, **loss: Any) -> Any:
    terms = Loss(**{"clean": 0.5, "attacked": 0.5, "proven": False, **loss})
    schedule = Schedule(check_images=60, check_steps=3)
    return check(net, digits.train.select(slice(0, 90)), BALL, terms, schedule, torch.device("cpu"), choice)


def test_the_clean_figure_is_that_of_the_adaptive_network(trained: MultiExit, digits: data.Splits) -> None:
    net = network()
    net.load_state_dict(trained.state_dict())
    # The exits disagree: what leaves at the first one is answered by guessing.
    nn.init.zeros_(net.heads[0].get_parameter("2.weight"))
    net.eval()
    images = digits.train.select(slice(0, 90))
    x, y = images.batch(slice(None))
    policies = {
        None: equal_share(all_logits(net, images)),
        "hand": Policy("entropy", (0.0, 100.0)),
        "confidence": equal_share(all_logits(net, images), "confidence"),
    }
    choices = {
        None: None,
        "hand": Exits(thresholds=[0.0, 100.0]),
        "confidence": Exits(policy="confidence"),
    }
    for name, policy in policies.items():
        right = (net.adaptive(x, policy).label == y).float().mean().item()
        assert figures(net, digits, choices[name]).clean == pytest.approx(right)
    last = (net(x)[-1].argmax(1) == y).float().mean().item()
    assert figures(net, digits).clean < last - 0.1
    costs = net.macs((1, 8, 8))
    assert figures(net, digits, Exits(macs=costs[2])).clean >= last
    assert net.policy is None


def test_the_attacked_figure_is_of_the_exits_that_answer(trained: MultiExit, digits: data.Splits) -> None:
    """A defence of the last exit alone may not make a network look robust that answers at its first."""
    first = Exits(thresholds=[100.0, 100.0])
    found = figures(trained, digits, first, attack=Attack("main"))
    images, policy = digits.train.select(slice(0, 60)), Policy("entropy", (100.0, 100.0))
    x, y = images.batch(slice(None))
    survives = ~policy.misclassified(trained(x), y)
    right = survives.clone()
    x_adv = pgd(trained, x, y, BALL, steps=3, objective=average(), generator=drawn())
    survives &= ~policy.misclassified(trained(x_adv), y)
    by_main = pgd(trained, x, y, BALL, steps=3, generator=drawn())
    main_alone = (right & ~policy.misclassified(trained(by_main), y)).float().mean().item()
    assert found.attacked <= survives.float().mean().item() + 0.05
    assert found.attacked < main_alone
    # The defence's own form counts as well: the attack on the first exit is the strongest one here.
    own = figures(trained, digits, first, attack=Attack("exit1"))
    assert own.attacked < figures(trained, digits, first, attack=Attack("average")).attacked


def test_one_exit_is_judged_as_ever(digits: data.Splits) -> None:
    torch.manual_seed(0)
    net = models.build("digits_small", width=4, hidden=24).eval()
    images = digits.train.select(slice(0, 90))
    x, y = images.batch(slice(None))
    logits = net(x)
    right = logits.argmax(1) == y
    kept = right[:60].nonzero()[:, 0]
    x_adv = pgd(net, x[kept], y[kept], BALL, steps=3, generator=drawn(), objective=cross_entropy)
    robust = (net(x_adv).argmax(1) == y[kept]).sum().item() / 60
    found = figures(net, digits)
    assert (found.clean, found.attacked) == (right.float().mean().item(), pytest.approx(robust))


def test_a_run_is_judged_by_the_thresholds_of_its_recipe(tmp_path: Path) -> None:
    plain = ("loss.proven=false", "loss.attacked=0.5", "loss.attack.form=average", "loss.attack.steps=2")
    rest = ("exits.count=2", "schedule.epochs=2", "schedule.ramp=0", "optimizer.rate=0.01")
    for thresholds in ("[0.0]", "[9.0]"):
        folder = small_run.train(tmp_path / thresholds, *plain, *rest, f"exits.thresholds={thresholds}")
        records = [json.loads(line) for line in (folder / run.LOG).read_text().splitlines()]
        kept = next(record for record in records if record["chosen"])
        x, y = data.load("digits").val.batch(slice(None))
        net = ss.load(folder)
        assert isinstance(net, MultiExit)
        answer = net.adaptive(x)
        assert answer.exit.unique().tolist() == [0 if thresholds == "[9.0]" else 1]
        assert kept["clean_accuracy"] == pytest.approx((answer.label == y).float().mean().item())


# ---- resume


class Killed(BaseException):
    """Not an Exception: nothing may catch it and carry on."""


def test_a_training_in_half_precision_resumes_bit_for_bit(digits: data.Splits, tmp_path: Path) -> None:
    """Its weights lie in another order in memory, which a stored state knows nothing of."""

    def go(net: MultiExit, folder: Path, on_epoch: Callable[[Any], None] | None = None) -> MultiExit:
        attack = Attack("max_average", steps=2, precision="bfloat16")
        fit(
            net,
            digits.train.select(slice(0, 96)),
            digits.val.select(slice(0, 20)),
            loss=Loss(clean=0.5, attacked=0.5, proven=False, attack=attack),
            ball=BALL,
            schedule=Schedule(epochs=4, steps=11, batch=32, ramp=1, check_images=10, check_steps=1),
            state_folder=folder,
            resume=True,
            on_epoch=on_epoch,
        )
        return net

    def killed_after_two(records: list[Any]) -> None:
        if len(records) == 2:
            raise Killed

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        straight = go(network(), tmp_path / "straight")
        with pytest.raises(Killed):
            go(network(), tmp_path / "broken", killed_after_two)
        resumed = go(network(), tmp_path / "broken")
    finally:
        torch.set_num_threads(threads)
    for (name, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.is_contiguous()


# ---- the recipes


def test_the_papers_settings() -> None:
    """PAPERS.md, section 2, and 5,000 images held out of 60,000 and of 50,000."""
    recipes = [recipe_file.read_packaged(name) for name in RDI]
    for recipe, images in zip(recipes, (55_000, 45_000, 45_000), strict=True):
        assert (recipe.loss.clean, recipe.loss.attacked, recipe.loss.proven) == (0.5, 0.5, False)
        attack, schedule = recipe.loss.attack, recipe.schedule
        assert (attack.form, attack.random_start, attack.precision) == ("max_average", True, "float32")
        assert schedule.steps is not None
        assert schedule.epochs == -(-schedule.steps // (images // schedule.batch))
        assert schedule.ramp == schedule.warmup == 0
        assert recipe.optimizer.name == "sgd"
        assert recipe.evaluate.suite == "rdi"
    mnist, resnet, mobile = recipes
    assert (mnist.data.crop, mnist.data.flip, mnist.ball.build().radius) == (0, False, 0.3)
    assert (mnist.loss.attack.steps, mnist.loss.attack.step_size) == (40, 0.01)
    for recipe in (resnet, mobile):
        assert (recipe.data.crop, recipe.data.flip) == (4, True)
        assert recipe.ball.build().radius == pytest.approx(8 / 255)
        assert (recipe.loss.attack.steps, recipe.loss.attack.step_size) == (10, pytest.approx(2 / 255))
    lengths = [(r.schedule.steps, r.schedule.batch, r.optimizer.decay_steps) for r in recipes]
    assert lengths == [
        (13_100, 256, [11_700, 12_900]),
        (64_000, 128, [32_000, 48_000]),
        (82_000, 128, [61_700, 70_000, 78_000]),
    ]
    assert [(r.optimizer.rate, r.optimizer.weight_decay) for r in recipes] == [
        (0.033, 5e-4),
        (0.1, 1e-4),
        (0.05, 1e-4),
    ]


def smoke(name: str, count: int) -> None:
    """A few steps of a recipe's own training on real images."""
    recipe = recipe_file.read_packaged(name)
    recipe.loss.attack.steps = 2
    recipe.schedule.batch, recipe.schedule.steps = count // 2, 2
    recipe.schedule.check_images, recipe.schedule.check_steps = 40, 1
    parts = data.load(recipe.data.name)
    torch.manual_seed(0)
    net = models.build(recipe.model.name)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    history = fit(
        net,
        parts.train.select(slice(0, count)),
        parts.val.select(slice(0, 40)),
        loss=recipe.loss,
        ball=recipe.ball.build(),
        optimizer=recipe.optimizer,
        schedule=recipe.schedule,
        exits=recipe.exits,
        augment=run._augment(recipe.data),
    )
    assert len(history.records) == 1
    record = history.records[0]
    exits = net.exits if isinstance(net, MultiExit) else 1
    # Two steps from scratch: near the loss of guessing, which every exit adds.
    assert 0.5 * 2.3 * exits < record["loss"] < 4 * 2.3 * exits
    assert 0 <= record["robust_accuracy"] <= record["clean_accuracy"]
    after = net.state_dict()
    still = [
        key for key, value in before.items() if value.is_floating_point() and torch.equal(value, after[key])
    ]
    # Normalisation is fixed; what lies before the last layer of RDI-SmallCNN waits for that to leave zero.
    assert all("mean" in key or "std" in key for key in still), still


@pytest.mark.real_data("mnist")
@pytest.mark.parametrize("name", [RDI[0], *MINE])
def test_recipes_train_on_mnist(name: str) -> None:
    smoke(name, 200)


@pytest.mark.real_data("cifar10")
@pytest.mark.parametrize("name", RDI[1:])
def test_recipes_train_on_cifar(name: str) -> None:
    smoke(name, 32)
