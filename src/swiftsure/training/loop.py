"""The training loop: plain, adversarial, interval and MixTrain training are settings of one loss."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swiftsure.attacks import replayed
from swiftsure.attacks.objectives import as_exits
from swiftsure.ball import Ball
from swiftsure.bounds import class_count, trace
from swiftsure.data import ImageSet, check_batch
from swiftsure.data.checks import check_labels
from swiftsure.errors import InputError
from swiftsure.exits import MultiExit, Policy
from swiftsure.modes import evaluating
from swiftsure.recipe import Exits, Loss, Optimizer, Schedule
from swiftsure.training import state as states
from swiftsure.training.adversary import adversary, check_form
from swiftsure.training.check import check, chosen_epoch
from swiftsure.training.leaving import Leaving
from swiftsure.training.mixing import controller
from swiftsure.training.progress import Meter
from swiftsure.training.schedules import epochs_of, learning_rate, radius_share, steps_of
from swiftsure.training.source import as_set, source
from swiftsure.training.terms import three_term_loss

Records = list[dict[str, Any]]
Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class History:
    """What a training did: the log (one entry an epoch), which entry's weights were kept, and its seconds."""

    records: Records
    best: int
    seconds: float


def fit(
    net: nn.Module,
    train: Any,
    val: Any,
    *,
    loss: Loss | None = None,
    ball: Ball | None = None,
    optimizer: Optimizer | None = None,
    schedule: Schedule | None = None,
    exits: Exits | None = None,
    augment: Augment | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    state_folder: str | Path | None = None,
    resume: bool = False,
    on_epoch: Callable[[Records], None] | None = None,
    progress: bool | None = None,
) -> History:
    """Train a network for clean, attacked and proven accuracy; it ends with the best epoch's weights, in eval mode.

    Args:
        net: returns logits (batch, classes) or a tuple of them; trained in place.
        train: (images, labels) tensors, a Dataset of (image, label), an ImageSet, or a DataLoader.
        val: the same; the mixing controller and the choice of the epoch look at it, training never does.
        loss: the three terms; by default MixTrain with k = 1.
        ball: the threat model; by default eps 0.1 in L-inf.
        optimizer, schedule: by default Adam and 20 epochs.
        exits: with several exits, when an image leaves, by which the epochs are judged; by default by entropy, equally
            many at each. Which exits there are is the network's business.
        augment: ``augment(x, generator) -> x`` on each training batch, on the device.
        seed: of order, samples and random starts. Weights are the caller's.
        device: where to train; by default where the network is.
        state_folder: where to keep what a resume needs, after each epoch.
        resume: go on from `state_folder` if something is there; the end is the same, bit for bit, on one CPU thread.
        on_epoch: called after each epoch with all records so far.
        progress: show rate and time left; by default on a terminal only.

    Returns:
        The history; its records are the lines of log.jsonl.

    Raises:
        InputError: unusable data, a network without bound rules where a proven term is asked for, a state of other
            settings, or a loss that is not finite.
    """
    loss, ball = loss or Loss(), Ball(0.1) if ball is None else ball
    if not isinstance(ball, Ball):
        raise InputError(f"ball is {ball!r}; allowed: a Ball such as Ball(eps=0.1)")
    optimizer, schedule = optimizer or Optimizer(), schedule or Schedule()
    device = torch.device(device) if device is not None else next(net.parameters()).device
    net.to(device)
    held_out = as_set(val)
    classes, count = _check_fit(net, held_out, loss, device)
    batches = source(train, schedule.batch, device, classes)
    if batches.shape is not None and batches.shape != held_out.shape:
        raise InputError(f"training images have shape {batches.shape}, validation images {held_out.shape}")

    leaving = _leaving(loss, exits, count)
    trunk = _frozen(net, exits)
    half = loss.attacked > 0 and loss.attack.precision != "float32"
    if half:
        # The layout in which half precision is fast; the arithmetic is the same but for the order of sums.
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    gradient = replayed(device)
    descent = _build(optimizer, net, trunk)
    mixing = controller(loss.mixing, schedule)
    settings = json.dumps(
        [asdict(part) for part in (loss, optimizer, schedule, exits or Exits())]
        + [ball.as_dict(), seed, batches.steps]
    )
    done = states.Progress()
    if state_folder is not None and resume:
        done = states.restore(Path(state_folder), net, descent, settings) or done
        mixing.state.update(done.controller)

    epochs = epochs_of(schedule, batches.steps)
    with (
        Meter(epochs, batches.steps, done.epoch, progress) as meter,
        _without_gradients(trunk),
        torch.random.fork_rng(devices=[]),
    ):
        for epoch in range(done.epoch + 1, epochs + 1):
            started = time.perf_counter()
            last = done.records[-1] if done.records else {"clean_accuracy": None, "verified_accuracy": None}
            weight = mixing.weight(epoch, last["clean_accuracy"], last["verified_accuracy"])
            # One stream of draws for each epoch, so that a resumed training needs no generator state.
            draws = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            torch.manual_seed(seed * 1_000_003 + epoch)  # dropout has no generator of its own
            # Early epochs, far from any proof, need no tight bound.
            mix = replace(loss, interval_share=1.0) if epoch <= loss.tight_from else loss
            net.train()
            if trunk is not None:
                trunk.eval()
            total = torch.zeros((), device=device)
            varied = schedule.augment_until is None or epoch <= schedule.augment_until
            # On a GPU starts are drawn there: drawn here they would take longer than a step of a small network.
            starts = (
                draws if device.type == "cpu" else torch.Generator(device).manual_seed(draws.initial_seed())
            )
            make_adversarial = adversary(loss.attack, ball, count, starts, gradient)
            steps = steps_of(schedule, epoch, batches.steps)
            for step, (x, y) in enumerate(islice(batches.epoch(draws), steps)):
                if augment is not None and varied:
                    x = augment(x, draws)
                here = ball.with_eps(
                    ball.radius * schedule.eps_factor * radius_share(schedule, epoch, step, batches.steps)
                )
                gated = loss.proven and loss.mixing.gate < 1
                proven = not gated or bool(torch.rand((), generator=draws) < loss.mixing.gate)
                value = three_term_loss(
                    net, x, y, here, mix, weight if proven else 0.0,
                    attack=make_adversarial, leaving=leaving, generator=draws,
                )  # fmt: skip
                descent.param_groups[0]["lr"] = learning_rate(optimizer, schedule, epoch, step, batches.steps)
                descent.zero_grad()
                value.backward()
                if optimizer.clip is not None:
                    nn.utils.clip_grad_norm_(net.parameters(), optimizer.clip)
                descent.step()
                total += value.detach()
                meter.step()
            mean = total.item() / steps
            if not torch.isfinite(total):
                raise InputError(
                    f"the loss became {mean} in epoch {epoch}; a lower optimizer.rate, a longer schedule.ramp or "
                    "optimizer.clip helps"
                )
            figures = check(net, held_out, ball, loss, schedule, device, exits)
            done.records.append(
                {
                    "epoch": epoch,
                    "eps": here.radius,
                    "weight": weight if loss.proven else 0.0,
                    "rate": descent.param_groups[0]["lr"],
                    "loss": mean,
                    "clean_accuracy": figures.clean,
                    "robust_accuracy": figures.attacked,
                    "verified_accuracy": figures.verified,
                    "seconds": time.perf_counter() - started,
                    "chosen": False,
                }
            )
            best = chosen_epoch(done.records, loss, schedule)
            for index, record in enumerate(done.records):
                record["chosen"] = index == best
            if best == len(done.records) - 1:
                done.best = {name: value.detach().clone() for name, value in net.state_dict().items()}
            done.controller = mixing.state
            if state_folder is not None:
                states.save(Path(state_folder), net, descent, done, settings)
            if on_epoch is not None:
                on_epoch(done.records)
            meter.epoch(done.records[-1])
    # In the network's own dictionary: some layers look there for the version that they were stored by.
    own = net.state_dict()
    own.update(done.best)
    net.load_state_dict(own)
    if half:
        net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    net.eval()
    best = chosen_epoch(done.records, loss, schedule)
    return History(done.records, best, sum(record["seconds"] for record in done.records))


def _leaving(loss: Loss, exits: Exits | None, count: int) -> Leaving | None:
    """The thresholds that side exits are trained towards; None where the recipe asks for no such term.

    Raises:
        InputError: numbers for exits that do not fit the network.
    """
    if loss.weights is not None and len(loss.weights) != count:
        raise InputError(f"loss.weights has {len(loss.weights)} numbers; allowed: {count}, one for each exit")
    if not loss.proven or loss.leaving == 0 or count == 1:
        return None
    if exits is None or exits.thresholds is None:
        raise InputError("loss.leaving needs exits.thresholds, which side exits are trained towards")
    Policy(exits.policy, exits.thresholds).require(count)
    return Leaving(loss.leaving, exits.policy, exits.thresholds)


def _frozen(net: nn.Module, exits: Exits | None) -> nn.Module | None:
    """The network that exits are attached to, where it is to stay as it is.

    Raises:
        InputError: nothing is attached, or nothing that has weights.
    """
    if exits is None or not exits.frozen:
        return None
    trunk = getattr(net, "backbone", None)
    if not isinstance(net, MultiExit) or not isinstance(trunk, nn.Module):
        raise InputError(
            "exits.frozen trains attached heads alone; the network has none (see swiftsure.attach)"
        )
    if not any(True for _ in net.heads.parameters()):
        raise InputError(
            f"exits.frozen trains attached heads alone; those of {net.exits} exits have no weights"
        )
    return trunk


@contextlib.contextmanager
def _without_gradients(trunk: nn.Module | None) -> Iterator[None]:
    """Inside the block nothing is computed for the weights of a frozen part."""
    weights = [] if trunk is None else [weight for weight in trunk.parameters() if weight.requires_grad]
    try:
        for weight in weights:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def _check_fit(net: nn.Module, images: ImageSet, loss: Loss, device: torch.device) -> tuple[int, int]:
    """Find out before the first epoch, not after it, that data, network and loss do not go together.

    Returns:
        How many classes the network has, and how many exits.
    """
    x, _ = images.batch(slice(0, 2), device)
    weights = next(net.parameters())
    if weights.dtype != x.dtype:
        raise InputError(
            f"the network's weights are {weights.dtype}; training needs {x.dtype}, as images are"
        )
    config = getattr(net, "config", None)
    check_batch(x, shape=tuple(config["input_shape"]) if isinstance(config, dict) else None)
    classes = class_count(trace(net, x)) if loss.proven else None
    try:
        with evaluating(net), torch.no_grad():
            logits = as_exits(net(x))
    except RuntimeError as error:
        line = str(error).splitlines()[0]
        raise InputError(f"the network does not take images of shape {images.shape}: {line}") from None
    classes = classes or logits[-1].shape[1]
    check_labels(images.labels, len(images), classes)
    if loss.attacked > 0:
        check_form(loss.attack, len(logits))
    return classes, len(logits)


def _build(optimizer: Optimizer, net: nn.Module, frozen: nn.Module | None) -> torch.optim.Optimizer:
    fixed = set() if frozen is None else set(frozen.parameters())
    weights = [weight for weight in net.parameters() if weight not in fixed]
    if optimizer.name == "adam":
        return torch.optim.Adam(weights, optimizer.rate, weight_decay=optimizer.weight_decay)
    return torch.optim.SGD(
        weights, optimizer.rate, momentum=optimizer.momentum, weight_decay=optimizer.weight_decay
    )
